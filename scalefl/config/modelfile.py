"""Model files: upstream MiniGPT-v2's YAML as it is, plus sections of ours for sizes and training defaults.

Source of format and defaults: Vision-CAIR/MiniGPT-4, minigpt4/configs and minigpt4/models/minigpt_v2.py.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_type_hints

from scalefl.config.recipes import RECIPES
from scalefl.config.values import OPTION_KINDS, coerce, nearest, read_options
from scalefl.config.yamlfile import read_yaml
from scalefl.contracts import InputError

logger = logging.getLogger(__name__)

DEFAULT_PRESET = "tiny"

EVA_VIT_G: Mapping[str, Any] = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,  # upstream builds 40 blocks and drops the last
    "num_attention_heads": 16,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "ln_vision_eps": 1e-5,
    "initializer_range": 0.02,
}
"""Sizes of the vision tower where a file has no `vision:` section. A section must give the first four."""

LLAMA_2_7B: Mapping[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
}
"""Sizes of the language model where a file has no `text:` section. A section must give the first four."""

REQUIRED_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

OPTIONS_IN_MODEL = {
    "lora_r": "lora_r",
    "lora_alpha": "lora_alpha",
    "freeze_vit": "freeze_vit",
    "use_grad_checkpoint": "gradient_checkpointing",
}
"""Upstream's key in `model:` -> option."""

UNUSED_IN_MODEL = frozenset(
    "model_type pretrained finetuned load_pretrained load_finetuned drop_path_rate use_grad_checkpoint_llm "
    "prompt prompt_path max_context_len device_8bit q_former_model num_query_token freeze_qformer "
    "has_qformer".split()
)
"""Upstream's keys that have no counterpart here."""

UNUSED_SECTIONS = frozenset({"datasets", "evaluation_datasets", "run"})
"""Upstream's sections for its own data sets and trainer."""


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A global model as a file describes it. Defaults are upstream's."""

    name: str
    """The shipped preset's name, or the file's path."""
    arch: str = "MiniGPTv2"
    image_size: int = 448
    llama_model: str | None = None
    vit_model: str | None = None
    ckpt: str | None = None
    vit_precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    max_txt_len: int = 300
    """Answer tokens, at most."""
    prompt_template: str = "[INST] {} [/INST]"
    end_sym: str = "\n"
    chat_template: bool = False
    low_resource: bool = False
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    window: bool = False
    """Stretch the 1st to 99th percentile of every image to the full range: exposures differ."""
    vision: Mapping[str, Any] = field(default_factory=lambda: dict(EVA_VIT_G))
    text: Mapping[str, Any] = field(default_factory=lambda: dict(LLAMA_2_7B))
    """Without vocab_size where the tokenizer is trained, and decides it."""
    tokenizer: Mapping[str, Any] = field(default_factory=lambda: {"kind": "pretrained"})
    """kind: pretrained (comes with llama_model) or trained (on prompts and answers, to vocab_size)."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Option -> default of a run with this model."""

    @property
    def names_released_weights(self) -> bool:
        """Whether the model is to be made of released files."""
        return self.tokenizer.get("kind") != "trained" and self.llama_model is not None


MODEL_KINDS = {
    name: kind
    for name, kind in get_type_hints(ModelFile).items()
    if name not in ("name", "image_mean", "image_std", "window", "vision", "text", "tokenizer", "train")
}
"""Key in `model:` -> its type."""


def shipped_presets() -> list[str]:
    folder = resources.files("scalefl") / "presets"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_model_file(cfg_path: str | None) -> ModelFile:
    """The shipped preset of that name (tiny if None), or the file at that path.

    Raises InputError that lists every problem of the file, one per line.
    """
    name, presets = cfg_path or DEFAULT_PRESET, shipped_presets()
    if name in presets:
        with resources.as_file(resources.files("scalefl") / "presets" / f"{name}.yaml") as path:
            return parse_model_file(read_yaml(path), name)
    if not Path(name).exists():
        raise InputError(
            f"--cfg_path: no file '{name}', and no preset of that name; {nearest(name, presets)}"
            f"expected a YAML file or one of {', '.join(presets)}."
        )
    return parse_model_file(read_yaml(name), name)


