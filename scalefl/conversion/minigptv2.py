"""MiniGPT-v2 as released, in this project's names: which tensor becomes which parameter.

Source: Vision-CAIR/MiniGPT-4 (eva_vit.py, minigpt_base.py, minigpt_v2.py); names of peft 0.2 and later.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import AutoTokenizer, BlipImageProcessorPil, LlamaConfig, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from scalefl.config.convertoptions import ConvertOptions
from scalefl.config.modelfile import EVA_VIT_G, ModelFile
from scalefl.contracts import InputError
from scalefl.conversion.sources import Source, open_folder
from scalefl.models.adapters import LoraSpec, add_lora, is_adapter
from scalefl.models.minigptv2 import FAMILY, PATCHES_PER_TOKEN, MiniGPTv2Config, SlicedLlamaConfig
from scalefl.models.prompts import MiniGPTv2Processor
from scalefl.seeding import derive

PAD_TOKEN = "$$"
"""Upstream pads with it; its embedding is masked everywhere."""

_BLOCK = r"blocks\.(\d+)\."
TOWER = (
    (r"cls_token", r"embeddings.class_embedding"),
    (r"pos_embed", r"embeddings.position_embedding"),
    (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embedding.\1"),
    (_BLOCK + r"norm([12])\.(weight|bias)", r"encoder.layers.\1.layer_norm\2.\3"),
    (_BLOCK + r"attn\.qkv\.weight", r"encoder.layers.\1.self_attn.qkv.weight"),
    (_BLOCK + r"attn\.[qv]_bias", r"encoder.layers.\1.self_attn.qkv.bias"),
    (_BLOCK + r"attn\.proj\.(weight|bias)", r"encoder.layers.\1.self_attn.projection.\2"),
    (_BLOCK + r"mlp\.fc([12])\.(weight|bias)", r"encoder.layers.\1.mlp.fc\2.\3"),
)
"""Key of eva_vit_g.pth -> parameter of the vision tower."""

_LANGUAGE = r"llama_model\.(?:base_model\.model\.)?"
TRAINED = (
    (r"llama_proj\.(weight|bias)", r"projector.\1"),
    (r"ln_vision\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (_LANGUAGE + r"(.*)\.lora_([AB])(?:\.default)?\.weight", r"language_model.\1.lora_\2.default.weight"),
    (_LANGUAGE + r"(.*?)(?:\.base_layer)?\.weight", r"language_model.\1.weight"),
)
"""Key of a checkpoint -> parameter; `visual_encoder.*` are keys of the tower."""

WITHOUT_USE = ("*rotary_emb.inv_freq", "norm.weight", "norm.bias", "fc_norm.*", "head.*", "mask_token")
"""Keys that upstream's own model has no parameter for: computed anew, or of EVA's own training."""

RELEASED_BLOCKS = 40
"""Of the released tower upstream builds all but the last, which it never used."""

LN_VISION = ("vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias")
"""Upstream's, which is 1 and 0 where no checkpoint has trained it."""

