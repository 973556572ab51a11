"""`--init_from`: a run starts where the folder it names ended, or refuses one that does not hold it all."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from runs import arguments, federation, forget_launch, nearly, records, same_bits, start, state
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from scalefl.cli import main

LORA = {"tuning": "lora"}
STILL = {"lr": 0.0, "num_rounds": 1}
"""Such a run is evaluated as it started."""


def folder_in(parent, name):
    (folder := parent / name).mkdir()
    return folder


def last(run_folder, round=2):
    return run_folder / "checkpoints" / f"round-{round:04d}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs: a full one; a lora one from it; one from that again; a lora one from scratch, of another seed."""
    folder = tmp_path_factory.mktemp("trained")
    runs = SimpleNamespace(full=start(folder_in(folder, "full")))
    runs.lora = start(folder_in(folder, "lora"), "--init_from", str(last(runs.full)), **LORA)
    runs.chained = start(folder_in(folder, "chained"), "--init_from", str(last(runs.lora)), **LORA)
    runs.scratch = start(folder_in(folder, "scratch"), **LORA, seed=5)
    return runs


def evaluated(run_folder):
    return records(run_folder)[-1]["evaluation"]


@pytest.mark.parametrize("source", ["full", "lora", "chained", "scratch"])
def test_a_run_starts_where_the_other_ended(tmp_path, trained, source):
    """Its first evaluation is the other's last; the examples are drawn by the seed, so it is the other's."""
    before, seed = getattr(trained, source), 5 if source == "scratch" else 0
    typed = ["--init_from", str(last(before)), "--seed", str(seed)]
    run_folder = start(tmp_path, *typed, **STILL, tuning="full" if source == "full" else "lora")
    assert same_bits(state(run_folder, 1), state(before, 2))
    assert evaluated(run_folder) == nearly(evaluated(before), rel=1e-6)
    ends = [evaluated(getattr(trained, name)) for name in ("full", "lora", "chained", "scratch")]
    assert all(one != other for i, one in enumerate(ends) for other in ends[:i])


def test_new_adapters_add_nothing_to_a_full_model(tmp_path, trained):
    """At the whole level; the smaller one's tower is frozen now, and so no longer cut."""
    run_folder = start(tmp_path, "--init_from", str(last(trained.full)), **STILL, **LORA)
    got, expected = (evaluated(run)["levels"]["2"] for run in (run_folder, trained.full))
    assert got == nearly(expected, rel=1e-6)


def test_adapters_go_on_upon_the_base_they_were_trained_on(tmp_path, trained):
    """Which is drawn by the earlier run's seed, whatever this run's is."""
    own = federation(tmp_path, **LORA, seed=5)
    fed = federation(tmp_path, **LORA, seed=0, init_from=str(last(trained.scratch)))
    assert same_bits(fed.store.base, own.store.base)
    assert same_bits(fed.initial_state, state(trained.scratch, 2))


def test_training_goes_on_from_there(tmp_path, trained):
    run_folder = start(tmp_path, "--init_from", str(last(trained.full)), num_rounds=1)
    assert not same_bits(state(run_folder, 1), state(trained.full, 2))


def test_a_saved_model_folder_is_started_from(tmp_path, trained):
    """What `save_pretrained` writes of model and processor: no file of ours is in it."""
    saved = tmp_path / "saved"
    AutoModelForImageTextToText.from_pretrained(last(trained.full)).save_pretrained(saved)
    AutoProcessor.from_pretrained(last(trained.full)).save_pretrained(saved)
    assert not (saved / "run.json").exists()
    run_folder = start(tmp_path, "--init_from", str(saved), **STILL)
    assert evaluated(run_folder) == nearly(evaluated(trained.full), rel=1e-6)
    assert same_bits(state(run_folder, 1), state(trained.full, 2))


def refused(folder, capsys, *typed, **options):
    """The one line that a command gets, beside what it logs to wherever an earlier test let it log."""
    forget_launch()
    capsys.readouterr()
    assert main(arguments(folder, *typed, **options)) == 2
    (line,) = [said for said in capsys.readouterr().err.splitlines() if said.startswith("scalefl: ")]
    assert not (folder / "run").exists()
    return line


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--tuning full", "--tuning lora"),
        ("--lora_r 8", "--lora_r 4."),
        ("--lora_alpha 3", "--lora_alpha 16.0."),
        ("--lora_targets k_proj", "--lora_targets"),
    ],
    ids=["tuning", "rank", "alpha", "targets"],
)
def test_trained_parts_fit_no_other_options(tmp_path, capsys, trained, typed, words):
    typed = f"--tuning lora --init_from {last(trained.lora)} {typed}".split()
    line = refused(tmp_path, capsys, *typed)
    assert line.startswith(
        f"scalefl: --init_from {last(trained.lora)}: holds only the trained part of a model"
    )
    assert words in line


def refused_by_both(folder, capsys, *typed, **options):
    """The one line that a run and its plan get."""
    line = refused(folder, capsys, *typed, **options)
    assert main(["plan", *arguments(folder, *typed, **options)[1:]]) == 2
    assert capsys.readouterr().err.splitlines() == [line]
    return line


@pytest.mark.parametrize("source", ["lora", "chained"])
def test_a_plan_starts_where_a_run_can(tmp_path, capsys, trained, source):
    typed = ["--init_from", str(last(getattr(trained, source)))]
    line = refused_by_both(tmp_path, capsys, *typed, "--lora_r", "8", **LORA)
    assert line.startswith(f"scalefl: --init_from {typed[1]}: holds only the trained part of a model")
    assert main(["plan", *arguments(tmp_path, *typed, **LORA)[1:]]) == 0