def parse_model_file(raw: Mapping[Any, Any], name: str) -> ModelFile:
    """A model file's content as a record; `name` is what errors call the file."""
    reader = _Reader(name)
    known = ("model", "preprocess", "vision", "text", "tokenizer", "train")
    for key in raw:
        if key in UNUSED_SECTIONS:
            logger.info("%s: section %s belongs to upstream's trainer and is not used.", name, key)
        elif key not in known:
            reader.unknown(str(key), known)
    if "model" not in raw:
        reader.problems.append(
            f"{name}: no section model; expected `model:` with at least `arch: minigpt_v2`."
        )
    sections = {key: reader.section(raw, key) for key in known}
    model, options = reader.model(sections["model"])
    image = reader.preprocess(sections["preprocess"], model)
    vision = reader.sizes("vision", sections["vision"], EVA_VIT_G)
    text = reader.sizes("text", sections["text"], LLAMA_2_7B)
    tokenizer = reader.tokenizer(sections["tokenizer"])
    if tokenizer["kind"] == "trained":
        if "vocab_size" in sections["text"]:
            reader.problems.append(
                f"{name}: text.vocab_size: the trained tokenizer decides it; leave it out."
            )
        text.pop("vocab_size")
    train = reader.train(sections["train"], options)
    if not reader.problems:
        reader.proportions(vision, text, image)
    if reader.problems:
        raise InputError("\n".join(reader.problems))
    return ModelFile(
        name=name, **{**model, **image}, vision=vision, text=text, tokenizer=tokenizer, train=train
    )