POSITIONS = "vision_model.embeddings.position_embedding"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a parameter comes from: keys of one source."""

    source: Source
    keys: tuple[str, ...]


class Released:
    """The three released files: what becomes which parameter, and what the whole model is."""

    def __init__(self, options: ConvertOptions, model_file: ModelFile | None = None) -> None:
        """`model_file` says how images are normalised.

        Raises InputError with a line for every tensor that is missing, unknown or of another shape.
        """
        assert options.llama and options.vit and options.ckpt
        self._options, self._images = options, model_file or ModelFile(name="")
        self.llama = open_folder(Path(options.llama))
        self.vit = Source(Path(options.vit), inside="model")
        self.ckpt = Source(Path(options.ckpt), inside="model")
        _check_slots(self.llama, self.vit, self.ckpt)
        self.unused: list[str] = []
        self.origins = self._origins()
        self.processor = self._processor()
        self.config = self._config()
        self.lora = self._lora()
        self.shapes = self._shapes()
        self._check_proportions()
        self.missing = self._check()
        """Parameters that no file has."""
        self.started_anew = [name for name in self.missing if name not in LN_VISION]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, those of one file together, in the precision of its file."""
        at_file = sorted(
            self.origins,
            key=lambda name: (
                str(self.origins[name].source.file_of(self.origins[name].keys[0])),
                self.origins[name].keys,
            ),
        )
        before = None
        for name in at_file:
            origin = self.origins[name]
            if before is not None and origin.source is not before:
                before.close()
            tensor = self._tensor(name, [origin.source[key] for key in origin.keys]).clone()
            origin.source.release()
            yield name, tensor
            before = origin.source
        if before is not None:
            before.close()
        for name in self.missing:
            yield name, self._initial(name)

    def _origins(self) -> dict[str, Origin]:
        depth = self._tower_depth()
        origins: dict[str, Origin] = {}
        for key in self.llama.by_file():
            self._add(origins, self.llama, key, f"language_model.{key}")
        for key in self.vit.by_file():
            self._add(origins, self.vit, key, _tower_name(key, depth))
        of_checkpoint: dict[str, Origin] = {}  # what was trained takes the place of what it started from
        for key in self.ckpt.by_file():
            tower = key.removeprefix("visual_encoder.")
            name = _tower_name(tower, depth) if tower != key else _renamed(key, TRAINED)
            self._add(of_checkpoint, self.ckpt, key, name)
        return origins | of_checkpoint

    def _add(self, origins: dict[str, Origin], source: Source, key: str, name: str | None) -> None:
        if name is None or any(fnmatch.fnmatch(key, pattern) for pattern in WITHOUT_USE):
            self.unused.append(f"{source.file_of(key).name}: {key}")
            return
        keys = origins[name].keys if name in origins else ()
        origins[name] = Origin(source=source, keys=(*keys, key))

    def _tower_depth(self) -> int:
        blocks = [int(found[1]) for key in self.vit if (found := re.match(_BLOCK, key))]
        depth = max(blocks, default=-1) + 1
        return depth - 1 if depth == RELEASED_BLOCKS else depth

    def _processor(self) -> MiniGPTv2Processor:
        options, folder = self._options, self.llama.place
        folder = folder if folder.is_dir() else folder.parent
        try:
            tokenizer = legacy(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError, KeyError, ImportError) as error:
            told = " ".join(str(error).split())[:200]
            raise InputError(f"--llama {folder}: no tokenizer there ({told}); expected Llama's.") from error
        rows = self.llama.shapes["model.embed_tokens.weight"][0]
        if len(tokenizer) != rows:
            raise InputError(
                f"--llama {folder}: its tokenizer knows {len(tokenizer)} tokens, its embedding {rows}; "
                "expected as many: the files of one model."
            )
        patch = self.vit.shapes["patch_embed.proj.weight"][-1]
        size = {"height": options.image_size, "width": options.image_size}
        return MiniGPTv2Processor(
            image_processor=BlipImageProcessorPil(
                size=size, image_mean=self._images.image_mean, image_std=self._images.image_std
            ),
            tokenizer=tokenizer,
            num_image_tokens=(options.image_size // patch) ** 2 // PATCHES_PER_TOKEN,
            image_token_id=rows,  # beyond the vocabulary: Llama has no token for an image
            prompt_template=options.prompt_template,
            end_sym=options.end_sym,
            max_txt_len=options.max_txt_len,
            window=self._images.window,
        )

    def _config(self) -> MiniGPTv2Config:
        folder = self.llama.place if self.llama.place.is_dir() else self.llama.place.parent
        if not (folder / "config.json").is_file():
            raise InputError(f"--llama {folder}: config.json is missing; expected all files of the Llama.")
        try:
            text = LlamaConfig.from_pretrained(folder, local_files_only=True).to_dict()
        except (OSError, ValueError) as error:
            raise InputError(f"--llama {folder}: no config.json of a Llama ({error}).") from error
        tokenizer = self.processor.tokenizer
        special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        left_out = (
            "model_type",
            "architectures",
            "transformers_version",
            "dtype",
            "torch_dtype",
            "_name_or_path",
        )
        text = {key: value for key, value in text.items() if key not in left_out}
        shapes, heads = self.vit.shapes, self._options.vit_heads
        if (width := shapes["cls_token"][-1]) % heads:
            raise InputError(
                f"--vit_heads {heads}: does not divide the tower's width {width}; expected the number that "
                "it was trained with."
            )
        vision = {
            "hidden_size": width,
            "intermediate_size": shapes["blocks.0.mlp.fc1.weight"][0],
            "num_hidden_layers": self._tower_depth(),
            "num_attention_heads": heads,
            "patch_size": shapes["patch_embed.proj.weight"][-1],
            "image_size": self._options.image_size,
            "layer_norm_eps": EVA_VIT_G["layer_norm_eps"],
            "initializer_range": EVA_VIT_G["initializer_range"],
        }
        return MiniGPTv2Config(
            vision_config=vision,
            text_config=SlicedLlamaConfig(**{**text, **special}),
            image_token_id=self.processor.image_token_id,
            ln_vision_eps=EVA_VIT_G["ln_vision_eps"],
            dtype="float16",
        )

    def _lora(self) -> LoraSpec | None:
        """As the checkpoint's own tensors have it; its scale is in no file."""
        ours = {name: self.ckpt.shapes[o.keys[0]] for name, o in self.origins.items() if ".lora_A." in name}
        if not ours:
            return None
        return LoraSpec(
            rank=next(iter(ours.values()))[0],
            alpha=self._options.lora_alpha,
            dropout=0.0,
            targets=tuple(sorted({name.split(".lora_A.")[0].rpartition(".")[2] for name in ours})),
        )

    def _shapes(self) -> dict[str, torch.Size]:
        """Of every parameter, adapters included, whose bases have their plain names."""
        with torch.device("meta"):
            model = FAMILY.new_model(self.config)
            if self.lora is not None:
                add_lora(model, self.lora)
        return {name.replace(".base_layer.", "."): p.shape for name, p in model.named_parameters()}

    def _check_proportions(self) -> None:
        size, vision = self._options.image_size, self.config.vision_config
        patches = (size // vision.patch_size) ** 2
        if size % vision.patch_size or patches % PATCHES_PER_TOKEN:
            fits = PATCHES_PER_TOKEN // 2 * vision.patch_size
            raise InputError(
                f"--image_size {size}: gives {patches} patches of {vision.patch_size} pixels; expected a "
                f"multiple of {fits}, such as {max(1, round(size / fits)) * fits}, whose patches divide by "
                f"{PATCHES_PER_TOKEN}."
            )

    def _check(self) -> list[str]:
        """Parameters that no file has and that may start anew. Raises InputError for all else that is off."""
        missing = [name for name in self.shapes if name not in self.origins]
        unknown = [name for name in self.origins if name not in self.shapes]
        allowed = self._options.allow_missing
        in_files = [key for origin in self.origins.values() for key in origin.keys]
        off = [*missing, *unknown, *in_files]
        problems = [
            f"--allow_missing {pattern}: nothing has such a name; see the names that are missing or unknown"
            for pattern in allowed
            if not any(_named(name, [pattern]) for name in off)
        ]
        problems += [
            f"{name}: missing; expected {tuple(self.shapes[name])} in one of the files"
            for name in missing
            if name not in LN_VISION and not _named(name, allowed)
        ]
        for name in unknown:
            origin = self.origins[name]
            where = f"{origin.source.file_of(origin.keys[0]).name}: {origin.keys[0]}"
            if _named(name, allowed) or _named(origin.keys[0], allowed):
                self.unused.append(where)
            else:
                problems.append(f"{where}: unknown; the model has no {name}")
        known = [name for name in self.origins if name in self.shapes]
        self.origins = {name: self.origins[name] for name in known}
        problems += [line for name in known if (line := self._mis_shaped(name))]
        if problems:
            shown = problems[:MOST_PROBLEMS]
            more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
            hint = "--allow_missing NAME ... takes it without the tensors that it names (patterns too)."
            raise InputError("\n".join([*shown, *more, hint]))
        return missing

    def _mis_shaped(self, name: str) -> str | None:
        origin, expected = self.origins[name], tuple(self.shapes[name])
        shapes = [tuple(origin.source.shapes[key]) for key in origin.keys]
        if name.endswith("qkv.bias"):
            fits = shapes == [(expected[0] // 3,)] * 2
        elif name == POSITIONS:
            sides = [(shape[1] - 1) ** 0.5 for shape in shapes if len(shape) == 3]
            fits = bool(sides) and sides[0].is_integer() and shapes[0][2] == expected[2]
        else:
            fits = shapes == [expected]
        if fits:
            return None
        file = origin.source.file_of(origin.keys[0])
        return f"{file}: {', '.join(origin.keys)}: got {' and '.join(map(str, shapes))}; expected {expected}"

    def _tensor(self, name: str, found: Sequence[Tensor]) -> Tensor:
        if name.endswith("qkv.bias"):
            q_bias, v_bias = found  # upstream has no bias for keys: softmax would not see it
            return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        if name == POSITIONS and found[0].shape != self.shapes[name]:
            return interpolated(found[0], self.shapes[name][1] - 1)
        return found[0]

    def _initial(self, name: str) -> Tensor:
        """Of a parameter that no file has."""
        shape = self.shapes[name]
        if len(shape) == 1 or ".lora_B." in name:
            is_scale = name.endswith("weight") and not is_adapter(name)
            return torch.ones(shape) if is_scale else torch.zeros(shape)
        generator = torch.Generator().manual_seed(derive(0, f"converted {name}"))
        return torch.randn(shape, generator=generator) * self.config.initializer_range


MOST_PROBLEMS = 20
"""Lines of one refusal."""


def legacy(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """Llama's tokenizer as upstream uses it: every text between special tokens begins with a space.

    Llama's own class in transformers decides that anew at each load, by a setting that it does not save.
    """
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=PAD_TOKEN,
        padding_side="left",
    )


def interpolated(positions_1pd: Tensor, num_patches: int) -> Tensor:
    """Positions (1, 1 + P, D) of a square grid -> (1, 1 + `num_patches`, D), in fp32; as upstream's."""
    cls_11d, grid_1pd = positions_1pd.float().split([1, positions_1pd.shape[1] - 1], dim=1)
    side, wanted = int(grid_1pd.shape[1] ** 0.5), int(num_patches**0.5)
    grid_1dhw = grid_1pd.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid_1dhw = torch.nn.functional.interpolate(
        grid_1dhw, size=(wanted, wanted), mode="bicubic", align_corners=False
    )
    return torch.cat([cls_11d, grid_1dhw.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _tower_name(key: str, depth: int) -> str | None:
    """None for a block that upstream drops; a key that no rule knows keeps its name."""
    block = re.match(_BLOCK, key)
    if block and int(block[1]) >= depth:
        return None
    return f"vision_model.{_renamed(key, TOWER)}"


def _renamed(key: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, name in rules:
        if found := re.fullmatch(pattern, key):
            return found.expand(name)
    return key


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_slots(llama: Source, vit: Source, ckpt: Source) -> None:
    """Raise InputError where a file is in the place of another one."""
    signs: Mapping[str, tuple[str, str]] = {
        "--llama": ("model.embed_tokens.weight", "a Llama"),
        "--vit": ("patch_embed.proj.weight", "the vision tower"),
        "--ckpt": ("llama_proj.weight", "a checkpoint of MiniGPT-v2"),
    }
    problems = []
    for option, source in (("--llama", llama), ("--vit", vit), ("--ckpt", ckpt)):
        sign, what = signs[option]
        if sign in source:
            continue
        looks = next((f" this is {w} ({s});" for s, w in signs.values() if s in source), "")
        problems.append(f"{option} {source.place}: has no {sign};{looks} expected {what}.")
    if problems:
        raise InputError("\n".join(problems))
