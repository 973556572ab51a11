"""Every precision and quantisation under every launch equals a plain loop; `matrix.py` is launched.

`PYTHONPATH=.:tests python tests/test_matrix.py` prints the table of docs/engines.md, of what the last session
of these tests found.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matrix import CELLS, WITH_ADAMW
from runs import launched

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

LAUNCHES = {
    "single": "one process",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero2_offload": "ZeRO-2, offload",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offload",
}
IN_WORDS = {
    "single": "plain PyTorch",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero2_offload": "ZeRO-2 with optimizer offloaded",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3 with weights and optimizer offloaded",
}
"""What a run calls its launch."""
CHECKS = {
    **{name: name for name in CELLS},
    "adamw_8bit": "8-bit AdamW",
    "both_stores": "both base stores",
    "shipped_threshold": "threshold as shipped",
}
"""Titles of columns."""
OF_A_CELL = ("evaluated", "resumed", "released", "fresh", "still")
LAWS = {
    **dict.fromkeys(CELLS, OF_A_CELL),
    "adamw_8bit": ("in_bytes", "fresh", "still"),
    "shipped_threshold": ("spread", "stay_whole", *OF_A_CELL),
}
RESIDENT_UNDER_ZERO_3 = "--base_store: got resident, but ZeRO-3 spreads weights over the processes as they"

SGD = {"fp32": 1e-5, "bf16": 0.02}
"""Distance from the plain loop, as a share of the change.

fp32 sums some hundred terms in another order, in two dozen steps; bf16 rounds each operation by 2^-9, and
batches that are divided otherwise round otherwise. A plain loop without momentum or decay, or without
clipping, is off by 0.2 and more; one without distillation by 0.03; one on whole values, not int8, by 0.04.
"""
ADAMW = 2e-3
"""In fp32. AdamW divides a gradient by its own size, so that elements of every size weigh the same.

Where gradients are off by a share r, an element c times as large as most is off by r / c of its step, at most
by all of it. With c spread evenly over 0 to 1, the mean of min(1, r / c)^2 is 2 r, and the share sqrt(2 r):
0.0014 for r = 1e-6. A plain loop without decay is off by 0.3, without distillation by 0.06, without clipping
by 0.02; bf16, with r = 0.004, would be off by 0.09, which hides the last two.
"""
IN_BYTES = 0.1
"""8-bit codes of the two moments err by some per cent each; ZeRO's blocks of 256 mix tensors."""

FOUND: dict[str, dict[str, Any]] = {}
"""By launch, what this session found; also in pytest's cache, as KEY/LAUNCH."""
KEY = "scalefl_matrix"


@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_cell(tmp_path, request, launch):
    request.config.cache.set(f"{KEY}/{launch}", None)  # a launch that fails has found nothing
    with launched(tmp_path, launch, [str(ROOT / "tests" / "matrix.py"), str(tmp_path), launch]) as job:
        assert job.end(seconds=900) == 0, job.last_lines
    found = FOUND[launch] = json.loads((tmp_path / "found.json").read_text())
    request.config.cache.set(f"{KEY}/{launch}", found)
    is_zero_3 = launch.startswith("zero3")
    assert list(found) == [name for name in CHECKS if is_zero_3 or name != "shipped_threshold"]
    for name in LAWS.keys() & found.keys():
        assert not broken(name, found[name]), (name, found[name])
    if is_zero_3:
        assert found["both_stores"]["refused"].startswith(RESIDENT_UNDER_ZERO_3)
    else:
        assert found["both_stores"] == {"same_bits": True}
    held = "read from files" if is_zero_3 else "in memory"
    assert f", {IN_WORDS[launch]}; --precision bf16; frozen base {held} in nf4, double; " in job.output
    if launch != "single":
        assert job.output.count("2 process(es)") >= len(CELLS)
    assert "FutureWarning" not in job.output  # of DeepSpeed, for every layer and step under ZeRO-3


def test_the_docs_show_what_was_found():
    if FOUND.keys() != LAUNCHES.keys():
        pytest.skip("needs every launch of the matrix in the same process")
    docs = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    assert table(FOUND) in docs, "PYTHONPATH=.:tests python tests/test_matrix.py prints the table"


@pytest.mark.parametrize(
    ("name", "found", "text"),
    [
        ("fp32 none", {"relative": 9e-6}, "≤ 0.001 %"),
        ("fp32 none", {"relative": 1.1e-5}, "relative"),
        ("bf16 nf4", {"relative": 0.3, "resumed": False, "fresh": False}, "relative, resumed, fresh"),
        ("both_stores", {"same_bits": True}, "same bits"),
        ("both_stores", {"same_bits": False}, "other bits"),
        ("both_stores", {"refused": "--base_store: got resident"}, "refused"),
        ("shipped_threshold", None, "n/a"),
        ("shipped_threshold", {"relative": 9e-6}, "≤ 0.001 %"),
    ],
)
def test_the_table_names_what_does_not_hold(name, found, text):
    laws = dict.fromkeys(LAWS.get(name, ()), True)
    assert entry(name, found if found is None else laws | found) == text


def tolerance(name: str) -> float:
    if name == "adamw_8bit":
        return IN_BYTES
    return ADAMW if name in WITH_ADAMW else SGD["bf16" if name.startswith("bf16") else "fp32"]


def broken(name: str, found: dict[str, Any]) -> list[str]:
    """The laws that a check did not find to hold; `relative` is the distance from the plain loop."""
    off = [] if found["relative"] <= tolerance(name) else ["relative"]
    return off + [law for law in LAWS[name] if not found[law]]


def entry(name: str, found: dict[str, Any] | None) -> str:
    """The bound that held, or what happened instead."""
    if found is None:
        return "n/a"
    if "refused" in found:
        return "refused"
    if "same_bits" in found:
        return "same bits" if found["same_bits"] else "other bits"
    return ", ".join(broken(name, found)) or f"≤ {100 * tolerance(name):g} %"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: one row a launch, one column a check."""
    rows = ["| launch | " + " | ".join(CHECKS.values()) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    for launch, title in LAUNCHES.items():
        entries = [entry(name, found[launch].get(name)) for name in CHECKS]
        rows.append(f"| {title} | " + " | ".join(entries) + " |")
    return "\n".join(rows)


def last_session() -> dict[str, dict[str, Any]]:
    """What pytest's cache holds; exits where a launch is missing."""
    files = {launch: ROOT / ".pytest_cache" / "v" / KEY / launch for launch in LAUNCHES}
    found = {launch: json.loads(file.read_text()) for launch, file in files.items() if file.is_file()}
    if missing := [launch for launch in LAUNCHES if not found.get(launch)]:
        sys.exit(f"not found: {', '.join(missing)}; run python -m pytest tests/test_matrix.py first.")
    return found


if __name__ == "__main__":
    print(table(last_session()))
