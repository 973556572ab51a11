"""`scalefl plan`: its options, what it is told of a model, and what it prints."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import PEAK_KILOBYTES, arguments, budgets_file, environment, start, state

from scalefl.cli import main
from scalefl.planning.command import PARTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--zero_stage 4", "--zero_stage: got 4; expected 0 (none), 1, 2 or 3."),
        ("--zero_stage 2 --offload all", "--offload: all moves weights, under --zero_stage 2; expected 3."),
        ("--offload optimizer", "--offload: optimizer is ZeRO's; expected --zero_stage 1, 2 or 3 with it."),
        ("--search", "--search: needs budgets to assign levels by; give --client_budgets FILE."),
        ("--world_size 0", "--world_size: got 0; expected a number at least 1."),
        ("--world_size many", "--world_size: got 'many'; expected a whole number."),
        (
            "--world_size 3",
            "--batch-size 4 cannot be shared by 3 processes in micro-batches of 1; expected a multiple of 3",
        ),
        ("--optimizer paged_adamw_8bit --device cpu --momentum 0", "--optimizer: paged_adamw_8bit pages its"),
        ("--quantization nf4 --tuning lora", "--quantization nf4: language_model"),
        ("--init_from nowhere", "--init_from "),
        ("--zero_stage 3 --base_store resident", "--base_store: got resident, but ZeRO-3 spreads weights"),
        ("--attn flash_attention_2 --device cpu", "--attn flash_attention_2: needs a CUDA GPU (this is cpu)"),
        ("--seq_length 7", "--seq_length: got 7, of which 4 are the image and "),
        ("--world_sise 2", "--world_sise: unknown option; did you mean --world_size? "),
        ("--vertical_scale_ratios 0.1 1", "level 1: width ratio 0.1 keeps 0 of 2"),
    ],
)
def test_bad_options(refused, typed, line):
    (got,) = refused(*typed.split())
    assert got.startswith(line)


def test_the_tables_say_what_json_says(plan, tmp_path, capsys):
    path = budgets_file(tmp_path, [{"client": "pi", "memory": 1}])
    found = plan("--client_budgets", path)
    assert main(["plan", *arguments(tmp_path, "--client_budgets", path)[1:]]) == 0
    shown = capsys.readouterr().out
    for level in found["levels"]:
        assert f"{level['parameters']:,}" in shown and f"{level['macs'] / 1e6:,.1f} M" in shown
        for where in ("own", "round"):
            numbers = [f"{level[where][part] / 1e6:,.2f}" for part in ("weights", "optimizer", "total")]
            assert re.search(r"\s.*".join(map(re.escape, numbers)), shown)
    assert "client 0 (pi)" in shown
    for note in found["notes"]:
        assert note in shown


def test_a_plan_from_a_saved_run_reads_its_config(tmp_path, capsys):
    saved = start(tmp_path, num_rounds=1) / "checkpoints" / "round-0001"
    capsys.readouterr()
    command = ["plan", "--init_from", str(saved), "--json", "--use_gpu", "0", "--data", "synthetic"]
    typed = "--tuning full --ee_locs 1 --vertical_scale_ratios 1 --horizontal_scale_ratios 2"
    assert main([*command, *typed.split(), "--client_split_ratios", "1"]) == 0
    (level,) = json.loads(capsys.readouterr().out)["levels"]
    assert level["parameters"] == sum(tensor.numel() for tensor in state(saved.parents[1], 1).values())


@pytest.fixture(scope="module")
def full_size():
    """The plan of the full-size model under the options of launch/low_memory.sh, and the kB that it took.

    In a process of its own: its weights would take 13 GB.
    """
    typed = "--cfg_path minigpt_v2 --tuning lora --quantization nf4 --precision bf16 --feature_cache file "
    typed += "--gradient_checkpointing --optimizer paged_adamw_8bit --micro_batch_size 1 --batch_size 8 "
    typed += "--eval_batch_size 8 --device cuda --json"
    script = (
        "import sys; from scalefl.cli import main; code = main(['plan', *sys.argv[1:]]); "
        f"print(code, {PEAK_KILOBYTES})"
    )
    command = [sys.executable, "-c", script, *typed.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    found, last = done.stdout.strip().splitlines()
    code, kilobytes = map(int, last.split())
    assert code == 0
    return json.loads(found), kilobytes


def test_the_full_size_model_is_planned_without_its_weights(full_size):
    """Without adapters they are 8 billion."""
    found, kilobytes = full_size
    assert kilobytes < 1_000_000
    whole = found["levels"][-1]["own"]["weights"]
    assert 3.5e9 < whole < 4.5e9  # 6.5 billion at 4.13 bits, 0.3 billion in bf16, adapters in fp32


def test_the_documents_say_what_is_planned(full_size):
    """docs/memory.md: every row of the sample, and of the table of GPUs the recipe's as it is."""
    found, text = full_size[0], (ROOT / "docs" / "memory.md").read_text()
    levels = found["levels"]
    names = {"training in a round": "round", "training, own process": "own", "evaluation": "evaluation"}
    said = {name: {f"level {n}": at[key] for n, at in enumerate(levels, 1)} for name, key in names.items()}
    said["image features"] = {"all": found["features"]}
    rows = re.findall(rf"^  (all|level \d) +({'|'.join(said)}) +(.*)$", text, re.MULTILINE)
    assert len(rows) == 7
    for level, name, numbers in rows:
        assert numbers.split() == [f"{said[name][level][part] / 1e9:,.2f}" for part in PARTS]
    peak = max(memory["total"] for by_level in said.values() for memory in by_level.values())
    needs = ", ".join(f"{level['needs'] / 1e9:.1f}" for level in levels)
    assert f"| 8 GB | none | {peak / 1e9:.1f} GB | {needs} GB |" in text
