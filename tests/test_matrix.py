"""Every precision and quantisation under every launch equals plain PyTorch; `matrix.py` is launched."""

import json
from pathlib import Path

import pytest
from matrix import PRECISIONS, QUANTISATIONS
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

RELATIVE = {"fp32": 1e-5, "bf16": 0.02}
"""Distance from plain, as a share of the change.

fp32 sums some hundred terms in another order, in two dozen steps (measured 9e-7); bf16 rounds each operation
by 2^-9, and batches that are divided otherwise round otherwise (measured 0.5 %).
"""

FOUND: dict[str, dict] = {}
"""What the launches of this session gave."""


@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_cell(tmp_path, launch):
    with launched(tmp_path, launch, [str(ROOT / "tests" / "matrix.py"), str(tmp_path)]) as job:
        assert job.end(seconds=900) == 0, job.output
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert list(cells) == [f"{p} {q}" for p in PRECISIONS for q in QUANTISATIONS]
    for name, cell in cells.items():
        precision = name.partition(" ")[0]
        assert cell["relative"] < RELATIVE[precision], (name, cell)
        assert all(cell[law] for law in ("resumed", "released", "fresh", "still")), (name, cell)
    if "zero" in launch:
        assert job.output.count("2 process(es)") >= len(cells)
    FOUND[launch] = cells


def test_the_docs_show_what_was_found():
    """Made by `PYTHONPATH=.:tests python tests/test_matrix.py`, of what this session found."""
    if set(FOUND) != set(LAUNCHES):
        pytest.skip("needs every launch of the matrix in the same session")
    assert table(FOUND) in (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


def table(found: dict[str, dict]) -> str:
    """Markdown: one row a launch, one column a cell."""
    names = [f"{p} {q}" for p in PRECISIONS for q in QUANTISATIONS]
    rows = ["| launch | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for launch, title in LAUNCHES.items():
        shown = ("equal" if found[launch][name]["resumed"] else "no" for name in names)
        rows.append(f"| {title} | " + " | ".join(shown) + " |")
    return "\n".join(rows)
