"""Laws of base stores: views of one base or slices of files, the same bits, no more memory than promised."""

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import RUN, batcher, model_file, processor, randomise
from plain import OneClient
from runs import (
    MODEL,
    arguments,
    environment,
    federation,
    forget_launch,
    largest_difference,
    records,
    resolved,
    same_bits,
    start,
    state,
    tree,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from scalefl.cli import main
from scalefl.contracts import InputError
from scalefl.engine.launch import Engine
from scalefl.federation import run as command
from scalefl.federation.start import start_from
from scalefl.models import files
from scalefl.models.build import ModelSource, check_weights, new_model
from scalefl.models.files import INDEX, SINGLE, TensorFiles, write_tensors
from scalefl.models.holding import DTYPES
from scalefl.models.minigptv2 import FAMILY
from scalefl.models.quantised import QuantisedLinear, QuantisedWeight
from scalefl.models.store import FileStore, ResidentStore, Store

CPU = torch.device("cpu")
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
SIZES = {"hidden_size": 64, "intermediate_size": 96}
"""NF4 packs 64 neighbours; three levels keep 2, 3 and 4 of 4 heads, and 48, 72 and 96 channels."""

HELD = (
    {"tuning": "lora"},
    {"tuning": "lora", "precision": "bf16"},
    {"tuning": "lora", "width_axes": "all"},
    {"tuning": "lora", "quantization": "nf4"},
    {"tuning": "lora", "quantization": "nf4", "double_quant": False, "precision": "bf16"},
    {"tuning": "lora", "quantization": "int8"},
    {"tuning": "lora", "quantization": "int8", "width_axes": "all", "precision": "bf16"},
    {"tuning": "full", "freeze_vit": True, "width_axes": "all", "precision": "bf16"},
)
"""Ways to hold a base; the towers are held in fp32, bf16 and fp16 in turn."""
TOWERS = ("fp32", "bf16", "fp16")

every_way = pytest.mark.parametrize(
    ("number", "options"),
    list(enumerate(HELD)),
    ids=[" ".join(str(value) for value in options.values()) for options in HELD],
)


def config() -> Any:
    file = model_file()
    return FAMILY.config(replace(file, text={**file.text, **SIZES}), processor())


@functools.cache
def whole_model() -> nn.Module:
    """Random weights, of which none is like another."""
    model = new_model(RUN, FAMILY, config())
    randomise(dict(model.named_parameters()))
    return model


def source(weights: Any, number: int = 0, **options: Any) -> ModelSource:
    """A model on its way into a store; from the memory of this process where `weights` are no files."""
    always = {"freeze_vit": True, "lora_targets": TARGETS, "zero_tails": False}
    run = replace(RUN, **(always | options))
    return ModelSource(
        run,
        FAMILY,
        config(),
        weights,
        from_scratch=not isinstance(weights, TensorFiles),
        vit_dtype=DTYPES[TOWERS[number % 3]],
    )


def in_memory() -> dict[str, nn.Parameter]:
    return dict(whole_model().named_parameters())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as transformers writes it, in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    model: Any = whole_model()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def frozen_parts(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a sub-model holds of a frozen weight."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, QuantisedLinear):
        return dict(module.named_parameters())
    return {"": model.get_parameter(name)}


@every_way
def test_a_resident_base_is_shared_by_every_level(number: int, options: dict[str, Any]) -> None:
    """Every frozen parameter of every sub-model begins where the base's does, and holds its type."""
    model = source(in_memory(), number, **options)
    store, trainable = model.resident(CPU), model.initial_state()
    seen = set()
    for level, part in store.models.slices.items():
        sub = store.submodel(level, trainable, own=True)
        for name, entry in part.base_plan.items():
            base = store.base[entry.global_name]
            held = base.tensors if isinstance(base, QuantisedWeight) else {"": base}
            parts = frozen_parts(sub, name)
            assert parts.keys() == held.keys()
            for key, tensor in parts.items():
                assert tensor.data_ptr() == held[key].data_ptr(), (name, key)
                assert tensor.untyped_storage().data_ptr() == held[key].untyped_storage().data_ptr()
                assert tensor.dtype == held[key].dtype and not tensor.requires_grad
                seen.add(tensor.dtype)
    kinds = {"nf4": {torch.uint8}, "int8": {torch.int8}}.get(options.get("quantization", ""), set())
    language = {DTYPES[options.get("precision", "fp32")]} if options["tuning"] == "lora" else set()
    assert seen >= kinds | language | {DTYPES[TOWERS[number % 3]]}


def bits(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything that a sub-model holds: type, shape and bytes."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (
            str(t.dtype),
            tuple(t.shape),
            t.requires_grad,
            t.detach().contiguous().view(torch.uint8).numpy().tobytes(),
        )
        for name, t in held.items()
    }


@pytest.mark.parametrize("read_from", ["scratch", "shards"])
@every_way
def test_a_base_in_files_gives_the_same_submodels(
    tmp_path: Path,
    sharded: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_from: str,
    number: int,
    options: dict[str, Any],
) -> None:
    """Bit for bit, whether the files are the model's own or were written for the store, in several parts."""
    monkeypatch.setattr(files, "SHARD_BYTES", 20_000)
    weights: Any = in_memory() if read_from == "scratch" else TensorFiles(sharded)
    resident, on_disk = source(in_memory(), number, **options), source(weights, number, **options)
    if on_disk.needs_folder:
        on_disk.write(tmp_path / "base", CPU)
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert on_disk.needs_folder == (read_from == "scratch" or "quantization" in options)
    state_ = resident.initial_state()
    assert same_bits(state_, on_disk.initial_state())
    one, other = resident.resident(CPU), on_disk.on_disk(CPU, tmp_path / "base")
    for level in (0, *one.models.levels):
        expected = bits(one.submodel(level, state_, own=True))
        assert expected and bits(other.submodel(level, state_, own=True)) == expected


def test_a_slice_of_a_file_is_a_slice_of_the_tensor(tmp_path: Path) -> None:
    """Prefixes, strided selections, both, and a scalar."""
    tensors = {"matrix": torch.arange(70.0).view(7, 10), "vector": torch.arange(5), "number": torch.tensor(3)}
    save_file(tensors, tmp_path / SINGLE)
    read = TensorFiles(tmp_path).read
    matrix, rows = tensors["matrix"], torch.tensor([0, 2, 5])
    assert torch.equal(read("matrix", (slice(0, 3), slice(0, 4))), matrix[:3, :4])
    assert torch.equal(read("matrix", (rows, slice(0, 4))), matrix[rows, :4])
    assert torch.equal(read("matrix", (slice(0, 3), rows)), matrix[:3][:, rows])
    assert torch.equal(read("vector", (slice(0, 2),)), tensors["vector"][:2])
    assert torch.equal(read("number", ()), tensors["number"])


def test_writing_spreads_tensors_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is begun that is larger than its share and one tensor."""
    monkeypatch.setattr(files, "SHARD_BYTES", 1000)
    tensors = {f"t{i}": torch.full((50 + i,), float(i)) for i in range(20)}
    write_tensors(tmp_path, iter(tensors.items()))
    got = TensorFiles(tmp_path)
    assert list(got) == list(tensors) and len(got) == 20
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    sizes = []
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sizes.append(sum(file.get_tensor(name).nbytes for name in file.keys()))  # noqa: SIM118  # no dict
    assert sum(sizes) == sum(t.nbytes for t in tensors.values())
    assert max(sizes) < 1000 + 4 * 70 and len(sizes) == 5


@pytest.mark.parametrize("break_it", ["missing", "no index", "index", "other index", "shard", "lost tensor"])
def test_a_broken_folder_is_one_line(tmp_path: Path, sharded: Path, break_it: str) -> None:
    for path in sharded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    index = json.loads((tmp_path / INDEX).read_text())
    named = shard.name
    if break_it == "missing":
        shard.unlink()
    elif break_it == "no index":
        (tmp_path / INDEX).unlink()
        named = SINGLE
    elif break_it == "index":
        (tmp_path / INDEX).write_text('{"weight_map": {')
        named = INDEX
    elif break_it == "other index":
        (tmp_path / INDEX).write_text("[]")
        named = INDEX
    elif break_it == "shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        index["weight_map"]["no.such.weight"] = shard.name
        (tmp_path / INDEX).write_text(json.dumps(index))
        named = "no.such.weight"
    with pytest.raises(InputError) as error:
        TensorFiles(tmp_path)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{tmp_path}: cannot read its weights (") and named in line
    assert line.endswith(f"expected {SINGLE}, or {INDEX} and its files.")


def test_weights_must_be_those_of_the_config(tmp_path: Path) -> None:
    """What is missing, unknown or of another shape, at once."""
    weights = {name: p.detach() for name, p in in_memory().items()}
    save_file(weights, tmp_path / SINGLE)
    check_weights(FAMILY, config(), TensorFiles(tmp_path))
    del weights["projector.bias"]
    weights["projector.weight"] = torch.zeros(3, 3)
    weights["other"] = torch.zeros(1)
    save_file(weights, tmp_path / SINGLE)
    with pytest.raises(InputError) as error:
        check_weights(FAMILY, config(), TensorFiles(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}: missing: projector.bias; unknown: other; of another shape: projector.weight; "
        "expected the weights of its config.json."
    )


@pytest.mark.parametrize("kind", ["resident", "file"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_tower_leaves_the_store(tmp_path: Path, kind: str, quantization: str) -> None:
    model = source(in_memory(), 2, tuning="lora", quantization=quantization)
    state_, store = model.initial_state(), stored(model, kind, tmp_path)
    tower: Any = store.vision_tower()
    inputs = batcher().training([0, 1, 2]).inputs
    with torch.no_grad():
        features = tower.vision_features(inputs["pixel_values"])
        before = store.submodel(1, state_, own=False).eval()(**inputs).exit_logits
    assert all(p.is_meta for n, p in tower.named_parameters() if not FAMILY.is_vision(n))
    vision = [weakref.ref(p) for n, p in tower.named_parameters() if FAMILY.is_vision(n)]
    vision += [weakref.ref(t) for n, t in getattr(store, "base", {}).items() if FAMILY.is_vision(n)]
    assert len(vision) > 20 and all(reference() is not None for reference in vision)
    store.drop_vision()
    del tower, model
    gc.collect()
    assert not any(reference() is not None for reference in vision)
    for level in (0, *store.models.levels):
        sub: Any = store.submodel(level, state_, own=True)
        assert sub.vision_model is None and not any(FAMILY.is_vision(n) for n, _ in sub.named_parameters())
    without = {n: t for n, t in inputs.items() if n != "pixel_values"} | {"image_features": features}
    with torch.no_grad():
        after = store.submodel(1, state_, own=False).eval()(**without).exit_logits
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def stored(model: ModelSource, kind: str, folder: Path) -> Store:
    if kind == "resident":
        return model.resident(CPU)
    model.write(folder, CPU)
    return model.on_disk(CPU, folder)


def wide_source(folder: Path, quantization: str) -> ModelSource:
    """A model of 150 MB in fp32, in the files of this folder, held as bf16 and what is quantised."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3}
    file = model_file()
    wide = FAMILY.config(replace(file, text={**file.text, **sizes}), processor())
    if not (folder / SINGLE).exists():
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in FAMILY.new_model(wide).named_parameters()}
        save_file({name: torch.full(shape, 0.01) for name, shape in shapes.items()}, folder / SINGLE)
    held = {"tuning": "lora", "freeze_vit": True, "precision": "bf16", "quantization": quantization}
    run = replace(RUN, **held, vertical_scale_ratios=(0.25, 0.5, 1.0))
    return ModelSource(run, FAMILY, wide, TensorFiles(folder))


