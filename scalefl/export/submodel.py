"""A level's sub-model, parameter by parameter, as it leaves a run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalefl import checkpoint
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.saved import load_config
from scalefl.contracts import InputError, LevelSpec, State
from scalefl.engine.launch import Engine
from scalefl.federation.start import check_same_parameters, start_from
from scalefl.models.adapters import LoraSpec, is_adapter
from scalefl.models.store import Store
from scalefl.models.submodels import WHOLE, SubModels
from scalefl.registry import resolve
from scalefl.slicing.ops import cut
from scalefl.slicing.order import Order, permute, restoring, unit_places


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One level of a checkpoint. Its tensors are read as they are asked for."""

    run: RunConfig
    model_file: ModelFile
    round: int
    level: int
    """0 is the whole model."""
    config: Any
    """The sub-model's, without the factors of `--width_scaler`, which are in its weights."""
    processor: Any
    lora: LoraSpec | None
    """None also where the adapters are merged."""
    store: Store
    trained: State
    """In the sub-model's names."""
    own_order: Callable[[str, Tensor], Tensor]
    """Undoes any `scalefl reorder` in a parameter, by its name in the whole model."""
    scales: Mapping[str, float]
    merges: bool
    is_reordered: bool
    """Whether the run trained a base in another order."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters in plain names, fp32; adapters too unless they are merged."""
        for name, entry in self.store.models.slices[self.level].base_plan.items():
            value = self.store.frozen(entry)
            assert isinstance(value, Tensor)  # nothing is quantised here
            yield self._finished(name, self.own_order(entry.global_name, value))
        for name, tensor in self.trained.items():
            if not (self.merges and is_adapter(name)):
                yield self._finished(name, tensor)

    def _finished(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        value = value.float()
        module = name.removesuffix(".weight").removesuffix(".base_layer")
        if self.merges and name.endswith(".base_layer.weight"):
            lora = self.store.models.lora
            assert lora is not None
            a, b = (self.trained[f"{module}.lora_{part}.default.weight"].float() for part in "AB")
            value = value + (lora.alpha / lora.rank) * (b @ a)
        # W (f x) = (f W) x; of adapters A reads the input.
        module = module.removesuffix(".lora_A.default")
        if not name.endswith(".bias") and ".lora_B." not in name:
            value = value * self.scales.get(module, 1.0)
        return name.replace(".base_layer.", "."), value


@contextlib.contextmanager
def exported(folder: Path, level: int | None, *, merges: bool, init_from: str | None) -> Iterator[Exported]:
    """A level of the checkpoint in `folder`, unquantised; None is the whole model.

    Raises InputError if there is no such checkpoint or level, or if its frozen base is not to be found.
    """
    run, model_file = load_config(folder)
    progress = checkpoint.load(folder)
    if progress.partial is not None:
        raise InputError(f"{folder}: is in the middle of a round; expected one such as round-0005.")
    run = _as_it_is(run, folder, init_from)
    family = resolve("arch", run.arch)
    with tempfile.TemporaryDirectory(prefix="scalefl-base-") as spare:
        start = start_from(run, model_file, family, [], Engine(run), [folder], Path(spare) / "base")
        check_same_parameters(progress.state, start.state, str(folder))
        models = start.store.models
        number = WHOLE if level is None else level
        if level is not None and level not in models.levels:
            raise InputError(f"--level {level}: no level of this run; expected one of {models.levels}.")
        part = models.slices[number]
        config = copy.deepcopy(part.config)
        config.input_scales = None
        own_order = _own_order(start.order, models, part.spec)
        yield Exported(
            run=load_config(folder)[0],
            model_file=model_file,
            round=progress.round,
            level=number,
            config=config,
            processor=start.processor,
            lora=None if merges else models.lora,
            store=start.store,
            trained={
                name: own_order(part.trainable_plan[name].global_name, tensor)
                for name, tensor in cut(progress.state, part.trainable_plan).items()
            },
            own_order=own_order,
            scales=part.config.input_scales or {},
            merges=merges and models.lora is not None,
            is_reordered=bool(start.order),
        )


def _as_it_is(run: RunConfig, folder: Path, init_from: str | None) -> RunConfig:
    """The run of a checkpoint, to read what it trained and its base as it is in files."""
    return dataclasses.replace(
        run,
        init_from=run.init_from if init_from is None else init_from,
        evaluate_from=str(folder),  # nothing trains
        use_gpu=False,
        quantization="none",
        precision="fp32",
        base_store="file",
        executor="sequential",
        report_to=(),
    )


def _own_order(order: Order, models: SubModels, spec: LevelSpec) -> Callable[[str, Tensor], Tensor]:
    """What sorts a level's units as they once were, in a parameter by its name in the whole model."""
    axes = {n: dataclasses.replace(axis, size=spec.kept.get(n, axis.size)) for n, axis in models.axes.items()}
    places, undo = unit_places(models.layouts, axes), restoring(order, axes)
    return lambda name, tensor: permute(tensor, places[name], undo)


def dtype_of(name: str | None, run: RunConfig) -> torch.dtype:
    """The precision to write: as asked for, or that of the run."""
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return kinds[name or run.precision]