class _Reader:
    """Reads the sections of one file and collects what is wrong with them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[str] = []

    def unknown(self, key: str, known: Any, section: str = "") -> None:
        hint = nearest(key.rpartition(".")[2], known)
        self.problems.append(
            f"{self.name}: {section}{key}: unknown key; {hint}known: {', '.join(sorted(known))}."
        )

    def value(self, value: Any, kind: Any, key: str) -> Any:
        try:
            value = coerce(value, kind, f"{self.name}: {key}")
        except InputError as error:
            self.problems.append(str(error))
            return None
        if kind in (int, float) and not 0 < value < float("inf"):
            self.problems.append(f"{self.name}: {key}: got {value:g}; expected a number above 0.")
        return value

    def section(self, raw: Mapping[Any, Any], key: str) -> dict[str, Any]:
        content = raw.get(key)
        if content is not None and not isinstance(content, Mapping):
            self.problems.append(
                f"{self.name}: {key}: got {content!r}; expected a section of `key: value` lines."
            )
            return {}
        return {str(k): v for k, v in (content or {}).items()}

    def model(self, raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Values for ModelFile, and options."""
        values, options = {}, {}
        for key, value in raw.items():
            if key in OPTIONS_IN_MODEL:
                option = OPTIONS_IN_MODEL[key]
                options[option] = self.value(value, OPTION_KINDS[option], f"model.{key}")
            elif key in MODEL_KINDS:
                if key == "low_resource" and value is True:  # upstream loads the language model in 8 bits
                    options["quantization"] = "int8"
                if key in ("llama_model", "vit_model", "ckpt") and value == "":  # upstream's way to say none
                    value = None
                values[key] = self.value(value, MODEL_KINDS[key], f"model.{key}")
            elif key not in UNUSED_IN_MODEL:
                self.unknown(key, {*MODEL_KINDS, *OPTIONS_IN_MODEL, *UNUSED_IN_MODEL}, "model.")
            elif value:
                logger.info("%s: model.%s has no counterpart here and is not used.", self.name, key)
        if values.get("arch") == "minigpt_v2":
            values["arch"] = "MiniGPTv2"
        template = values.get("prompt_template")
        if template is not None and (template.count("{}") != 1 or template.count("{") != 1):
            self.problems.append(
                f"{self.name}: model.prompt_template: got {template!r}; expected one {{}}, for the question."
            )
        return values, options

    def preprocess(self, raw: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
        """Image size, mean and standard deviation. Train and eval share one processor here, so must agree."""
        values: dict[str, Any] = {"image_size": model["image_size"]} if "image_size" in model else {}
        kinds = {"image_size": int, "mean": tuple[float, ...], "std": tuple[float, ...], "window": bool}
        renamed = {"image_size": "image_size", "mean": "image_mean", "std": "image_std", "window": "window"}
        unused = {"name", "min_scale", "max_scale"}
        for key in set(raw) - {"vis_processor", "text_processor"}:
            self.unknown(key, ("vis_processor", "text_processor"), "preprocess.")
        vis_processor = self.section(raw, "vis_processor")
        for split in vis_processor:
            for key, value in self.section(vis_processor, split).items():
                place = f"preprocess.vis_processor.{split}.{key}"
                if key in kinds:
                    read = self.value(value, kinds[key], place)
                    if values.setdefault(renamed[key], read) != read:
                        other = values[renamed[key]]
                        self.problems.append(
                            f"{self.name}: {place}: got {read}, elsewhere {other}; keep one."
                        )
                elif key not in unused:
                    self.unknown(key, {*kinds, *unused}, f"preprocess.vis_processor.{split}.")
        return values

    def sizes(self, section: str, raw: dict[str, Any], full_size: Mapping[str, Any]) -> dict[str, Any]:
        if not raw:
            return dict(full_size)
        values = dict(full_size)
        if section == "text" and "num_attention_heads" in raw:
            values["num_key_value_heads"] = raw["num_attention_heads"]
        for key, value in raw.items():
            if key in full_size:
                values[key] = self.value(value, type(full_size[key]), f"{section}.{key}")
            else:
                self.unknown(key, full_size, f"{section}.")
        for key in REQUIRED_SIZES:
            if key not in raw:
                self.problems.append(f"{self.name}: {section}.{key}: missing; expected a number.")
        return values

    def proportions(self, vision: dict[str, Any], text: dict[str, Any], image: dict[str, Any]) -> None:
        """Numbers that must divide one another, or come in threes."""
        whole = (
            (
                "vision.hidden_size",
                vision["hidden_size"],
                "num_attention_heads",
                vision["num_attention_heads"],
            ),
            ("text.hidden_size", text["hidden_size"], "num_attention_heads", text["num_attention_heads"]),
            (
                "text.num_attention_heads",
                text["num_attention_heads"],
                "num_key_value_heads",
                text["num_key_value_heads"],
            ),
        )
        for key, number, divisor_key, divisor in whole:
            if number % divisor:
                self.problems.append(
                    f"{self.name}: {key}: got {number}, no multiple of {divisor_key} {divisor}; expected one."
                )
        for key in ("image_mean", "image_std"):
            if len(image.get(key, (0, 0, 0))) != 3:
                self.problems.append(
                    f"{self.name}: preprocess: expected 3 numbers, red, green and blue, for {key}."
                )

    def tokenizer(self, raw: dict[str, Any]) -> dict[str, Any]:
        kinds: dict[str, Any] = {"kind": Literal["trained", "pretrained"], "vocab_size": int}
        for key in set(raw) - set(kinds):
            self.unknown(key, kinds, "tokenizer.")
        values = {k: self.value(raw[k], kinds[k], f"tokenizer.{k}") for k in kinds if k in raw}
        values.setdefault("kind", "pretrained")
        if (values["kind"] == "trained") != ("vocab_size" in values):
            self.problems.append(
                f"{self.name}: tokenizer: expected vocab_size with kind trained, and only there."
            )
        return values

    def train(self, raw: dict[str, Any], from_model: dict[str, Any]) -> dict[str, Any]:
        read = read_options(raw, lambda option: f"{self.name}: train.{option}")
        self.problems += read.problems
        for option in read.given:
            if option in from_model:
                self.problems.append(
                    f"{self.name}: train.{option}: given in section model as well; keep one."
                )
            elif option in RECIPES["scalefl"]:
                self.problems.append(
                    f"{self.name}: train.{option}: the recipe decides it; set train.recipe instead."
                )
            elif option in ("cfg_path", "arch"):
                self.problems.append(f"{self.name}: train.{option}: this file is the model; leave it out.")
        return {**from_model, **{option: given.value for option, given in read.given.items()}}