def test_a_start_of_another_family_is_refused(tmp_path, capsys, trained):
    folder = tmp_path / "other"
    shutil.copytree(last(trained.lora), folder)
    saved = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(saved | {"run": saved["run"] | {"arch": "mine:FAMILY"}}))
    line = refused_by_both(tmp_path, capsys, "--init_from", str(folder), **LORA)
    assert line == f"scalefl: --init_from {folder}: holds a mine:FAMILY; expected a MiniGPTv2."


@pytest.mark.parametrize("source", ["full", "lora"])
@pytest.mark.parametrize("change", ["remove", "reshape"])
def test_weights_that_are_not_all_there_are_refused(tmp_path, capsys, trained, source, change):
    """A parameter that is missing would start at random, without a word."""
    file = last(trained.full if source == "full" else trained.lora) / "model.safetensors"
    tensors, name = load_file(file), "projector.weight"
    changed = {**tensors, name: torch.zeros(3, 3)} if change == "reshape" else dict(tensors)
    if change == "remove":
        del changed[name]
    kept = file.read_bytes()
    try:
        save_file(changed, file, metadata={"format": "pt"})
        line = refused(tmp_path, capsys, "--init_from", str(file.parent), tuning=source)
    finally:
        file.write_bytes(kept)
    assert str(file.parent) in line and name in line


@pytest.mark.parametrize("then", ["resume", "evaluate", "init_from"])
def test_a_base_that_was_changed_since_is_refused(tmp_path, capsys, trained, then):
    """Wherever it lies: a copy of it is as good."""
    base = tmp_path / "base"
    shutil.copytree(last(trained.full), base)
    run_folder = start(tmp_path, "--init_from", str(base), **LORA, num_rounds=1)
    base.rename(moved := tmp_path / "moved")
    typed = {
        "resume": ["train", "--resume", str(run_folder), "--num_rounds", "2", "--init_from", str(moved)],
        "evaluate": ["evaluate", str(last(run_folder, 1))],
        "init_from": arguments(folder_in(tmp_path, "next"), "--init_from", str(last(run_folder, 1)), **LORA),
    }[then]
    if then != "resume":  # they find it where it was
        moved.rename(base)
        moved = base
    weights = load_file(moved / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, moved / "model.safetensors")
    forget_launch()
    capsys.readouterr()
    assert main(typed) == 2
    assert "was trained on other weights than" in capsys.readouterr().err.splitlines()[-1]
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    forget_launch()
    assert main(typed) == 0


@pytest.mark.parametrize("then", ["resume", "evaluate", "init_from"])
@pytest.mark.parametrize("change", ["moved", "touched", "a row between"])
def test_a_base_whose_files_changed_is_told(tmp_path, caplog, trained, then, change):
    """Of its values only the first and last rows are compared, of its files also times and sizes."""
    base = tmp_path / "base"
    shutil.copytree(last(trained.full), base)
    run_folder = start(tmp_path, "--init_from", str(base), **LORA, num_rounds=1)
    if change == "touched":
        os.utime(base / "model.safetensors", (1, 1))
    elif change == "a row between":
        weights = load_file(base / "model.safetensors")
        weights["language_model.model.layers.0.mlp.up_proj.weight"][3] *= 2
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    base.rename(moved := tmp_path / "moved")
    named = ["--init_from", str(moved)]
    if then == "init_from":  # the checkpoint is named there, and names its own base
        moved.rename(base)
        moved, named = base, ["--init_from", str(last(run_folder, 1))]
    typed = {
        "resume": ["train", "--resume", str(run_folder), "--num_rounds", "2", *named],
        "evaluate": ["evaluate", str(last(run_folder, 1)), *named],
        "init_from": arguments(folder_in(tmp_path, "next"), *named, **LORA),
    }[then]
    caplog.clear()
    forget_launch()
    assert main(typed) == 0
    told = [message for message in caplog.messages if message.startswith(f"{last(run_folder, 1)}: ")]
    assert told == [
        f"{last(run_folder, 1)}: the files of {moved} have other times or sizes than when it was trained on "
        "them; the first and last row of every tensor are as they were, and no more was compared; if the "
        "files were not just copied or touched, put the earlier ones back."
    ] * (change != "moved")


def test_a_checkpoint_of_full_tuning_is_a_model_of_the_hub(trained):
    """Loaded by the Auto classes alone: bit for bit the run's own logits, at every exit."""
    fed = federation(trained.full.parent)
    own = fed.store.submodel(0, state(trained.full, 2), own=False).eval()
    loaded = AutoModelForImageTextToText.from_pretrained(last(trained.full)).eval()
    processor = AutoProcessor.from_pretrained(last(trained.full))
    inputs = fed.batchers["test"].training([0, 1, 2]).inputs
    with torch.no_grad():
        pairs = list(zip(loaded(**inputs).exit_logits, own(**inputs).exit_logits, strict=True))
    assert len(pairs) == 2 and all(torch.equal(mine, other) for mine, other in pairs)
    example = fed.data.splits["test"][0]
    prompt = fed.processor.encode_question(example.question)
    assert (
        processor.encode_question(example.question)
        == prompt
        == inputs["input_ids"][0, : len(prompt)].tolist()
    )
    pixels = processor(images=fed.data.read_image(example))["pixel_values"][0]
    assert torch.equal(pixels, inputs["pixel_values"][0])
