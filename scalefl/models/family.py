"""What the rest of ScaleFL asks of a model family: one file fulfils it, one line registers it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from scalefl.config.modelfile import ModelFile
from scalefl.contracts import Axis, LevelSpec
from scalefl.slicing.layout import LayoutTable


class ModelFamily(Protocol):
    """Configs, models and processors are the family's own Hugging Face classes.

    A model has `exit_norm(exit)`, `exit_norms`, `apply_input_scales()` and `rebuild_buffers()`, its config
    `exit_layers` and `input_scales`. Called with `predict_at` it returns `exit_logits`. A processor has
    `encode_question`, `encode_answer`, `decode_answer`, `resize` and `normalise`. See `minigptv2.py`.
    """

    def processor(self, model_file: ModelFile, texts: list[str]) -> Any:
        """A new processor; `texts` are all questions and answers of the run."""
        ...

    def load_processor(self, folder: str) -> Any: ...

    def config(self, model_file: ModelFile, processor: Any) -> Any:
        """The whole model's config, without early exits."""
        ...

    def new_model(self, config: Any) -> Any: ...

    def load_config(self, folder: str) -> Any:
        """The config of a saved model folder. Raises InputError if it holds a model of another family."""
        ...

    def load_model(self, folder: str) -> Any:
        """The model of a saved folder with its weights, in their precision."""
        ...

    def num_layers(self, config: Any) -> int: ...

    def layouts(self, config: Any) -> LayoutTable:
        """One pattern for every parameter."""
        ...

    def axes(self, config: Any, *, cut_vision: bool) -> dict[str, Axis]: ...

    def level_config(self, config: Any, spec: LevelSpec) -> Any:
        """The config of a level's sub-model."""
        ...

    def global_name(self, name: str, spec: LevelSpec, num_exits: int) -> str:
        """Where a sub-model's parameter lives in the whole model."""
        ...

    def exit_norm_name(self, exit: int, num_exits: int) -> str:
        """The parameter of an exit's norm; exits count from 1."""
        ...

    def is_block_weight(self, name: str) -> bool:
        """Whether this is the weight of a linear layer in the language model's blocks: `--quantization`."""
        ...

    def set_attention(self, model: Any, kernel: str) -> None:
        """Let the language model attend by `--attn`."""
        ...

    def is_vision(self, name: str) -> bool: ...

    def vision_settings(self, config: Any) -> dict[str, Any]:
        """What decides, beside its weights, what the vision tower says of an image; JSON."""
        ...

    def encode_images(self, model: Any, pixel_values: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, T, F): what a model takes as `image_features` in place of pixels."""
        ...

    def patch_grid(self, config: Any) -> tuple[int, int]:
        """Rows and columns of patches: what `encode_images` says of an image is theirs, row after row."""
        ...

    def drop_vision(self, model: Any) -> None:
        """Take the vision tower out of a model, which then knows images by their features alone."""
        ...

    def trained_beside_adapters(self, name: str) -> bool: ...
