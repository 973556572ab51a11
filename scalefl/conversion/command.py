"""`scalefl convert`: released files in, a model folder out; also for a run whose model file names them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from scalefl.config.convertoptions import ConvertOptions
from scalefl.config.modelfile import ModelFile
from scalefl.console import Display
from scalefl.contracts import InputError, State
from scalefl.conversion.minigptv2 import Released
from scalefl.models.adapters import is_adapter, write_adapters
from scalefl.models.files import new_folder, write_tensors


def convert(options: ConvertOptions) -> None:
    """Convert, and say what was made of which file."""
    assert options.out
    out = Path(options.out)
    if out.exists():
        raise InputError(f"--out {out}: is there already; expected a new folder.")
    released = Released(options)
    write_model(released, out)
    display = Display(speaks=True, print_freq=1)
    for line in told(released):
        display.line(line)
    display.line(f"model        {out} (scalefl train --init_from {out} ...)")


def told(released: Released) -> Iterator[str]:
    """What was made of the files, and what of them was not used."""
    vision, text, lora = released.config.vision_config, released.config.text_config, released.lora
    yield (
        f"vision tower: {vision.num_hidden_layers} layers of {vision.hidden_size}, images of "
        f"{vision.image_size} x {vision.image_size} pixels, {released.processor.num_image_tokens} tokens each"
    )
    yield f"language model: {text.num_hidden_layers} layers of {text.hidden_size}, {text.vocab_size} tokens"
    if lora is not None:
        yield f"adapters: rank {lora.rank}, alpha {lora.alpha:g}, on {' '.join(lora.targets)}"
    for what, names in (("not used", released.unused), ("missing, starts anew", released.started_anew)):
        alike = Counter(map(_of_any_layer, names))
        yield from (f"{what}: {name}" + f" ({count} of them)" * (count > 1) for name, count in alike.items())


def _of_any_layer(name: str) -> str:
    """`FILE: KEY`, or a parameter, with * for numbers in it."""
    file, colon, key = name.rpartition(": ")
    return file + colon + re.sub(r"\d+", "*", key)


def of_model_file(model_file: ModelFile, lora_alpha: float) -> ConvertOptions:
    """What upstream's own keys say. Raises InputError where they do not name files of this machine."""
    named = {key: getattr(model_file, key) for key in ("llama_model", "vit_model", "ckpt")}
    problems = [
        f"{model_file.name}: model.{key}: got {value!r}; expected the path of {what}, for this machine "
        "downloads nothing."
        for (key, value), what in zip(
            named.items(), ("a Llama-2 folder", "eva_vit_g.pth", "minigptv2_checkpoint.pth"), strict=True
        )
        if value is None or not Path(value).exists()
    ]
    if problems:
        raise InputError("\n".join(problems))
    return ConvertOptions(
        llama=model_file.llama_model,
        vit=model_file.vit_model,
        ckpt=model_file.ckpt,
        image_size=model_file.image_size,
        vit_heads=model_file.vision["num_attention_heads"],
        lora_alpha=lora_alpha,
        prompt_template=model_file.prompt_template,
        end_sym=model_file.end_sym,
        max_txt_len=model_file.max_txt_len,
    )


def write_model(released: Released, folder: Path) -> None:
    """A model folder; one tensor after the other, so that memory holds a part of a file. All or nothing."""
    adapters: State = {}
    with new_folder(folder) as temporary:
        write_tensors(temporary, _base(released, adapters))
        if released.lora is not None:
            write_adapters(temporary, released.lora, adapters)
        released.config.architectures = ["MiniGPTv2ForConditionalGeneration"]
        released.config.save_pretrained(temporary)
        released.processor.save_pretrained(temporary)


def _base(released: Released, adapters: State) -> Iterator[tuple[str, Tensor]]:
    """All but the adapters, which are put aside."""
    for name, tensor in released.tensors():
        if is_adapter(name):
            adapters[name] = tensor
        else:
            yield name, tensor
