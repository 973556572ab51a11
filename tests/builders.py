"""A tiny MiniGPT-v2 shared by the tests: 3 text layers, hidden 32, 4 heads, 16 patches, 4 image tokens."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor, nn

from scalefl.batches import Batcher
from scalefl.config.modelfile import EVA_VIT_G, LLAMA_2_7B, ModelFile
from scalefl.config.options import RunConfig
from scalefl.contracts import Example, State
from scalefl.models.build import ModelSource, new_model
from scalefl.models.family import ModelFamily
from scalefl.models.minigptv2 import FAMILY, MiniGPTv2Processor
from scalefl.models.store import ResidentStore

settings.register_profile("shared cores", deadline=None)  # a test waits when other work has the cores
settings.load_profile("shared cores")

ANSWERS = ("none", "doubtful", "minimal", "moderate", "severe")
QUESTIONS = ("What grade?", "[vqa] What is the Kellgren-Lawrence grade of this knee?")
"""Prompts of different length."""

RUN = RunConfig(
    tuning="full",
    freeze_vit=False,
    vertical_scale_ratios=(0.5, 0.75, 1.0),
    horizontal_scale_ratios=(1, 2, 3),
    client_split_ratios=(0.4, 0.3, 0.3),
    ee_locs=(1, 2),
    lora_r=4,
    lora_alpha=8.0,
    use_gpu=False,
)
"""Three levels, an exit after every layer."""

WEIGHT_STD = 0.3
"""Large enough that every unit of every layer shows in the logits; the initial 0.02 would hide mistakes."""


def model_file(*, kv_heads: int = 4, vocab_size: int = 280) -> ModelFile:
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    text = {k: v for k, v in LLAMA_2_7B.items() if k != "vocab_size"}
    text |= sizes | {"intermediate_size": 40, "num_hidden_layers": 3, "num_key_value_heads": kv_heads}
    vision = dict(EVA_VIT_G) | sizes | {"intermediate_size": 48, "num_hidden_layers": 2, "patch_size": 7}
    return ModelFile(
        name="tests",
        image_size=28,
        vit_precision="fp32",
        end_sym="</s>",
        vision=vision,
        text=text | {"max_position_embeddings": 256},
        tokenizer={"kind": "trained", "vocab_size": vocab_size},
    )


@functools.cache
def processor(vocab_size: int = 280) -> MiniGPTv2Processor:
    return FAMILY.processor(model_file(vocab_size=vocab_size), [*QUESTIONS, *ANSWERS])


@dataclass(frozen=True, kw_only=True)
class Built:
    run: RunConfig
    store: ResidentStore
    state: State


def build_store(
    *, kv_heads: int = 4, from_scratch: bool = False, random_weights: bool = True, **options: Any
) -> Built:
    """The tiny model's store and trainable state, with random weights of `WEIGHT_STD` unless told not to."""
    if options.get("tuning") == "lora":
        options.setdefault("freeze_vit", True)
    run = replace(RUN, **options)
    model = new_model(run, FAMILY, FAMILY.config(model_file(kv_heads=kv_heads), processor()))
    store, state = build_global(
        run,
        FAMILY,
        model.config,
        dict(model.named_parameters()),
        from_scratch=from_scratch,
        device=torch.device("cpu"),
    )
    if random_weights:
        randomise({**store.base, **state})
    return Built(run=run, store=store, state=state)


def randomise(tensors: Mapping[str, Tensor], seed: int = 0) -> None:
    """Fill in place; norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(tensors):
            tensor = tensors[name]
            is_norm = "norm" in name and name.endswith("weight")
            tensor.normal_(1.0 if is_norm else 0.0, WEIGHT_STD, generator=generator)


def in_float64(built: Built) -> Built:
    """The same weights in double precision (Llama's RMSNorm still computes in fp32 inside)."""
    built.store.base = {name: tensor.double() for name, tensor in built.store.base.items()}
    return replace(built, state={name: tensor.double() for name, tensor in built.state.items()})


def examples(count: int) -> list[Example]:
    """Labels and questions in turn; one image each."""
    return [
        Example(
            image_key=f"i{i}",
            patient=f"p{i}",
            question=QUESTIONS[i % len(QUESTIONS)],
            answer=ANSWERS[i % len(ANSWERS)],
            label=i % len(ANSWERS),
        )
        for i in range(count)
    ]


def batcher(count: int = 6, of: Sequence[Example] | None = None) -> Batcher:
    """Random grey images."""
    shown = list(of) if of is not None else examples(count)
    generator = torch.Generator().manual_seed(1)
    pixels = {
        e.image_key: torch.randint(0, 256, (1, 28, 28), generator=generator, dtype=torch.uint8) for e in shown
    }
    return Batcher(processor(), shown, pixels, torch.device("cpu"))


def whole_model(built: Built, *, own: bool = False) -> Any:
    return built.store.submodel(0, built.state, own=own).eval()


def exit_logits(model: nn.Module) -> tuple[Tensor, ...]:
    """Of three prompts of different length, at every exit and answer token."""
    inputs = dict(batcher().training([0, 1, 2]).inputs)
    inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    with torch.no_grad():
        return model(**inputs).exit_logits


def build_global(
    run: RunConfig,
    family: ModelFamily,
    config: Any,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device,
    from_scratch: bool = False,
    vit_dtype: torch.dtype = torch.float32,
) -> tuple[ResidentStore, State]:
    """The resident store of a model's frozen part, and its trainable state (fp32, CPU).

    `config` and `weights` are the model's own, with the exits it was saved with. Weights are read one after
    another, converted and put on the device. `from_scratch` weights may be changed in place.
    """
    source = ModelSource(run, family, config, weights, from_scratch=from_scratch, vit_dtype=vit_dtype)
    store = source.resident(device)
    store.load()
    return store, source.initial_state()
