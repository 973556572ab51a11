"""The global model at the start of a run: from scratch or from a folder, split into frozen base and trainable
state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scalefl.config.options import RunConfig
from scalefl.contracts import Axis, LevelSpec, State
from scalefl.levels import exit_layers, level_specs
from scalefl.models.adapters import LoraSpec, add_lora, is_adapter
from scalefl.models.family import ModelFamily
from scalefl.models.store import ResidentStore
from scalefl.seeding import derive
from scalefl.slicing.layout import match_layouts
from scalefl.slicing.plan import zero_tail

log = logging.getLogger("scalefl")


def build_global(
    run: RunConfig, family: ModelFamily, model: nn.Module, *, from_scratch: bool, device: torch.device
) -> tuple[ResidentStore, State]:
    """The resident store of `model`'s frozen part, and its trainable state (fp32, CPU).

    Exits and, under `--tuning lora`, adapters are added to `model`, which is taken apart: do not use it
    afterwards.
    """
    config = model.config
    layers = exit_layers(run.ee_locs, family.num_layers(config))
    _set_exits(model, list(layers))
    axes = family.axes(config, cut_vision=not run.freeze_vit)
    specs = level_specs(
        axes, run.vertical_scale_ratios, run.horizontal_scale_ratios, run.width_axes, num_exits=len(layers)
    )
    if from_scratch and run.zero_tails and run.tuning == "full":  # frozen zeros would stay without effect
        _start_tails_without_effect(family, model, axes, specs)
    lora = None
    if run.tuning == "lora":
        lora = LoraSpec(
            rank=run.lora_r, alpha=run.lora_alpha, dropout=run.lora_dropout, targets=run.lora_targets
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(run.seed, "adapters"))
            add_lora(model, lora)
    base, state = {}, {}
    for name, parameter in model.named_parameters():
        if _is_trainable(run, family, name):
            state[name] = parameter.detach().to("cpu", torch.float32)
        else:
            base[name] = parameter.detach().to(device)
    store = ResidentStore(
        family=family,
        config=config,
        base=base,
        trainable_shapes={name: tensor.shape for name, tensor in state.items()},
        specs=specs,
        lora=lora,
        width_scaler=run.width_scaler,
        device=device,
    )
    return store, state


def new_model(run: RunConfig, family: ModelFamily, config: Any) -> nn.Module:
    """A model with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(run.seed, "initial weights"))
        return family.new_model(config)


def _start_tails_without_effect(
    family: ModelFamily, model: nn.Module, axes: Mapping[str, Axis], specs: Sequence[LevelSpec]
) -> None:
    """Let every level start as the same function.

    Zero what reads units beyond the narrowest level and, in layers beyond the shallowest one, all that writes
    to the residual stream.
    """
    sizes = {name: axis.size for name, axis in axes.items()}
    narrowest = {name: min(spec.kept[name] for spec in specs) for name in specs[0].kept}
    nothing = {name: 0 for name in narrowest if axes[name].cut_by == "inner"}
    shallowest = min(specs, key=lambda spec: spec.depth)
    with torch.device("meta"):
        reached = dict(family.new_model(family.level_config(model.config, shallowest)).named_parameters())
    layouts = match_layouts([name for name, _ in model.named_parameters()], family.layouts(model.config))
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            name = f"{module_name}.weight"
            zero_tail(module.weight, layouts[name], sizes, narrowest if name in reached else nothing)


def _set_exits(model: Any, layers: list[int]) -> None:
    """Put exits after `layers`; new ones start from the final norm, those already there stay."""
    before = {layer: model.exit_norm(i).weight for i, layer in enumerate(model.config.exit_layers, start=1)}
    final = model.exit_norm(len(model.config.exit_layers))
    norms = []
    for layer in layers[:-1]:
        norm = type(final)(final.weight.shape[0], eps=final.variance_epsilon)
        norm.weight.data.copy_(before.get(layer, final.weight).data)
        norms.append(norm)
    if len(before) > 1 and list(before) != layers:
        log.warning(
            "exits move from layers %s to %s; new ones start from the final norm", list(before), layers
        )
    model.exit_norms = nn.ModuleList(norms)
    model.config.exit_layers = layers


def _is_trainable(run: RunConfig, family: ModelFamily, name: str) -> bool:
    if run.tuning == "full":
        return not (run.freeze_vit and family.is_vision(name))
    return is_adapter(name) or family.trained_beside_adapters(name)
