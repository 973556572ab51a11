"""The global model at the start of a run: from scratch or from files, split into frozen base and trainable
state.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalefl.config.options import RunConfig
from scalefl.contracts import InputError, State
from scalefl.levels import exit_layers, level_specs
from scalefl.models.adapters import LoraSpec, add_lora, initial_adapters, is_adapter
from scalefl.models.family import ModelFamily
from scalefl.models.files import TensorFiles
from scalefl.models.holding import Holding
from scalefl.models.quantised import quantise
from scalefl.models.store import FileStore, Frozen, ResidentStore, write_base
from scalefl.models.submodels import SubModels
from scalefl.seeding import derive
from scalefl.slicing.plan import zero_tail

log = logging.getLogger("scalefl")


def plan_levels(run: RunConfig, family: ModelFamily, config: Any) -> SubModels:
    """The whole model's and every level's shapes, plans and configs; no weights.

    `config` is the model's own, with the exits it was saved with; those of `run` take their place.
    """
    config = copy.deepcopy(config)
    config.exit_layers = list(exit_layers(run.ee_locs, family.num_layers(config)))
    axes = family.axes(config, cut_vision=not run.freeze_vit)
    specs = level_specs(
        axes,
        run.vertical_scale_ratios,
        run.horizontal_scale_ratios,
        run.width_axes,
        num_exits=len(config.exit_layers),
    )
    lora = None
    if run.tuning == "lora":
        lora = LoraSpec(
            rank=run.lora_r, alpha=run.lora_alpha, dropout=run.lora_dropout, targets=run.lora_targets
        )
    with torch.device("meta"):
        whole = family.new_model(config)
        if lora is not None:
            add_lora(whole, lora)
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    trainable = {name: shape for name, shape in shapes.items() if _is_trainable(run, family, name)}
    return SubModels(
        family=family,
        config=config,
        base_shapes={name: shape for name, shape in shapes.items() if name not in trainable},
        trainable_shapes=trainable,
        specs=specs,
        lora=lora,
        width_scaler=run.width_scaler,
    )


def new_model(run: RunConfig, family: ModelFamily, config: Any) -> nn.Module:
    """A model with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(run.seed, "initial weights"))
        return family.new_model(config)


