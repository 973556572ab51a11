"""A frozen tower is asked once for each image: the same bits whoever asks, and no row that is not whole."""

import dataclasses
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_store, examples, processor, whole_model
from runs import (
    MODEL,
    arguments,
    federation,
    forget_launch,
    largest_difference,
    records,
    same_bits,
    start,
    state,
    tree,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalefl import features
from scalefl.batches import Batcher
from scalefl.cli import main
from scalefl.contracts import InputError
from scalefl.features import FEATURE_BATCH, FrozenTower, keep_in_files, keep_in_memory, tower_fingerprint
from scalefl.models.minigptv2 import MiniGPTv2ForConditionalGeneration

COUNT = 2 * FEATURE_BATCH + 3
"""Two batches and a part of a third."""

FP32 = {"rtol": 1e-4, "atol": 1e-4}
"""Logits up to 10 after some hundred fp32 operations in another order; a wrong image adds 0.1."""


class OneOf:
    """An engine's ranks, each a thread; without others, one process."""

    def __init__(self, rank: int = 0, meeting: threading.Barrier | None = None, shared: Any = None) -> None:
        self.rank, self._meeting, self._shared = rank, meeting, shared
        self.is_main, self.num_processes = rank == 0, 1 if meeting is None else meeting.parties

    def barrier(self) -> None:
        if self._meeting is not None:
            self._meeting.wait(20)

    def _all(self, mine: Any) -> list[Any]:
        if self._meeting is None:
            return [mine]
        self._shared[self.rank] = mine
        self.barrier()
        everyone = [self._shared[rank] for rank in range(self.num_processes)]
        self.barrier()
        return everyone

    def share(self, items: Any) -> Any:
        each = -(-len(items) // self.num_processes)
        return items[self.rank * each : (self.rank + 1) * each]

    def gather(self, rows: list[Any]) -> list[Any]:
        return [row for part in self._all(rows) for row in part]

    def gather_tensor(self, mine: Tensor) -> list[Tensor]:
        return self._all(mine)


def on_ranks(count: int, work: Callable[[Any], Any]) -> list[Any]:
    """What `work` returns on each of `count` ranks."""
    meeting, shared, results = threading.Barrier(count), {}, {}  # type: ignore[var-annotated]

    def run(rank: int) -> None:
        try:
            results[rank] = work(OneOf(rank, meeting, shared))
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[rank] for rank in range(count)]


def pictures(count: int = COUNT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (count, 1, 28, 28)
    return dict(
        zip(
            (f"i{i}" for i in range(count)),
            torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            strict=True,
        )
    )


@pytest.fixture(scope="module")
def model() -> Any:
    """The tiny model, whole, with a tower of random weights."""
    return whole_model(build_store(tuning="lora"))


class Tower:
    """A `FrozenTower` of the model, and how often it was asked."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32, fails_at: int = 0) -> None:
        self.calls: list[int] = []

        def encode(pixels_bchw: Tensor) -> Tensor:
            self.calls.append(len(pixels_bchw))
            if len(self.calls) == fails_at:
                raise KeyboardInterrupt
            with torch.inference_mode():
                return model.vision_features(pixels_bchw)

        self.frozen = FrozenTower(normalise=processor().normalise, encode=encode, dtype=dtype)


def in_memory(tower: Tower, images: dict[str, Tensor], engine: Any = None) -> dict[str, Tensor]:
    return keep_in_memory(images.items(), len(images), tower.frozen, engine or OneOf())  # type: ignore[arg-type]


def in_files(
    tower: Tower, images: dict[str, Tensor], folder: Path, engine: Any = None, fingerprint: str = "a tower"
) -> dict[str, Tensor]:
    """Copies of the rows: a test may damage the file that they are mapped from."""
    rows = keep_in_files(images.items(), tower.frozen, engine or OneOf(), folder, fingerprint)  # type: ignore[arg-type]
    return {key: row.clone() for key, row in rows.items()}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def batches_of(images: dict[str, Tensor], features: dict[str, Tensor] | None) -> Batcher:
    pixels = {} if features is not None else images
    return Batcher(processor(), examples(len(images)), pixels, torch.device("cpu"), features)


def test_features_in_place_of_pixels_give_the_same_logits(model: Any) -> None:
    """Bit for bit in a batch of the same shape; else the tower's sums come in another order."""
    images = pictures()
    by_pixels = batches_of(images, None)
    by_features = batches_of(images, in_memory(Tower(model), images))
    for ids, exact in ((range(FEATURE_BATCH), True), ([3, 18], False)):
        expected, got = by_pixels.training(ids), by_features.training(ids)
        assert "pixel_values" not in got.inputs
        with torch.no_grad():
            pairs = zip(model(**expected.inputs).exit_logits, model(**got.inputs).exit_logits, strict=True)
            for right, mine in pairs:
                assert not exact or torch.equal(right, mine)
                torch.testing.assert_close(mine, right, **FP32)


def test_features_can_be_trained_on(model: Any) -> None:
    """The tower runs in inference mode, whose tensors no gradient may pass."""
    built, images = build_store(tuning="lora"), pictures()
    trained = built.store.submodel(2, built.state, own=True)
    inputs = batches_of(images, in_memory(Tower(model), images)).training([0, 1]).inputs
    sum(z.square().sum() for z in trained(**inputs).exit_logits).backward()
    assert trained.projector.weight.grad.any()


@pytest.mark.parametrize("count", [1, FEATURE_BATCH, COUNT])
def test_the_tower_sees_batches_of_one_size_and_each_image_once(model: Any, count: int) -> None:
    tower, images = Tower(model), pictures(count)
    rows = in_memory(tower, images)
    assert tower.calls == [FEATURE_BATCH] * -(-count // FEATURE_BATCH)
    assert list(rows) == list(images) and rows["i0"].shape == (4, 4 * 32)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_number_of_ranks_does_not_change_a_bit(model: Any, tmp_path: Path, ranks: int) -> None:
    images = pictures()
    expected = in_memory(Tower(model), images)
    towers = [Tower(model) for _ in range(ranks)]
    for rows in on_ranks(ranks, lambda engine: in_memory(towers[engine.rank], images, engine)):
        assert list(rows) == list(images) and same_bits(rows, expected)
    towers = [Tower(model) for _ in range(ranks)]
    for rows in on_ranks(ranks, lambda e: in_files(towers[e.rank], images, tmp_path, e)):
        assert same_bits(rows, expected)
    assert sum(len(tower.calls) for tower in towers) == 3, "each batch is computed by one rank"
    assert same_bits(in_files(Tower(model), images, tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_kept_in_the_type_asked_for(model: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    images = pictures()
    wide, memory = in_memory(Tower(model), images), in_memory(Tower(model, dtype), images)
    disk = in_files(Tower(model, dtype), images, tmp_path)
    for key, row in wide.items():
        assert torch.equal(memory[key], row.to(dtype)) and torch.equal(disk[key], row.to(dtype))


def test_features_that_a_type_cannot_hold_are_refused(model: Any) -> None:
    """fp16 ends at 65504."""
    tower = FrozenTower(
        normalise=processor().normalise, encode=lambda x: x.flatten(2) + 1e5, dtype=torch.float16
    )
    with pytest.raises(InputError, match="--feature_dtype: .* not finite in float16; expected a wider type"):
        keep_in_memory(pictures(1).items(), 1, tower, OneOf())  # type: ignore[arg-type]


def test_many_features_in_memory_are_warned_of(model: Any, monkeypatch: Any, caplog: Any) -> None:
    images = pictures()
    in_memory(Tower(model), images)
    assert caplog.messages == []
    rows_bytes = next(iter(in_memory(Tower(model), images).values())).nbytes * len(images)
    monkeypatch.setattr("scalefl.features.MUCH_MEMORY", rows_bytes - 1)
    in_memory(Tower(model), images)
    (message,) = caplog.messages
    assert message.startswith(f"features of {COUNT} images take 0.0 GB") and "--feature_cache file" in message


def test_a_second_run_does_not_ask_the_tower(model: Any, tmp_path: Path) -> None:
    images, second = pictures(), Tower(model)
    first = in_files(Tower(model), images, tmp_path)
    before = tree(tmp_path)
    assert same_bits(in_files(second, images, tmp_path), first)
    backwards = dict(reversed(images.items()))
    assert same_bits(in_files(second, backwards, tmp_path), first)
    assert second.calls == [] and tree(tmp_path) == before


def test_images_that_are_alike_share_a_row(model: Any, tmp_path: Path) -> None:
    images = {"a": pictures(1)["i0"], "b": pictures(1)["i0"].clone()}
    rows = in_files(Tower(model), images, tmp_path)
    assert torch.equal(rows["a"], rows["b"]) and len(load_file(files(tmp_path)[0])) == 1


def test_a_changed_image_is_computed_anew_and_no_other(model: Any, tmp_path: Path) -> None:
    images = pictures()
    first = in_files(Tower(model), images, tmp_path)
    images["i5"] = images["i5"].clone()
    images["i5"][0, 3, 3] ^= 1
    again = Tower(model)
    rows = in_files(again, images, tmp_path)
    assert again.calls == [FEATURE_BATCH]
    assert not torch.equal(rows.pop("i5"), first.pop("i5")) and same_bits(rows, first)


def fingerprint(model: Any, settings: str = "{}", dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    tower = dataclasses.replace(Tower(model, dtype).frozen, **changes)
    return tower_fingerprint(settings, tower, dict(model.vision_model.named_parameters()))


def test_everything_that_changes_what_a_tower_says_changes_its_fingerprint() -> None:
    built = build_store(tuning="lora")
    model: Any = whole_model(built)
    family, config = built.store.models.family, built.store.models.config
    seen = {fingerprint(model)}
    assert fingerprint(whole_model(build_store(tuning="lora"))) in seen
    seen.add(fingerprint(model, dtype=torch.bfloat16))
    seen.add(fingerprint(model, normalise=lambda image: processor().normalise(image) * 1.01))
    for change in ({"image_size": 56}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}, {}):
        other = type(config).from_dict(config.to_dict())
        for name, value in change.items():
            setattr(other.vision_config, name, value)
        seen.add(fingerprint(model, str(family.vision_settings(other))))
    with torch.no_grad():
        model.vision_model.post_layernorm.bias[0] += 1e-6
    seen.add(fingerprint(model))
    seen.add(fingerprint(model.to(torch.float16)))
    assert len(seen) == 9


def test_another_tower_does_not_find_the_rows(model: Any, tmp_path: Path) -> None:
    images, other = pictures(2), Tower(model)
    in_files(Tower(model), images, tmp_path)
    in_files(other, images, tmp_path, fingerprint="another")
    assert other.calls == [FEATURE_BATCH]
    (old, new) = files(tmp_path)
    moved = new.with_name(f"{'0' * 32}.safetensors")
    new.rename(moved)
    old.rename(new.with_name(old.name))  # rows know their tower wherever their file is put
    in_files(other, images, tmp_path, fingerprint="another")
    assert other.calls == [FEATURE_BATCH], "a whole file of one's own is found under any name"


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def foreign(path: Path) -> None:
    path.write_bytes(b"PK not ours")


def without_digests(path: Path) -> None:
    save_file(load_file(path), path)


def half_zero(path: Path) -> None:
    """As a file system leaves a file whose length was written and whose data was not."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


DAMAGES = (shorten, empty, flip, foreign, without_digests, half_zero)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_file_that_is_not_whole_is_not_used(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    images, again = pictures(), Tower(model)
    first = in_files(Tower(model), images, tmp_path)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    damage(files(tmp_path)[1])
    assert same_bits(in_files(again, images, tmp_path), first)
    assert again.calls == [FEATURE_BATCH]
    assert [str(files(tmp_path)[1]) in record.message for record in caplog.records] == [True]
    assert {path: path.read_bytes() for path in files(tmp_path)} == before, "mended"


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.os, at, full)
    with pytest.raises(OSError, match="safetensors"):
        in_files(Tower(model), pictures(1), tmp_path)
    assert tree(tmp_path) == {}


def test_a_killed_write_is_not_read(model: Any, tmp_path: Path) -> None:
    """All that a kill leaves is a temporary file; it goes once no run can be writing it any more."""
    images, again = pictures(1), Tower(model)
    first = in_files(Tower(model), images, tmp_path)
    (written,) = files(tmp_path)
    left = written.with_name(".0123.tmp")
    written.rename(left)
    assert same_bits(in_files(again, images, tmp_path), first) and again.calls == [FEATURE_BATCH]
    assert left.exists()
    hours_ago = time.time() - 2 * features.LEFTOVER_SECONDS
    os.utime(left, (hours_ago, hours_ago))
    in_files(again, images, tmp_path)
    assert not left.exists() and again.calls == [FEATURE_BATCH]


def test_what_was_computed_before_a_kill_is_kept(model: Any, tmp_path: Path) -> None:
    images, again = pictures(), Tower(model)
    with pytest.raises(KeyboardInterrupt):
        in_files(Tower(model, fails_at=2), images, tmp_path)
    assert len(files(tmp_path)) == 1
    assert same_bits(in_files(again, images, tmp_path), in_memory(Tower(model), images))
    assert again.calls == [FEATURE_BATCH] * 2


def test_a_file_that_vanishes_is_named(model: Any, tmp_path: Path) -> None:
    rows = keep_in_files(pictures(1).items(), Tower(model).frozen, OneOf(), tmp_path, "a tower")  # type: ignore[arg-type]
    (path,) = files(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name}: a feature file .* cannot be read any more"):
        rows["i0"]


def test_memory_does_not_grow_with_the_images(model: Any, tmp_path: Path) -> None:
    """Of pixels and computed rows, one batch is alive at a time; of rows read back, those in use."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def one_by_one() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for i in range(5 * FEATURE_BATCH):
            image = torch.full((1, 28, 28), i, dtype=torch.uint8)
            alive.add(image)
            most = max(most, len(alive))
            yield f"i{i}", image

    def encode(pixels_bchw: Tensor) -> Tensor:
        said = model.vision_features(pixels_bchw).detach()
        alive.add(said)
        return said

    tower = dataclasses.replace(Tower(model).frozen, encode=encode)
    rows = keep_in_files(one_by_one(), tower, OneOf(), tmp_path, "a tower")  # type: ignore[arg-type]
    assert most <= 2 * FEATURE_BATCH + 3
    row = rows["i9"]
    kept = weakref.ref(row.untyped_storage())
    assert rows["i9"].data_ptr() != row.data_ptr(), "nothing is kept of what was read"
    assert kept() is not None


class Counted:
    """Calls of the tower in whole runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        plain = MiniGPTv2ForConditionalGeneration.vision_features

        def counting(model: Any, pixel_values: Tensor) -> Tensor:
            self.batches.append(len(pixel_values))
            return plain(model, pixel_values)

        monkeypatch.setattr(MiniGPTv2ForConditionalGeneration, "vision_features", counting)

    def taken(self) -> list[int]:
        taken, self.batches = self.batches, []
        return taken


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.mark.parametrize("options", [{"tuning": "lora"}, {"freeze_vit": True}], ids=["lora", "full"])
def test_a_run_asks_the_tower_once_for_each_image(tmp_path: Path, asked: Counted, options: Any) -> None:
    """In memory unless told otherwise, and not at all in training and evaluation; the tower is gone."""
    fed = federation(tmp_path, **options)
    num_images = len({e.image_key for split in fed.data.splits.values() for e in split})
    assert asked.taken() == [FEATURE_BATCH] * -(-num_images // FEATURE_BATCH)
    assert not [name for name in fed.store.base if name.startswith("vision_model.")]
    for level in fed.store.models.evaluated_levels:
        assert fed.store.submodel(level, fed.initial_state, own=False).vision_model is None
    fed.evaluators["test"].level(2, fed.initial_state, range(4))
    assert asked.taken() == []


@pytest.mark.parametrize(
    "options",
    [{"tuning": "full"}, {"tuning": "lora", "feature_cache": "off"}, {"tuning": "lora", "augment": True}],
    ids=["trained tower", "off", "augmenting"],
)
def test_pixels_stay_where_they_are_needed(tmp_path: Path, asked: Counted, options: Any) -> None:
    fed = federation(tmp_path, **options)
    assert asked.taken() == [] and "pixel_values" in fed.batchers["train"].training([0]).inputs
    assert fed.store.submodel(1, fed.initial_state, own=False).vision_model is not None


def half_tower() -> dict[str, Any]:
    """The model file's part that holds the tower in fp16, as the shipped preset does."""
    return {"model": {**MODEL["model"], "vit_precision": "fp16"}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("model_part", "options"),
    [
        ({}, {}),
        ({}, {"precision": "bf16"}),
        (half_tower(), {}),
        (half_tower(), {"precision": "bf16"}),
        ({}, {"base_store": "file"}),
    ],
    ids=["fp32", "bf16", "fp16 tower", "fp16 tower in bf16", "base in files"],
)
def test_runs_on_features_are_runs_on_pixels(tmp_path: Path, model_part: Any, options: Any) -> None:
    """Memory and files bit for bit, and pixels but for rounding. In fp32: rate 0.05 and a dozen steps of
    clipped gradients keep errors of 1e-6 below 1e-4; in half precision an error of 2^-8 in a gradient of
    norm 1 changes each of ten steps by 0.05 * 2^-8, twice as much with momentum.
    """
    within = 1e-4 if not (model_part or options.get("precision")) else 4e-3
    ended: dict[str, Any] = {}
    for cache in ("off", "memory", "file"):
        (tmp_path / cache).mkdir()
        typed: Any = {"tuning": "lora", "feature_cache": cache, "num_rounds": 1, **options}
        ended[cache] = start(tmp_path / cache, model=model_part, **typed)
    assert same_bits(state(ended["memory"], 1), state(ended["file"], 1))
    assert records(ended["memory"]) == records(ended["file"])
    assert largest_difference(state(ended["memory"], 1), state(ended["off"], 1)) <= within


@pytest.mark.parametrize("cache", ["memory", "file"])
def test_a_resumed_run_finds_the_same_bits(tmp_path: Path, asked: Counted, cache: str) -> None:
    options = {"tuning": "lora", "feature_cache": cache}
    (tmp_path / "whole").mkdir()
    whole = start(tmp_path / "whole", **options, num_rounds=2, KD_start=0.0)
    first = start(tmp_path, **options, num_rounds=1, KD_start=0.0)
    asked.taken()
    forget_launch()
    assert main(["train", "--resume", str(first), "--num_rounds", "2"]) == 0
    assert (asked.taken() == []) == (cache == "file")
    assert same_bits(state(first, 2), state(whole, 2)) and records(first) == records(whole)


def test_evaluation_and_later_runs_read_the_folder_of_another(tmp_path: Path, asked: Counted) -> None:
    options = {"tuning": "lora", "feature_cache": "file", "feature_folder": str(tmp_path / "shared")}
    run_folder = start(tmp_path, **options, num_rounds=1)
    assert asked.taken() != []
    before = tree(tmp_path)
    forget_launch()
    assert main(["evaluate", str(run_folder / "checkpoints" / "round-0001")]) == 0
    assert asked.taken() == [] and tree(tmp_path) == before
    (tmp_path / "later").mkdir()
    start(tmp_path / "later", **options, num_rounds=1, lr=0.01)
    assert asked.taken() == []
    assert not (run_folder / "features").exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"feature_dtype": "bf16"}], ids=["weights", "type"])
def test_another_runs_tower_is_asked_itself(tmp_path: Path, asked: Counted, change: Any) -> None:
    options = {"tuning": "lora", "feature_cache": "file", "feature_folder": str(tmp_path / "shared")}
    federation(tmp_path, **options)
    first = asked.taken()
    federation(tmp_path, **{**options, **change})
    assert asked.taken() == first != []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "occupied").write_text("a file")
    forget_launch()
    options: Any = {"feature_cache": "file", "feature_folder": str(tmp_path / "occupied")}
    assert main(arguments(tmp_path, tuning="lora", **options)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scalefl: ")]
    assert "occupied" in line


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["memory", "file"])
def test_two_processes_find_what_one_does(tmp_path: Path, cache: str) -> None:
    """Features bit for bit; training as without a cache: gradients summed in another order."""
    from test_two_processes import ROUNDING, launch

    options: Any = {"tuning": "lora", "feature_cache": cache, "batch_size": 6, "num_rounds": 1}
    one = start(tmp_path, **options)
    (tmp_path / "two").mkdir()
    with launch(tmp_path / "two", **options) as job:
        assert job.end() == 0, job.last_lines
    two = tmp_path / "two" / "run"
    assert largest_difference(state(one, 1), state(two, 1)) <= ROUNDING
    found: Iterable[tuple[Path, Path]] = zip(files(one / "features"), files(two / "features"), strict=True)
    pairs = [(mine.read_bytes(), other.read_bytes()) for mine, other in found]
    assert all(mine == other for mine, other in pairs) and bool(pairs) == (cache == "file")
