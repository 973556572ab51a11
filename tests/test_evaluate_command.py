"""`scalefl evaluate`: what a run reported of a checkpoint, adapters too; by level's own data; elsewhere."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from runs import federation, forget_launch, start, tree
from safetensors.torch import load_file

from scalefl.cli import main
from scalefl.engine.launch import Engine
from scalefl.evaluate import Evaluator
from scalefl.federation import run as command
from scalefl.models.minigptv2 import FAMILY, MiniGPTv2Processor


def evaluate(capsys, checkpoint, *typed):
    """What the command prints."""
    forget_launch()
    capsys.readouterr()
    assert main(["evaluate", str(checkpoint), *typed]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def rows(shown, split):
    """(level, exit) -> its other cells, of the table of one split."""
    table = shown.partition(f" {split}, ")[2].partition(", by rank")[2]
    table = table.partition(" val, ")[0].partition(" test, ")[0]
    cells = [line.split() for line in table.splitlines() if line.split()[:1] == ["level"]]
    return {(c[1], int(c[2])): c[3:] for c in cells if c[1].isdecimal()}


def cells(levels):
    """The same of a run's results."""
    names = ("balanced_accuracy", "accuracy", "kappa", "mae", "loss")
    return {
        (level, exit): ["-" if m[name] is None else f"{m[name]:.3f}" for name in names] + [str(m["count"])]
        for level, exits in levels.items()
        for exit, m in enumerate(exits, start=1)
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of both tunings, and one evaluated by each level's own data."""
    runs = {}
    for name, options in {
        "full": {},
        "lora": {"tuning": "lora"},
        "local": {"evalmode": "local", "num_patients": 60},
    }.items():
        folder = tmp_path_factory.mktemp(name)
        runs[name] = SimpleNamespace(folder=start(folder, **options))
        runs[name].results = json.loads((runs[name].folder / "results.json").read_text())
        runs[name].checkpoint = (
            runs[name].folder / "checkpoints" / f"round-{runs[name].results['selected_round']:04d}"
        )
    return SimpleNamespace(**runs)


@pytest.mark.parametrize("name", ["full", "lora", "local"])
def test_a_checkpoint_gives_the_runs_results_again(capsys, trained, name):
    run = getattr(trained, name)
    before = tree(run.folder)
    shown = evaluate(capsys, run.checkpoint)
    assert rows(shown, "test") == cells(run.results["levels"])
    assert rows(shown, "val").keys() == rows(shown, "test").keys()
    assert tree(run.folder) == before


def test_local_mode_may_be_asked_for_afterwards_and_given_up(capsys, trained):
    """The levels' own parts make up the test split, which every level gets in global mode."""
    local = rows(evaluate(capsys, trained.local.checkpoint), "test")
    everything = rows(evaluate(capsys, trained.local.checkpoint, "--evalmode", "global"), "test")
    count = {int(row[-1]) for row in everything.values()}
    assert len(count) == 1 and sum(int(local[level, 1][-1]) for level in ("1", "2")) == count.pop()
    again = rows(evaluate(capsys, trained.full.checkpoint, "--evalmode", "local"), "test")
    assert sum(int(row[-1]) for (_, exit), row in again.items() if exit == 1) == 8


@pytest.fixture
def elsewhere(tmp_path):
    """Three annotated images of one hospital, to test on alone; their question is none the run knew."""
    (folder := tmp_path / "hospital" / "image").mkdir(parents=True)
    records = []
    for i in range(3):
        Image.new("L", (40, 30), 60 * (i + 1)).save(folder / f"{i}.png")
        record = {"image": f"{i}.png", "question": "Zzz qqq zzz qqq zzz qqq?", "label": i, "patient": f"p{i}"}
        records.append(record | {"split": "test"})
    (folder.parent / "knee_x_ray.json").write_text(json.dumps(records))
    return folder.parent


@pytest.mark.parametrize("name", ["full", "lora"])
def test_another_data_set_needs_test_images_alone(capsys, trained, elsewhere, name):
    typed = ["--data", "kneexray", "--data_root", str(elsewhere)]
    shown = evaluate(capsys, getattr(trained, name).checkpoint, *typed)
    table = rows(shown, "test")
    assert table.keys() == {("1", 1), ("2", 1), ("2", 2)}
    assert {row[-1] for row in table.values()} == {"3"}
    assert rows(shown, "val") == {}


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_tokenizer_is_the_checkpoints(capsys, trained, elsewhere, monkeypatch, name):
    """Another one, trained on these questions, would give the model ids it has never seen."""
    seen = []
    evaluate_levels = command.evaluate_levels
    monkeypatch.setattr(
        command, "evaluate_levels", lambda fed, *args: seen.append(fed) or evaluate_levels(fed, *args)
    )
    checkpoint = getattr(trained, name).checkpoint
    evaluate(capsys, checkpoint, "--data", "kneexray", "--data_root", str(elsewhere))
    vocabulary = MiniGPTv2Processor.from_pretrained(checkpoint).tokenizer.get_vocab()
    assert seen and all(fed.processor.tokenizer.get_vocab() == vocabulary for fed in seen)
    own = FAMILY.processor(seen[0].model_file, ["Zzz qqq zzz qqq zzz qqq?"])
    assert own.tokenizer.get_vocab() != vocabulary


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_level_is_evaluated_on_the_engines_device_alone(tmp_path, monkeypatch, tuning):
    """Of an engine on the meta device; the trainable state comes from the CPU, as in a run."""
    monkeypatch.setattr(Engine, "device", torch.device("meta"))
    fed = federation(tmp_path, tuning=tuning, feature_cache="off")  # which the meta device cannot fill
    devices = []

    def look(self, model, ids):
        devices.append({p.device.type for p in model.parameters()})
        return [([0] * len(model.config.exit_layers), [1.0] * len(model.config.exit_layers), [1] * 2)] * len(
            ids
        )

    monkeypatch.setattr(Evaluator, "_closed", look)
    for level in (1, 2):
        fed.evaluators["test"].level(level, fed.initial_state, range(8))
    assert devices == [{"meta"}] * 2
    assert {tensor.device.type for tensor in fed.initial_state.values()} == {"cpu"}


def test_a_checkpoint_of_adapters_is_small(trained):
    """What is not trained is not in it: no embedding and no tower."""
    held = load_file(trained.lora.checkpoint / "model.safetensors")
    assert not [name for name in held if "embed" in name or name.startswith("vision_model.")]


def test_how_a_run_was_trained_does_not_bind_its_evaluation(capsys, trained, tmp_path, monkeypatch):
    """A kernel, an optimizer that this machine lacks; another place for the base, beside the checkpoint."""
    shutil.copytree(trained.lora.folder, tmp_path / "run")
    checkpoint = tmp_path / "run" / trained.lora.checkpoint.relative_to(trained.lora.folder)
    for file in (tmp_path / "run" / "run.json", checkpoint / "run.json"):
        saved = json.loads(file.read_text())
        saved["run"] |= {"attn": "flash_attention_2", "optimizer": "paged_adamw_8bit", "momentum": 0.0}
        saved["run"]["save_path"] = "elsewhere"
        file.write_text(json.dumps(saved))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for typed in ([], ["--base_store", "file", "--feature_cache", "file"], ["--feature_cache", "off"]):
        shown = evaluate(capsys, checkpoint, *typed)
        assert rows(shown, "test") == cells(trained.lora.results["levels"])
    assert list((tmp_path / "here").iterdir()) == []
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {path.name for path in trained.lora.folder.iterdir()} | {"features"}
