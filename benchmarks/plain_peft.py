"""Training as one writes it with transformers and peft alone, for the same model, batches and loss."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from scalefl.batches import Batcher, Ids
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.data.synthetic import load
from scalefl.models.holding import DTYPES
from scalefl.models.minigptv2 import FAMILY, MiniGPTv2Config, MiniGPTv2ForConditionalGeneration
from scalefl.objective import exit_losses


def batcher_of(run: RunConfig, model_file: ModelFile) -> tuple[Batcher, MiniGPTv2Config]:
    """The training examples of a run with made-up image features, and its whole model's config."""
    data = load(run)
    texts = {text for split in data.splits.values() for e in split for text in (e.question, e.answer)}
    processor = FAMILY.processor(model_file, sorted({*texts, *run.answers}))
    config = FAMILY.config(model_file, processor)
    config.exit_layers = [*run.ee_locs, FAMILY.num_layers(config)]
    examples = data.splits["train"]
    shape = (processor.num_image_tokens, 4 * config.vision_config.hidden_size)
    features = {e.image_key: torch.randn(shape, dtype=DTYPES[run.precision]) for e in examples}
    return Batcher(processor, examples, {}, torch.device("cpu"), features), config


class PlainTraining:
    """The whole model with peft's adapters, and AdamW over adapters, projector and norms of the exits."""

    def __init__(
        self, config: MiniGPTv2Config, run: RunConfig, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """`weights`: what to start from in place of random weights, by their names in ScaleFL."""
        self._run = run
        model = MiniGPTv2ForConditionalGeneration(config)
        model.vision_model = None  # its features are computed beforehand
        model.to(DTYPES[run.precision])
        model.rebuild_buffers()  # in fp32, as from_pretrained would have them
        if run.quantization == "nf4":
            _quantise(model, DTYPES[run.precision], run.double_quant)
        lora = LoraConfig(
            r=run.lora_r,
            lora_alpha=run.lora_alpha,
            lora_dropout=run.lora_dropout,
            target_modules=rf"language_model\.model\.layers\..*\.({'|'.join(run.lora_targets)})",
        )
        self.model = get_peft_model(model, lora)
        for part in (model.projector, model.exit_norms):
            part.float().requires_grad_(True)
        if weights is not None:
            with torch.no_grad():
                for name, parameter in self.named_parameters().items():
                    parameter.copy_(weights[name])
        self.model.train()
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=run.lr, weight_decay=run.weight_decay, fused=True
        )

    def named_parameters(self) -> dict[str, Tensor]:
        """By their names in ScaleFL."""
        prefix = "base_model.model."
        return {name.removeprefix(prefix): p for name, p in self.model.named_parameters()}

    def step(self, batcher: Batcher, ids: Ids) -> None:
        """One optimizer step, the batch included."""
        run, batch = self._run, batcher.training(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.precision == "bf16"):
            logits = self.model(**batch.inputs).exit_logits
            loss, _ = exit_losses(logits, batch.targets, distill_weight=run.KD_gamma, temperature=run.KD_T)
            loss = loss / len(batch.targets)
        loss.backward()
        if run.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._trained, run.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _quantise(model: Any, compute_dtype: torch.dtype, double_quant: bool) -> None:
    """Linear layers of the language model's blocks become bitsandbytes' own, one after another."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in model.language_model.model.layers.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                layer = Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=compute_dtype,
                    device="meta",
                )
                layer.weight = Params4bit(
                    child.weight.data, quant_type="nf4", compress_statistics=double_quant, module=layer
                )
                layer.to("cpu")  # quantises
                layer.support_avx512bf16_for_cpu = False  # it rewrites weights in eval mode
                setattr(module, name, layer)
    model.is_loaded_in_4bit = True
