"""Options of `scalefl convert`: released files, and what they themselves do not tell."""

from collections.abc import Iterator
from dataclasses import dataclass

from scalefl.config.own import OwnOptions

REQUIRED = ("llama", "vit", "ckpt", "out")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OwnOptions):
    """Files as MiniGPT-v2 was released in; defaults are the released model's."""

    llama: str | None = None
    """Folder of Llama-2 in Hugging Face's form: weights (safetensors or .bin), config, tokenizer."""
    vit: str | None = None
    """File eva_vit_g.pth."""
    ckpt: str | None = None
    """File of what was trained, such as minigptv2_checkpoint.pth."""
    out: str | None = None
    """Folder to write, which must not exist yet."""
    image_size: int = 448
    """Side of an image in pixels; the tower's positions are interpolated to it."""
    vit_heads: int = 16
    """Attention heads of the vision tower."""
    lora_alpha: float = 16.0
    """Adapters are scaled by this over their rank."""
    prompt_template: str = "[INST] {} [/INST]"
    """Around a question; {} is its place."""
    end_sym: str = "</s>"
    """Behind an answer."""
    max_txt_len: int = 500
    """Tokens of an answer, end symbol included, at most."""
    allow_missing: tuple[str, ...] = ()
    """Names or patterns of tensors that may be missing (they start at random) or stay unused."""

    def problems(self) -> Iterator[str]:
        for name in REQUIRED:
            if getattr(self, name) is None:
                yield f"--{name}: nothing given; see `scalefl convert --help`."
        for name in ("image_size", "vit_heads", "lora_alpha", "max_txt_len"):
            if not 0 < getattr(self, name) < float("inf"):
                yield f"--{name}: got {getattr(self, name)}; expected a number above 0."
        if self.prompt_template.count("{}") != 1 or self.prompt_template.count("{") != 1:
            yield f"--prompt_template: got {self.prompt_template!r}; expected one {{}}, for the question."
