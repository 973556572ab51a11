"""MiniGPT-v2 with early exits, in Hugging Face conventions, and how it is cut.

EVA ViT-g (`Blip2VisionModel`, CLS dropped) -> 4 neighbouring tokens concatenated -> linear projector ->
Llama. Source: Chen et al. 2023 (arXiv 2310.09478) and its published code.
Shapes: B batch, L positions, P patches, T image tokens (P / 4), F features of an image token (4 * vision
hidden), D text hidden, V vocabulary, N predicted positions.
"""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipImageProcessorPil,
    Cache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import ModelOutput, logging

from scalefl.config.modelfile import ModelFile
from scalefl.contracts import Axis, InputError, LevelSpec
from scalefl.models.exits import hidden_at_exits, logits_at, new_cache
from scalefl.models.family import ModelFamily
from scalefl.models.prompts import IMAGE_PLACEHOLDER, IMAGE_SLOT, MiniGPTv2Processor, train_tokenizer

PATCHES_PER_TOKEN = 4
VISION_PREFIX = "vision_model."


@strict
class SlicedLlamaConfig(LlamaConfig):
    """A Llama whose heads need not divide the hidden size, as a level that drops heads needs it."""

    model_type = "scalefl_llama"

    def validate_architecture(self) -> None:
        """Upstream demands hidden_size % num_attention_heads == 0 even where head_dim is given."""


