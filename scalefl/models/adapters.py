"""LoRA on any family: the only importer of peft."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scalefl.contracts import InputError, State
from scalefl.models.files import save_file
from scalefl.slicing.layout import LayoutTable


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    """Last name parts of the language model's linear layers, such as "q_proj"."""


def add_lora(model: nn.Module, spec: LoraSpec) -> None:
    """Wrap the targeted layers of the language model in place; B starts at zero: the output stays."""
    # peft imports bitsandbytes, which takes seconds and speaks at import: not for runs without adapters.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import inject_adapter_in_model

    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if name.startswith("language_model.model.layers.") and isinstance(module, nn.Linear)
    }
    for target in spec.targets:
        if target not in linear:
            raise InputError(
                f"--lora_targets: {target} is no linear layer of the language model's blocks; "
                f"expected some of {', '.join(sorted(linear))}."
            )
    inject_adapter_in_model(_lora_config(spec), model)


def _lora_config(spec: LoraSpec, prefix: str = "language_model.") -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # a float works; peft annotates int
        lora_dropout=spec.dropout,
        target_modules=rf"{re.escape(prefix)}model\.layers\..*\.({'|'.join(spec.targets)})",
    )


def initial_adapters(model: nn.Module) -> State:
    """What peft starts the adapters of a model on the meta device from; draws from torch's generator."""
    from peft.tuners.lora import LoraLayer

    state = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for part in ("lora_A", "lora_B"):
                getattr(module, part).to_empty(device="cpu")
            module.reset_lora_parameters("default", init_lora_weights=True)
            for part in ("lora_A", "lora_B"):
                state[f"{name}.{part}.default.weight"] = getattr(module, part)["default"].weight.detach()
    return state


ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


def write_adapters(
    folder: Path,
    spec: LoraSpec,
    state: Mapping[str, Tensor],
    prefix: str = "language_model.",
    task_type: str | None = None,
) -> None:
    """Adapters in peft's files; beside their model transformers' `from_pretrained` finds them.

    `prefix` is where the language model is in that model.
    """
    named = {
        _PEFT_PREFIX + name.replace(".default.", "."): tensor.contiguous() for name, tensor in state.items()
    }
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = _lora_config(spec, prefix)
    config.task_type = task_type
    config.inference_mode = True
    config.save_pretrained(str(folder))


def saved_adapters(folder: Path) -> tuple[LoraSpec, State] | None:
    """What `write_adapters` wrote into a model folder, if anything. Raises InputError if it is damaged."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(str(folder))
        state = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: its adapters cannot be read ({error}); expected LoRA of peft."
        ) from error
    named = {
        name.removeprefix(_PEFT_PREFIX)
        .replace("lora_A.weight", "lora_A.default.weight")
        .replace("lora_B.weight", "lora_B.default.weight"): tensor
        for name, tensor in state.items()
    }
    targets = tuple(
        sorted({name.split(".lora_A.")[0].rpartition(".")[2] for name in named if ".lora_A." in name})
    )
    return LoraSpec(rank=config.r, alpha=config.lora_alpha, dropout=0.0, targets=targets), named


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def adapter_layouts(base: LayoutTable, spec: LoraSpec) -> LayoutTable:
    """The family's table after `add_lora`: a target's weight moves to `base_layer`; A and B join it."""
    table = []
    for pattern, layout in base:
        target = pattern.removesuffix(".weight").rsplit(".", 1)[-1]
        if target not in spec.targets or not pattern.startswith("language_model."):
            table.append((pattern, layout))
            continue
        stem = pattern.removesuffix(".weight")
        output, input_ = _dimensions(layout)
        table += [
            (f"{stem}.base_layer.weight", layout),
            (f"{stem}.lora_A.default.weight", f"{spec.rank} {input_}"),
            (f"{stem}.lora_B.default.weight", f"{output} {spec.rank}"),
        ]
    return table


def _dimensions(layout: str) -> tuple[str, str]:
    """`"(heads head_dim) embed"` -> `("(heads head_dim)", "embed")`."""
    if layout.startswith("("):
        output, _, rest = layout.partition(")")
        return output + ")", rest.strip()
    output, _, rest = layout.partition(" ")
    return output, rest
