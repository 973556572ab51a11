"""`scalefl reorder`: the same model with heads and channels in the order of what they contribute."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scalefl.batches import Batcher
from scalefl.config.options import RunConfig
from scalefl.config.reorderoptions import ReorderOptions
from scalefl.console import Display
from scalefl.contracts import InputError, State
from scalefl.data.images import decode_all
from scalefl.models.adapters import LoraSpec, adapter_layouts, saved_adapters, write_adapters
from scalefl.models.build import check_weights
from scalefl.models.family import ModelFamily
from scalefl.models.files import TensorFiles, new_folder, saved_order, write_order, write_tensors
from scalefl.models.holding import DTYPES
from scalefl.prediction.calibration import CALIBRATION_FILE
from scalefl.prediction.loaded import TASK_FILE, check_is_model, device_of, task_of
from scalefl.registry import resolve
from scalefl.reordering.importance import importance, readers_of
from scalefl.seeding import numpy_rng
from scalefl.slicing.layout import Layout, match_layouts
from scalefl.slicing.order import Order, Place, composed, most_first, permute, unit_places

log = logging.getLogger("scalefl")

BESIDE = ("README.md", CALIBRATION_FILE)
"""Files that hold of the reordered model too, since it answers alike."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A model folder; its tensors are read as they are asked for."""

    folder: Path
    family: ModelFamily
    config: Any
    processor: Any
    files: TensorFiles
    adapters: tuple[LoraSpec, State] | None
    places: Mapping[str, Sequence[Place]]
    """Of weights and adapters."""


def reorder(run: RunConfig, options: ReorderOptions) -> None:
    """Measure what units contribute, write the model in that order, and tell what it comes to."""
    assert options.model is not None and options.out is not None
    out = Path(options.out)
    if out.exists():
        raise InputError(f"--out {out}: is there already; expected a new folder.")
    model = _saved(Path(options.model), resolve("arch", run.arch))
    scores = _measured(run, options, model)
    if not all(bool(score.isfinite().all()) for score in scores.values()):
        raise InputError(f"--precision {run.precision}: the loss is not finite in it; try --precision fp32.")
    order = most_first(scores)
    _write(model, order, out)
    display = Display(speaks=True, print_freq=1)
    for line in told(scores, order):
        display.line(line)
    display.line(f"model        {out} (scalefl train --init_from {out} ...)")


def _saved(folder: Path, family: ModelFamily) -> Saved:
    """Raises InputError unless the folder holds a whole model."""
    check_is_model(folder)
    config, files = family.load_config(str(folder)), TensorFiles(folder)
    check_weights(family, config, files)
    adapters = saved_adapters(folder)
    layouts = _layouts(family, config, files, adapters)
    return Saved(
        folder=folder,
        family=family,
        config=config,
        processor=family.load_processor(str(folder)),
        files=files,
        adapters=adapters,
        places=unit_places(layouts, family.axes(config, cut_vision=True)),
    )


def _layouts(
    family: ModelFamily, config: Any, files: TensorFiles, adapters: tuple[LoraSpec, State] | None
) -> dict[str, Layout]:
    """Of weights and adapters, by the names of both in files."""
    table = family.layouts(config)
    if adapters is None:
        return match_layouts(files, table)
    spec, state = adapters
    wrapped = {name.partition(".lora_A.")[0] + ".weight" for name in state if ".lora_A." in name}
    names = [n.removesuffix("weight") + "base_layer.weight" if n in wrapped else n for n in files]
    layouts = match_layouts([*names, *state], adapter_layouts(table, spec))
    return {name.replace(".base_layer.", "."): layout for name, layout in layouts.items()}


def _measured(run: RunConfig, options: ReorderOptions, model: Saved) -> dict[str, Tensor]:
    """What every unit contributes to the model's own answers, on examples drawn from the split."""
    task = task_of(model.folder)
    asked = run
    if task.question is not None:
        asked = dataclasses.replace(run, question=task.question, answers=task.answers or run.answers)
    data = resolve("data", run.data)(asked)
    if not (examples := data.splits.get(options.split)):
        raise InputError(f"--split {options.split}: {data.name} has no examples there; name another split.")
    drawn = numpy_rng(run.seed, "reorder").permutation(len(examples))[: options.examples]
    shown = [examples[number] for number in sorted(drawn)]
    log.info("measured on %d of the %d examples of %s", len(shown), len(examples), options.split)
    pixels = decode_all(shown, data.read_image, model.processor.resize, run.workers)
    device = device_of(run.use_gpu)
    batcher = Batcher(model.processor, shown, pixels, device)
    loaded = model.family.load_model(str(model.folder)).eval().requires_grad_(False).to(DTYPES[run.precision])
    loaded.rebuild_buffers()  # rotary frequencies do without a lower precision
    readers = readers_of({name: model.places[name] for name in model.files})
    return importance(loaded.to(device), batcher, range(len(shown)), readers, run.batch_size)


def _write(model: Saved, order: Order, out: Path) -> None:
    """The model in that order, tensor by tensor, and what is to be known of it; all or nothing."""
    with new_folder(out) as temporary:
        write_tensors(temporary, _permuted(model, model.files, order))
        if model.adapters is not None:
            spec, state = model.adapters
            write_adapters(temporary, spec, dict(_permuted(model, state, order)))
        model.config.save_pretrained(temporary)
        model.processor.save_pretrained(temporary)
        write_order(temporary, composed(saved_order(model.folder), order))
        task = dataclasses.asdict(task_of(model.folder))
        (temporary / TASK_FILE).write_text(json.dumps(task, indent=1), encoding="utf-8")
        for name in BESIDE:
            if (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, temporary / name)


def _permuted(model: Saved, tensors: Mapping[str, Tensor], order: Order) -> Iterator[tuple[str, Tensor]]:
    return ((name, permute(tensors[name], model.places[name], order)) for name in tensors)


def told(scores: Mapping[str, Tensor], order: Order) -> Iterator[str]:
    """By axis, which share of what was measured the first half of the units holds, over all layers."""
    for axis in dict.fromkeys(key.rpartition("/")[2] for key in scores):
        own = {key: score for key, score in scores.items() if key.endswith(f"/{axis}")}
        whole = sum(float(score.sum()) for score in own.values())
        before = sum(float(score[: len(score) // 2].sum()) for score in own.values())
        after = sum(float(score[order[key][: len(score) // 2]].sum()) for key, score in own.items())
        shares = f"{before / whole:.2f} before, {after / whole:.2f} now" if whole else "none at all"
        yield f"{axis:<12} importance in the first half: {shares}"