def anonymous_bytes() -> int:
    """This process's memory that is no file's pages."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measure(folder: str, quantization: str, moves: bool) -> None:
    """Print the peak of anonymous memory while a level is loaded, and the bytes of its base and of it all."""
    torch.set_num_threads(1)
    model = wide_source(Path(folder), quantization)
    store, trainable = model.on_disk(CPU, Path(folder) / "base"), model.initial_state()
    store.models.empty(1)  # what is imported at first use is not the level's

    def onto_device(parameter: nn.Parameter) -> None:
        parameter.data = parameter.data.clone()

    for level in (1, 3):
        seen = [anonymous_bytes()]
        done = threading.Event()

        def watch(seen: list[int] = seen, done: threading.Event = done) -> None:
            while not done.is_set():
                seen.append(anonymous_bytes())
                time.sleep(0.0002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        sub = store.submodel(level, trainable, own=False, place=onto_device if moves else None)
        seen.append(anonymous_bytes())  # on a busy machine the thread may have slept through it all
        done.set()
        watcher.join()
        whole = sum(p.nbytes for p in sub.parameters())
        print(max(seen) - seen[0], whole - store.models.slice_bytes(level), whole)
        del sub


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "moves"), [("none", False), ("nf4", False), ("nf4", True)])
def test_a_level_is_loaded_in_its_own_memory_and_that_of_one_tensor(
    tmp_path: Path, quantization: str, moves: bool
) -> None:
    """Peak of a process's anonymous memory: fp32 files read as bf16, so that all of a level is copied.

    Packed weights are what is in the files, unless a parameter moves as it is read, as onto a GPU. File pages
    are left out: the system takes them back as it likes. A thread samples every 0.2 ms, and the copy of a
    large tensor takes longer; the whole model, loaded next, shows that it would see more.
    """
    model, read_from = wide_source(tmp_path, quantization), tmp_path
    assert (tmp_path / SINGLE).stat().st_size > 140e6
    if model.needs_folder:
        model.write(read_from := tmp_path / "base", CPU)
    assert model.needs_folder == (quantization != "none")
    largest = max(tensor.nbytes for tensor in TensorFiles(read_from).values())
    path = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"
    work = f"import test_stores; test_stores.measure({str(tmp_path)!r}, {quantization!r}, {moves})"
    done = subprocess.run(
        [sys.executable, "-c", work],
        env=environment(PYTHONPATH=path),
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    (peak, frozen, level), (whole_peak, whole_frozen, _) = rows
    assert peak <= level + largest, done.stdout
    if moves or quantization == "none":
        assert 0.8 * frozen <= peak, done.stdout
        assert whole_peak >= 0.8 * whole_frozen > 3 * (level + largest), done.stdout


WIDE = {"text": MODEL["text"] | {"hidden_size": 64}}
LORA = {"tuning": "lora", "lora_targets": ["q_proj", "o_proj"], "feature_cache": "off"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: the end of a run that trained all of it."""
    run_folder = start(tmp_path_factory.mktemp("saved"), model=WIDE, num_rounds=1)
    return run_folder / "checkpoints" / "round-0001"


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("begins", ["from scratch", "from a folder"])
def test_a_run_from_files_is_the_run_from_memory(
    tmp_path: Path, saved: Path, begins: str, quantization: str
) -> None:
    """Bit for bit, evaluations too; also where it stopped after a round and was resumed, on the same base."""
    typed = ["--init_from", str(saved)] if begins == "from a folder" else []
    options = {**LORA, "quantization": quantization}
    folders = {name: tmp_path / name for name in ("resident", "file", "stopped")}
    for folder in folders.values():
        folder.mkdir()
    resident = start(folders["resident"], *typed, model=WIDE, **options)
    whole = start(folders["file"], *typed, model=WIDE, **options, base_store="file")
    stopped = start(folders["stopped"], *typed, model=WIDE, **options, base_store="file", num_rounds=1)
    base = tree(stopped / "base")
    assert bool(base) == (begins == "from scratch" or quantization == "nf4")
    forget_launch()
    assert main(["train", "--resume", str(stopped), "--num_rounds", "2"]) == 0
    assert tree(stopped / "base") == base  # not even written again
    assert same_bits(state(resident, 2), state(whole, 2)) and records(resident) == records(whole)
    assert same_bits(state(stopped, 2), state(whole, 2))
    assert not same_bits(state(whole, 1), state(whole, 2))