@strict
class MiniGPTv2Config(PreTrainedConfig):
    model_type = "minigpt_v2"
    sub_configs = {"vision_config": Blip2VisionConfig, "text_config": SlicedLlamaConfig}

    vision_config: Any = None
    text_config: Any = None
    exit_layers: Any = None
    image_token_id: int = 4
    ln_vision_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    input_scales: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """`exit_layers` ends with the last layer; `input_scales` maps a module to a factor
        (`--width_scaler`).
        """
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = Blip2VisionConfig(**(self.vision_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = SlicedLlamaConfig(**(self.text_config or {}))
        if self.exit_layers is None:
            self.exit_layers = [self.text_config.num_hidden_layers]
        super().__post_init__(**kwargs)


@dataclass
class MiniGPTv2Output(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    exit_logits: tuple[Tensor, ...] | None = None


class MiniGPTv2ForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = MiniGPTv2Config
    config: MiniGPTv2Config
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["LlamaDecoderLayer", "Blip2EncoderLayer"]

    def __init__(self, config: MiniGPTv2Config) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        tower = Blip2VisionModel(vision)
        tower.post_layernorm.eps = config.ln_vision_eps
        self.vision_model: Blip2VisionModel | None = tower
        self.projector = nn.Linear(PATCHES_PER_TOKEN * vision.hidden_size, text.hidden_size)
        self.language_model = LlamaForCausalLM(text)
        earlier = config.exit_layers[:-1]
        self.exit_norms = nn.ModuleList(
            LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps) for _ in earlier
        )
        self._scale_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.apply_input_scales()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def apply_input_scales(self) -> None:
        """Multiply the inputs of the modules named in `config.input_scales` (again, after modules were
        wrapped).
        """
        for handle in self._scale_hooks:
            handle.remove()
        self._scale_hooks = [
            self.get_submodule(name).register_forward_pre_hook(
                lambda _, args, s=factor: (args[0] * s, *args[1:])
            )
            for name, factor in (self.config.input_scales or {}).items()
            if self.vision_model is not None or not name.startswith(VISION_PREFIX)
        ]

    def rebuild_buffers(self) -> None:
        """Give a model made on the meta device its rotary frequencies, which no checkpoint holds."""
        self.language_model.model.rotary_emb = LlamaRotaryEmbedding(self.config.text_config)

    def exit_norm(self, exit: int) -> nn.Module:
        """The norm of an exit, counted from 1; the deepest exit's is the language model's own."""
        return self.exit_norms[exit - 1] if exit <= len(self.exit_norms) else self.language_model.model.norm

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, T, F), what the projector reads, in the tower's precision."""
        if self.vision_model is None:
            raise ValueError(
                "MiniGPTv2: pixel_values, but the vision tower was dropped; give image_features."
            )
        weight = self.vision_model.embeddings.patch_embedding.weight
        half = weight.dtype in (torch.float16, torch.bfloat16) and not weight.is_meta
        # A tower in half precision computes in its own: upstream joins tensors, and autocast to another type
        # refuses to join two kinds of half.
        with torch.autocast(weight.device.type, weight.dtype) if half else contextlib.nullcontext():
            patches_bpd = self.vision_model(pixel_values.to(weight.dtype)).last_hidden_state[:, 1:]
        patches_bpd = patches_bpd.to(weight.dtype) if half else patches_bpd
        # Contiguous as rows of a cache are: the last bits of the projector's sums depend on it.
        return patches_bpd.unflatten(1, (-1, PATCHES_PER_TOKEN)).flatten(2).contiguous()

    def image_embeds(self, features_btf: Tensor) -> Tensor:
        """Features of images -> image tokens (B, T, D)."""
        device = features_btf.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):  # autocast would cast both itself
            features_btf = features_btf.to(self.projector.weight.dtype)
        return self.projector(features_btf)

    def input_embeds(
        self, input_ids: Tensor, pixel_values: Tensor | None, image_features: Tensor | None = None
    ) -> Tensor:
        """Token embeddings (B, L, D), with image tokens where `input_ids` is `image_token_id`."""
        if pixel_values is not None and image_features is not None:
            raise ValueError("MiniGPTv2: give pixel_values or image_features, not both.")
        at_image_bl = input_ids == self.config.image_token_id
        if not self.training:  # a wait for the GPU that training, whose batches we build, does without
            self._check_images(at_image_bl, pixel_values, image_features)
        # The image token need not be in the vocabulary (Llama-2 has none), so it is not looked up.
        embeds_bld = self.get_input_embeddings()(input_ids.masked_fill(at_image_bl, 0))
        if pixel_values is not None:
            image_features = self.vision_features(pixel_values)
        if image_features is None:
            return embeds_bld
        image_btd = self.image_embeds(image_features).to(embeds_bld.dtype)
        return embeds_bld.masked_scatter(at_image_bl.unsqueeze(-1), image_btd)

    def _check_images(
        self, at_image_bl: Tensor, pixel_values: Tensor | None, image_features: Tensor | None
    ) -> None:
        """Raise ValueError unless there is one image for each run of image tokens."""
        vision = self.config.vision_config
        per_image = (vision.image_size // vision.patch_size) ** 2 // PATCHES_PER_TOKEN
        source, wanted = "pixel_values", 0 if pixel_values is None else len(pixel_values) * per_image
        if image_features is not None:
            source, wanted = "image_features", len(image_features) * image_features.shape[1]
        if not at_image_bl.is_meta and int(at_image_bl.sum()) != wanted:
            raise ValueError(
                f"MiniGPTv2: {int(at_image_bl.sum())} image tokens in input_ids, {wanted} in {source}; "
                f"expected {per_image} for each image."
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        predict_at: Tensor | None = None,
        exit: int | None = None,
        **kwargs: Any,
    ) -> MiniGPTv2Output:
        """Logits of one exit (B, L, V), default the deepest; or of every exit at given positions.

        `input_ids` (B, L) carry `image_token_id` at image positions, T of them for each image. The images
        are `pixel_values` (B, 3, height, width), or what `vision_features` said of them, `image_features`
        (B, T, F). `labels` (B, L), -100 = ignore, give `loss`, the mean over answer tokens. `predict_at` (N)
        are flat positions b * L + l: then only `exit_logits`, one (N, V) per exit, is returned. `exit` counts
        from 1.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("MiniGPTv2: give input_ids or inputs_embeds.")
            inputs_embeds = self.input_embeds(input_ids, pixel_values, image_features)
        decoder, head = self.language_model.model, self.language_model.lm_head
        layers = self.config.exit_layers
        context: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        if predict_at is not None:
            hidden = hidden_at_exits(decoder, inputs_embeds, layers, **context)
            exits = enumerate(hidden, start=1)
            return MiniGPTv2Output(
                exit_logits=tuple(logits_at(h_bld, predict_at, self.exit_norm(i), head) for i, h_bld in exits)
            )
        chosen = len(layers) if exit is None else exit
        if not 1 <= chosen <= len(layers):
            raise ValueError(f"MiniGPTv2: exit {exit}; this model has exits 1 to {len(layers)}.")
        if use_cache and past_key_values is None:
            past_key_values = new_cache(decoder)
        (hidden_bld,) = hidden_at_exits(
            decoder, inputs_embeds, layers[chosen - 1 : chosen], past_key_values=past_key_values, **context
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_blv = head(self.exit_norm(chosen)(hidden_bld[:, keep]))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits_blv[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            )
        return MiniGPTv2Output(loss=loss, logits=logits_blv, past_key_values=past_key_values)

    def prepare_inputs_for_generation(  # type: ignore[override]  # upstream models narrow it like this as well
        self, input_ids: torch.LongTensor, **kwargs: Any
    ) -> dict[str, Any]:
        """The image enters with the prompt alone; later steps find it in the cache."""
        first = kwargs.get("is_first_iteration", False)
        images = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_features")}
        exit = kwargs.pop("exit", None)
        parent: Any = super()  # upstream types `self` as a protocol that no model fulfils
        inputs = parent.prepare_inputs_for_generation(input_ids, **kwargs)
        shown = first or not kwargs.get("use_cache", True)
        return {**inputs, **(images if shown else dict.fromkeys(images)), "exit": exit}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaRMSNorm):
            nn.init.ones_(module.weight)


AutoConfig.register(SlicedLlamaConfig.model_type, SlicedLlamaConfig)
AutoConfig.register(MiniGPTv2Config.model_type, MiniGPTv2Config)
AutoModelForImageTextToText.register(MiniGPTv2Config, MiniGPTv2ForConditionalGeneration)
AutoProcessor.register(MiniGPTv2Config, MiniGPTv2Processor)


_VISION = "vision_model.encoder.layers.*"
_TEXT = "language_model.model.layers.*"
LAYOUTS = (
    ("vision_model.embeddings.class_embedding", "1 1 vision_embed"),
    ("vision_model.embeddings.position_embedding", "1 positions vision_embed"),
    ("vision_model.embeddings.patch_embedding.weight", "vision_embed 3 patch patch"),
    ("vision_model.embeddings.patch_embedding.bias", "vision_embed"),
    (f"{_VISION}.self_attn.qkv.weight", "(3 vision_heads vision_head_dim) vision_embed"),
    (f"{_VISION}.self_attn.qkv.bias", "(3 vision_heads vision_head_dim)"),
    (f"{_VISION}.self_attn.projection.weight", "vision_embed (vision_heads vision_head_dim)"),
    (f"{_VISION}.self_attn.projection.bias", "vision_embed"),
    (f"{_VISION}.layer_norm?.weight", "vision_embed"),
    (f"{_VISION}.layer_norm?.bias", "vision_embed"),
    (f"{_VISION}.mlp.fc1.weight", "vision_ffn vision_embed"),
    (f"{_VISION}.mlp.fc1.bias", "vision_ffn"),
    (f"{_VISION}.mlp.fc2.weight", "vision_embed vision_ffn"),
    (f"{_VISION}.mlp.fc2.bias", "vision_embed"),
    ("vision_model.post_layernorm.weight", "vision_embed"),
    ("vision_model.post_layernorm.bias", "vision_embed"),
    ("projector.weight", f"embed ({PATCHES_PER_TOKEN} vision_embed)"),
    ("projector.bias", "embed"),
    ("language_model.model.embed_tokens.weight", "vocab embed"),
    (f"{_TEXT}.self_attn.q_proj.weight", "(heads head_dim) embed"),
    (f"{_TEXT}.self_attn.k_proj.weight", "(kv_heads head_dim) embed"),
    (f"{_TEXT}.self_attn.v_proj.weight", "(kv_heads head_dim) embed"),
    (f"{_TEXT}.self_attn.o_proj.weight", "embed (heads head_dim)"),
    (f"{_TEXT}.mlp.gate_proj.weight", "ffn embed"),
    (f"{_TEXT}.mlp.up_proj.weight", "ffn embed"),
    (f"{_TEXT}.mlp.down_proj.weight", "embed ffn"),
    (f"{_TEXT}.input_layernorm.weight", "embed"),
    (f"{_TEXT}.post_attention_layernorm.weight", "embed"),
    ("language_model.model.norm.weight", "embed"),
    ("language_model.lm_head.weight", "vocab embed"),
)
"""Every parameter of the family: its named axes, outermost first."""

FINAL_NORM = "language_model.model.norm.weight"


class MiniGPTv2Family:
    """Fulfils `ModelFamily`."""

    def processor(self, model_file: ModelFile, texts: list[str]) -> MiniGPTv2Processor:
        """A processor with a tokenizer trained on `texts`, as the model file's `tokenizer:` section asks.

        Raises InputError if the file asks for anything else: released weights are converted beforehand.
        """
        if model_file.tokenizer.get("kind") != "trained":
            raise InputError(
                f"{model_file.name}: no weights to start from; expected --init_from with a folder such as "
                "`scalefl convert` writes, paths in llama_model, vit_model and ckpt, or --cfg-path tiny."
            )
        size, patch = model_file.image_size, model_file.vision["patch_size"]
        num_patches = (size // patch) ** 2
        if size % patch or num_patches % PATCHES_PER_TOKEN:
            raise InputError(
                f"{model_file.name}: image_size {size} with patch_size {patch} gives {num_patches} patches; "
                f"expected a multiple of the patch size whose patches divide by {PATCHES_PER_TOKEN}, such as "
                f"{8 * patch}."
            )
        images = BlipImageProcessorPil(
            size={"height": size, "width": size},
            image_mean=model_file.image_mean,
            image_std=model_file.image_std,
        )
        prompt = model_file.prompt_template.format(IMAGE_SLOT)
        tokenizer = train_tokenizer([*texts, prompt], model_file.tokenizer["vocab_size"])
        return MiniGPTv2Processor(
            image_processor=images,
            tokenizer=tokenizer,
            num_image_tokens=num_patches // PATCHES_PER_TOKEN,
            image_token_id=tokenizer.vocab[IMAGE_PLACEHOLDER],
            prompt_template=model_file.prompt_template,
            end_sym=model_file.end_sym,
            window=model_file.window,
        )

    def config(self, model_file: ModelFile, processor: MiniGPTv2Processor) -> MiniGPTv2Config:
        """The whole model's config, still without early exits."""
        vision, tokenizer = dict(model_file.vision), processor.tokenizer
        ln_vision_eps = vision.pop("ln_vision_eps", 1e-5)
        special = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text = {**model_file.text, "vocab_size": len(tokenizer), **special}
        if text["hidden_size"] % text["num_attention_heads"]:
            raise InputError(
                f"{model_file.name}: text hidden_size {text['hidden_size']} is no multiple of "
                f"num_attention_heads {text['num_attention_heads']}; expected one for the whole model."
            )
        return MiniGPTv2Config(
            vision_config=Blip2VisionConfig(**vision, image_size=model_file.image_size),
            text_config=SlicedLlamaConfig(**text),
            image_token_id=processor.image_token_id,
            ln_vision_eps=ln_vision_eps,
            initializer_range=text.get("initializer_range", 0.02),
        )

    def num_layers(self, config: MiniGPTv2Config) -> int:
        return config.text_config.num_hidden_layers

    def new_model(self, config: MiniGPTv2Config) -> MiniGPTv2ForConditionalGeneration:
        return MiniGPTv2ForConditionalGeneration(config)

    def load_processor(self, folder: str) -> MiniGPTv2Processor:
        try:
            return MiniGPTv2Processor.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            told = " ".join(str(error).split())[:200]
            raise InputError(
                f"{folder}: its processor cannot be read ({told}); expected a whole model folder, with its "
                "processor and tokenizer."
            ) from error

    def load_model(self, folder: str) -> MiniGPTv2ForConditionalGeneration:
        logging.disable_progress_bar()
        return MiniGPTv2ForConditionalGeneration.from_pretrained(folder)

    def load_config(self, folder: str) -> MiniGPTv2Config:
        path = Path(folder) / "config.json"
        try:
            kind = json.loads(path.read_text("utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); expected a whole model folder.") from error
        if kind != MiniGPTv2Config.model_type:
            expected = f"expected {MiniGPTv2Config.model_type}, which sees images"
            raise InputError(f"{folder}: holds a model of type {kind}; {expected}.")
        return MiniGPTv2Config.from_pretrained(folder)

    def layouts(self, config: MiniGPTv2Config) -> tuple[tuple[str, str], ...]:
        return LAYOUTS + ((("exit_norms.*.weight", "embed"),) if len(config.exit_layers) > 1 else ())

    def axes(self, config: MiniGPTv2Config, *, cut_vision: bool) -> dict[str, Axis]:
        """Sizes, and what `--width_axes` cuts. kv heads lead their query heads, so that groups stay whole.

        `Blip2VisionModel` ties its heads to its embedding, so under "inner" only its feed-forward is cut.
        """
        vision, text = config.vision_config, config.text_config
        layer = "language_model.model.layers.0"
        vision_cut = {"inner": "inner", "all": "all"} if cut_vision else {"inner": None, "all": None}
        return {
            "vision_heads": Axis(
                size=vision.num_attention_heads,
                cut_by=vision_cut["all"],
                seen_in="vision_model.encoder.layers.0.self_attn.qkv",
            ),
            "vision_head_dim": Axis(size=vision.hidden_size // vision.num_attention_heads),
            "vision_embed": Axis(size=vision.hidden_size, cut_by=vision_cut["all"], follows="vision_heads"),
            "vision_ffn": Axis(
                size=vision.intermediate_size,
                cut_by=vision_cut["inner"],
                seen_in="vision_model.encoder.layers.0.mlp.fc1",
            ),
            "positions": Axis(size=(vision.image_size // vision.patch_size) ** 2 + 1),
            "patch": Axis(size=vision.patch_size),
            "kv_heads": Axis(
                size=text.num_key_value_heads, cut_by="inner", seen_in=f"{layer}.self_attn.k_proj"
            ),
            "heads": Axis(size=text.num_attention_heads, cut_by="inner", follows="kv_heads"),
            "head_dim": Axis(size=text.head_dim),
            "ffn": Axis(size=text.intermediate_size, cut_by="inner", seen_in=f"{layer}.mlp.down_proj"),
            "embed": Axis(size=text.hidden_size, cut_by="all", seen_in="language_model.model.embed_tokens"),
            "vocab": Axis(size=text.vocab_size),
        }

    def level_config(self, config: MiniGPTv2Config, spec: LevelSpec) -> MiniGPTv2Config:
        """The config of a level's sub-model: fewer units, and only the layers up to its last exit."""
        vision, text = copy.deepcopy(config.vision_config), copy.deepcopy(config.text_config)
        kept = spec.kept
        vision.num_attention_heads = kept.get("vision_heads", vision.num_attention_heads)
        vision.hidden_size = kept.get("vision_embed", vision.hidden_size)
        vision.intermediate_size = kept.get("vision_ffn", vision.intermediate_size)
        text.num_attention_heads = kept.get("heads", text.num_attention_heads)
        text.num_key_value_heads = kept.get("kv_heads", text.num_key_value_heads)
        text.intermediate_size = kept.get("ffn", text.intermediate_size)
        text.hidden_size = kept.get("embed", text.hidden_size)
        exits = config.exit_layers[: spec.depth]
        text.num_hidden_layers = exits[-1]
        return MiniGPTv2Config(
            **{k: getattr(config, k) for k in ("image_token_id", "ln_vision_eps", "initializer_range")},
            vision_config=vision,
            text_config=text,
            exit_layers=list(exits),
        )

    def global_name(self, name: str, spec: LevelSpec, num_exits: int) -> str:
        """Where a sub-model's parameter lives in the whole model, to which its last exit is an early one."""
        return self.exit_norm_name(spec.depth, num_exits) if name == FINAL_NORM else name

    def exit_norm_name(self, exit: int, num_exits: int) -> str:
        return f"exit_norms.{exit - 1}.weight" if exit < num_exits else FINAL_NORM

    def is_block_weight(self, name: str) -> bool:
        return name.startswith("language_model.model.layers.") and name.endswith(
            ("_proj.weight", "_proj.base_layer.weight")
        )

    def set_attention(self, model: MiniGPTv2ForConditionalGeneration, kernel: str) -> None:
        model.config.text_config._attn_implementation = kernel

    def is_vision(self, name: str) -> bool:
        return name.startswith(VISION_PREFIX)

    def vision_settings(self, config: MiniGPTv2Config) -> dict[str, Any]:
        unimportant = ("transformers_version", "_name_or_path", "architectures", "dtype")
        tower = {k: v for k, v in config.vision_config.to_dict().items() if k not in unimportant}
        scales = {k: v for k, v in (config.input_scales or {}).items() if self.is_vision(k)}
        return {"tower": tower, "ln_vision_eps": config.ln_vision_eps, "input_scales": scales}

    def encode_images(self, model: MiniGPTv2ForConditionalGeneration, pixel_values: Tensor) -> Tensor:
        return model.vision_features(pixel_values)

    def patch_grid(self, config: MiniGPTv2Config) -> tuple[int, int]:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side, side

    def drop_vision(self, model: MiniGPTv2ForConditionalGeneration) -> None:
        model.vision_model = None

    def trained_beside_adapters(self, name: str) -> bool:
        """Under `--tuning lora`: the projector and the earlier exits' norms (the final norm stays frozen)."""
        return name.startswith(("projector.", "exit_norms."))


FAMILY: ModelFamily = MiniGPTv2Family()