class ModelSource:
    """A model's weights on their way into a store: nothing is read before it is asked for."""

    def __init__(
        self,
        run: RunConfig,
        family: ModelFamily,
        config: Any,
        weights: Mapping[str, Tensor],
        *,
        from_scratch: bool = False,
        vit_dtype: torch.dtype = torch.float32,
        adapters: State | None = None,
    ) -> None:
        """`adapters` are those that came with the weights; without, new ones start."""
        self._run, self._family, self._weights, self._adapters = run, family, weights, adapters
        self._from_scratch = from_scratch
        self.models = plan_levels(run, family, config)
        self._holding = Holding(run=run, models=self.models, vit_dtype=vit_dtype)
        self._names = self._source_names(list(config.exit_layers))
        if from_scratch and run.zero_tails and run.tuning == "full":  # frozen zeros would stay without effect
            assert isinstance(weights, MutableMapping)
            _start_tails_without_effect(self.models, weights)
        self._check_blocks()

    def initial_state(self) -> State:
        """The trainable state in fp32 on the CPU; new adapters have B at zero: the output stays."""
        models, state = self.models, {}
        adapters = self._adapters or {}
        if models.lora is not None and not adapters:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(self._run.seed, "adapters"))
                adapters = initial_adapters(models.skeleton(models.config))
        for name in models.trainable_shapes:
            tensor = adapters[name] if name in adapters else self._weights[self._names[name]]
            state[name] = tensor.detach().to("cpu", torch.float32, copy=name not in adapters)
        return state

    def resident(self, device: torch.device) -> ResidentStore:
        read = functools.partial(self.frozen, device=device)
        return ResidentStore(self.models, read, **self._store_options(device))

    def on_disk(self, device: torch.device, folder: Path) -> FileStore:
        """A store of what is on disk already: the model's own files, or what `write` put in `folder`."""
        as_they_are, base, holding = not self.needs_folder, self.models.base_shapes, self._holding
        return FileStore(
            self.models,
            self._weights if isinstance(self._weights, TensorFiles) and as_they_are else TensorFiles(folder),
            names=self._names if as_they_are else {name: name for name in base},
            dtypes={name: holding.dtype(name) for name in base},
            quantised={name: holding.is_transposed(name) for name in base if holding.is_quantised(name)},
            kind=self._run.quantization,
            **self._store_options(device),
        )

    @property
    def needs_folder(self) -> bool:
        """Whether the base must be written before `on_disk` can read it; else the model's own files do."""
        made = self._from_scratch or self._run.quantization != "none"
        return bool(self.models.base_shapes) and made

    def write(self, folder: Path, device: torch.device) -> None:
        """Convert the base tensor by tensor on the device, and write it."""
        write_base(folder, ((name, self.frozen(name, device)) for name in self.models.base_shapes))

    def frozen(self, name: str, device: torch.device) -> Frozen:
        """A frozen weight as a store holds it: on the device, in its dtype, quantised."""
        tensor = self._weights[self._names[name]].detach()
        if not self._holding.is_quantised(name):
            return tensor.to(device, self._holding.dtype(name))
        return quantise(
            tensor.to(device),
            self._run.quantization,
            transposed=self._holding.is_transposed(name),
            double_quant=self._run.double_quant,
        )

    def _store_options(self, device: torch.device) -> dict[str, Any]:
        return {
            "device": device,
            "compute_dtype": self._holding.compute_dtype,
            "attn": self._run.attn,
        }

    def _check_blocks(self) -> None:
        if self._run.quantization != "nf4":
            return
        for name in filter(self._holding.is_quantised, self.models.base_shapes):
            columns = self.models.base_shapes[name][0 if self._holding.is_transposed(name) else 1]
            if columns % 64:
                raise InputError(
                    f"--quantization nf4: {name} has {columns} weights in a row; expected a multiple of 64, "
                    "which share scales; use int8 or none, or another hidden_size."
                )

    def _source_names(self, saved_exits: list[int]) -> dict[str, str]:
        """Parameter -> tensor of the source. Exits that the source lacks start from its final norm."""
        family, layers = self._family, self.models.config.exit_layers
        final = family.exit_norm_name(len(saved_exits), len(saved_exits))
        saved = {
            layer: family.exit_norm_name(exit, len(saved_exits))
            for exit, layer in enumerate(saved_exits, start=1)
        }
        if len(saved) > 1 and saved_exits != list(layers):
            log.warning(
                "exits move from layers %s to %s; new ones start from the final norm",
                saved_exits,
                list(layers),
            )
        norms = {
            family.exit_norm_name(exit, len(layers)): saved.get(layer, final)
            for exit, layer in enumerate(layers, start=1)
        }
        every = (*self.models.base_shapes, *self.models.trainable_shapes)
        return {name: norms.get(name, name.replace(".base_layer.", ".")) for name in every}


def check_weights(family: ModelFamily, config: Any, files: TensorFiles) -> None:
    """Raise InputError unless a folder holds exactly the weights of its config.json."""
    with torch.device("meta"):
        expected = {name: p.shape for name, p in family.new_model(config).named_parameters()}
    got = files.shapes
    problems = [
        f"{kind}: {min(names)}"
        for kind, names in (
            ("missing", expected.keys() - got.keys()),
            ("unknown", got.keys() - expected.keys()),
            ("of another shape", {n for n in expected.keys() & got.keys() if expected[n] != got[n]}),
        )
        if names
    ]
    if problems:
        raise InputError(f"{files.folder}: {'; '.join(problems)}; expected the weights of its config.json.")


def _start_tails_without_effect(models: SubModels, weights: MutableMapping[str, Tensor]) -> None:
    """Let every level start as the same function.

    Zero what reads units beyond the narrowest level and, in layers beyond the shallowest one, all that writes
    to the residual stream.
    """
    specs = [models.slices[level].spec for level in models.levels]
    sizes = {name: axis.size for name, axis in models.axes.items()}
    narrowest = {name: min(spec.kept[name] for spec in specs) for name in specs[0].kept}
    nothing = {name: 0 for name in narrowest if models.axes[name].cut_by == "inner"}
    shallowest = min(specs, key=lambda spec: spec.depth)
    reached = dict(models.empty(shallowest.level).named_parameters())
    for name, module in models.skeleton(models.config).named_modules():
        if isinstance(module, nn.Linear):
            weight = f"{name}.weight"
            kept = narrowest if weight in reached else nothing
            zero_tail(weights[weight], models.layouts[weight], sizes, kept)


def _is_trainable(run: RunConfig, family: ModelFamily, name: str) -> bool:
    if run.tuning == "full":
        return not (run.freeze_vit and family.is_vision(name))
    return is_adapter(name) or family.trained_beside_adapters(name)