def test_adapters_go_on_upon_a_base_in_files(tmp_path: Path) -> None:
    """A checkpoint of adapters brings no base: it is made again, of the earlier run's seed."""
    earlier = start(tmp_path, model=WIDE, **LORA, num_rounds=1, seed=3) / "checkpoints" / "round-0001"
    options = {**LORA, "init_from": str(earlier), "quantization": "nf4", "save_path": str(tmp_path / "next")}
    feds = [federation(tmp_path, WIDE, **options, base_store=kind) for kind in ("resident", "file")]
    assert same_bits(feds[0].initial_state, feds[1].initial_state)
    assert same_bits(feds[0].initial_state, load_file(earlier / SINGLE))
    for level in (0, 1, 2):
        one, other = (bits(fed.store.submodel(level, fed.initial_state, own=True)) for fed in feds)
        assert one == other
    assert (tmp_path / "next" / "base").is_dir()


def prepared(folder: Path, **options: Any) -> Path:
    """The base of a run that got no further than that."""
    federation(folder, WIDE, **({**LORA, "base_store": "file"} | options))
    return folder / "run" / "base"


@pytest.mark.parametrize(
    "changed",
    [{"quantization": "int8"}, {"seed": 1}, {"precision": "bf16"}, {"lora_targets": ["v_proj"]}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_base_of_other_options_is_not_taken(tmp_path: Path, changed: dict[str, Any]) -> None:
    """A run that died before its first round leaves one, and another run may take its folder."""
    (tmp_path / "fresh").mkdir()
    first = tree(prepared(tmp_path, quantization="nf4"))
    assert tree(prepared(tmp_path, quantization="nf4")) == first
    options = {"quantization": "nf4"} | changed
    again = load_all(prepared(tmp_path, **options))
    expected = load_all(prepared(tmp_path / "fresh", **options))
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def load_all(folder: Path) -> dict[str, Tensor]:
    return dict(TensorFiles(folder))


@pytest.mark.parametrize("leftover", [".base.tmp", "base"])
def test_half_a_base_is_replaced(tmp_path: Path, leftover: str) -> None:
    """Whatever a process that was killed while it wrote left behind."""
    (tmp_path / "fresh").mkdir()
    half = tmp_path / "run" / leftover
    half.mkdir(parents=True)
    (half / "model-00000.safetensors").write_bytes(b"half")
    (half / "model-00099.safetensors").write_bytes(b"half")
    base, fresh = prepared(tmp_path), prepared(tmp_path / "fresh")
    assert {name: content for name, (_, content) in tree(base).items()} == {
        name: content for name, (_, content) in tree(fresh).items()
    }
    assert not (tmp_path / "run" / ".base.tmp").exists()


def test_other_weights_in_the_same_folder_make_another_base(tmp_path: Path, saved: Path) -> None:
    source_folder = tmp_path / "source"
    shutil.copytree(saved, source_folder)
    options = {"quantization": "int8", "init_from": str(source_folder)}
    before = load_all(prepared(tmp_path, **options))
    weights, name = load_file(source_folder / SINGLE), "language_model.model.layers.0.mlp.up_proj.weight"
    weights[name][3] *= 2
    save_file(weights, source_folder / SINGLE, metadata={"format": "pt"})
    after = load_all(prepared(tmp_path, **options))
    scales = after[f"{name}/scales"] / before[f"{name}/scales"]
    assert float(scales[3]) == 2.0 and int((scales != 1.0).sum()) == 1


def run_on_quantised_files(folder: Path, saved: Path) -> tuple[Path, Path]:
    """A run whose base was quantised from a copy of `saved` into its own folder; and the copy."""
    shutil.copytree(saved, folder / "source")
    options = {**LORA, "quantization": "int8", "base_store": "file", "num_rounds": 1}
    return start(folder, "--init_from", str(folder / "source"), model=WIDE, **options), folder / "source"


@pytest.mark.parametrize("then", ["resume", "evaluate", "init_from"])
def test_a_base_that_is_refused_is_not_written(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture, then: str
) -> None:
    """The run keeps the one that it was trained on."""
    run_folder, source_folder = run_on_quantised_files(tmp_path, saved)
    weights, before = load_file(source_folder / SINGLE), tree(run_folder)
    changed = {name: 2 * tensor for name, tensor in weights.items()}
    save_file(changed, source_folder / SINGLE, metadata={"format": "pt"})
    checkpoint = str(run_folder / "checkpoints" / "round-0001")
    (tmp_path / "next").mkdir()
    options = {**LORA, "quantization": "int8", "base_store": "file"}
    typed = {
        "resume": ["train", "--resume", str(run_folder), "--num_rounds", "2"],
        "evaluate": ["evaluate", checkpoint],
        "init_from": arguments(tmp_path / "next", "--init_from", checkpoint, model=WIDE, **options),
    }[then]
    forget_launch()
    assert main(typed) == 2
    assert "was trained on other weights than" in capsys.readouterr().err.splitlines()[-1]
    assert tree(run_folder) == before and not (tmp_path / "next" / "run").exists()


def evaluated(capsys: pytest.CaptureFixture, checkpoint: Path, *typed: str) -> str:
    """What an evaluation prints."""
    forget_launch()
    capsys.readouterr()
    assert main(["evaluate", str(checkpoint), *typed]) == 0
    return capsys.readouterr().out


def test_an_evaluation_on_another_base_leaves_the_runs(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds its own for as long as it takes; of two at once, each its own."""
    run_folder, _ = run_on_quantised_files(tmp_path, saved)
    before, checkpoint = tree(run_folder), run_folder / "checkpoints" / "round-0001"
    own = evaluated(capsys, checkpoint)
    expected = evaluated(capsys, checkpoint, "--precision", "bf16", "--base_store", "resident")
    assert expected != own
    first = command.evaluate_levels
    meanwhile = []

    def within(*args: Any) -> Any:
        monkeypatch.setattr(command, "evaluate_levels", first)
        meanwhile.append(evaluated(capsys, checkpoint, "--precision", "bf16"))
        meanwhile.append(evaluated(capsys, checkpoint))
        return first(*args)

    monkeypatch.setattr(command, "evaluate_levels", within)
    assert evaluated(capsys, checkpoint, "--precision", "bf16") == expected
    assert meanwhile == [expected, own]
    assert tree(run_folder) == before


def test_an_evaluation_that_is_stopped_takes_its_base_along(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder, _ = run_on_quantised_files(tmp_path, saved)
    before, held = tree(run_folder), []

    def stop(*_: Any) -> None:
        held.append(set(tree(run_folder)) - set(before))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate_levels", stop)
    forget_launch()
    typed = ["--precision", "bf16"]
    assert main(["evaluate", str(run_folder / "checkpoints" / "round-0001"), *typed]) == 130
    assert held[0] and tree(run_folder) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors reports it: the system's error in its text alone."""

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    forget_launch()
    assert main(arguments(tmp_path, model=WIDE, **LORA, base_store="file")) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"scalefl: {tmp_path / 'run' / 'base'}: No space left on device; free some space")
    assert not (tmp_path / "run").exists()


def test_zero_3_takes_no_resident_base(tmp_path: Path) -> None:
    run, file = resolved(tmp_path, **LORA, base_store="resident")
    engine: Any = SimpleNamespace(device=CPU, shards_weights=True, is_main=True)
    with pytest.raises(InputError) as error:
        start_from(run, file, FAMILY, ["a question", *run.answers], engine)
    assert str(error.value) == (
        "--base_store: got resident, but ZeRO-3 spreads weights over the processes as they are read from "
        "files; expected file or auto, or ZeRO-2."
    )


def test_zero_3_alone_reads_files_by_itself(tmp_path: Path) -> None:
    run, file = resolved(tmp_path, **LORA)
    for shards, kind in ((False, ResidentStore), (True, FileStore)):
        engine: Any = SimpleNamespace(device=CPU, shards_weights=shards, is_main=True, gather=list)
        store = start_from(run, file, FAMILY, ["a question", *run.answers], engine).store
        assert type(store) is kind


SUM_ORDER = 2e-6
"""fp32 sums of some hundred terms of size 1 in another order, 100 x 2^-24, in a few steps of rate 0.05."""


@pytest.fixture
def eager_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the model was training, at every call of the plain attention."""
    calls: list[bool] = []
    plain = modeling_llama.eager_attention_forward

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module.training)
        return plain(module, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counted)
    return calls


def test_eager_attention_trains_as_sdpa(tmp_path: Path, eager_calls: list[bool]) -> None:
    sdpa = OneClient(tmp_path, attn="sdpa")
    expected = sdpa.train(sdpa.task())
    assert not eager_calls
    eager = OneClient(tmp_path, attn="eager")
    got = eager.train(eager.task())
    assert eager_calls and all(eager_calls)
    assert largest_difference(got, expected) <= SUM_ORDER
    assert max(float(t.abs().max()) for t in expected.values()) > 1000 * SUM_ORDER


def test_attention_is_a_submodels_own(tmp_path: Path, eager_calls: list[bool]) -> None:
    """One that is made for evaluation, whose kernel is sdpa, leaves that of one in training as it is."""
    client = OneClient(tmp_path, attn="eager")
    inputs = client.batcher.training([0, 1]).inputs
    training, evaluated = (client.fed.store.submodel(1, client.state, own=own) for own in (True, False))
    with torch.no_grad():
        evaluated.eval()(**inputs)
        assert not eager_calls
        training.train()(**inputs)
        assert len(eager_calls) == 1  # level 1 has one layer


def test_flash_attention_needs_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    forget_launch()
    assert main(arguments(tmp_path, "--attn", "flash_attention_2", "--precision", "bf16")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "scalefl: --attn flash_attention_2: needs a CUDA GPU (this is cpu) and the package flash-attn (it is "
        "not installed); expected sdpa, which takes the fastest kernel that PyTorch has itself."
    )


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, set()),
        ({"gradient_checkpointing": True}, {1, 2}),
        ({"gradient_checkpointing": True, "checkpointing_levels": [2]}, {2}),
    ],
    ids=["off", "on", "level 2"],
)
def test_checkpointing_is_of_its_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], levels: set[int]
) -> None:
    """Level 1 has one layer, level 2 two. What is trained is the same, bit for bit."""
    seen: dict[int, set[bool]] = {}
    prepare = Engine.session

    def watched(self: Engine, model: Any, run: Any) -> Any:
        layers = model.language_model.model.layers
        seen.setdefault(len(layers), set()).update(layer.gradient_checkpointing for layer in layers)
        return prepare(self, model, run)

    monkeypatch.setattr(Engine, "session", watched)
    (tmp_path / "plain").mkdir()
    plain = start(tmp_path / "plain", **LORA, num_rounds=1)
    seen.clear()
    run_folder = start(tmp_path, **LORA, **options, num_rounds=1)
    assert seen == {level: {level in levels} for level in (1, 2)}
    assert same_bits(state(run_folder, 1), state(plain, 1))


def test_client_levels_decide_who_trains_what(tmp_path: Path) -> None:
    run_folder = start(tmp_path, client_levels=[2, 1, 1, 2], client_split_ratios=[1.0, 0.0], num_rounds=1)
    levels = {client["client"]: client["level"] for client in records(run_folder)[0]["clients"]}
    assert levels == {0: 2, 1: 1, 2: 1, 3: 2}
