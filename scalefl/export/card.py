"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalefl.export.submodel import Exported
from scalefl.report import levels_by_exits

TITLES = {"whole": "", "language": "the language model of ", "adapter": "the LoRA adapter of "}
"""Part -> how its title begins."""

LOADED = {
    "whole": """from scalefl.models.minigptv2 import MiniGPTv2ForConditionalGeneration, MiniGPTv2Processor

model = MiniGPTv2ForConditionalGeneration.from_pretrained(FOLDER)
processor = MiniGPTv2Processor.from_pretrained(FOLDER)
inputs = processor(images=image, text=question)
print(processor.decode_answer(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]))""",
    "language": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER)  # without ScaleFL; images enter as inputs_embeds""",
    "adapter": """from peft import PeftModel

model = PeftModel.from_pretrained(llama, FOLDER)  # on the language model that the run started from""",
}
"""Part -> how it is loaded."""


def card(model: Exported, part: str, checkpoint: Path) -> str:
    """Markdown: what it is, what it was trained on, how good each exit is, and whose terms hold."""
    run, text = model.run, model.config.text_config
    what = TITLES[part] + ("the whole model" if model.level == 0 else f"level {model.level}")
    evaluation = _evaluation(checkpoint, model.round)
    return "\n".join(
        [
            f"# {what[0].upper()}{what[1:]} of a model trained with ScaleFL",
            "",
            f"{run.arch}, {part}: {text.num_hidden_layers} layers, {text.num_attention_heads} heads, "
            f"{text.intermediate_size} feed-forward channels, exits after layers "
            f"{', '.join(map(str, model.config.exit_layers))}; adapters "
            + ("merged into the weights." if model.merges else "beside it." if model.lora else "none."),
            "",
            "## Training",
            "",
            f'- data: {run.data}, asked "{run.question}"',
            f"- {model.round} of {run.num_rounds} federated rounds, {run.num_clients} clients, "
            f"--tuning {run.tuning}, --quantization {run.quantization}, --precision {run.precision}, "
            f"seed {run.seed}",
            f"- levels: widths {_list(run.vertical_scale_ratios)}, "
            f"exits {_list(run.horizontal_scale_ratios)}",
            f"- frozen base: {_base(model)}",
            *_quantised(run),
            "",
            "## How good it is",
            "",
            *(_table(evaluation, model.level) if evaluation else ["Not evaluated in this round."]),
            "",
            "## Use",
            "",
            "```python",
            LOADED[part],
            "```",
            "",
            "## Terms",
            "",
            "A research tool; no medical device. The terms of the base it was trained on hold for this model "
            "as well: of released MiniGPT-v2 weights these are the Llama 2 Community License (language "
            "model) and the licences of EVA-CLIP (vision tower) and MiniGPT-4; and what the data ask for.",
            "",
        ]
    )


def _base(model: Exported) -> str:
    """By its name: where it lies is nobody's business."""
    base = model.run.init_from or model.model_file.llama_model
    reordered = " (trained in importance order, which is undone here)" if model.is_reordered else ""
    return f"{Path(base).name}{reordered}" if base else "none, or random weights"


def _quantised(run: Any) -> list[str]:
    if run.quantization == "none":
        return []
    return ["- clients trained on a quantised base; these weights are not: answers differ a little"]


def _evaluation(checkpoint: Path, number: int) -> dict[str, Any] | None:
    """What the run's folder says of this round, if it is there."""
    metrics = checkpoint.absolute().parents[1] / "metrics.jsonl"
    if not metrics.is_file():
        return None
    records = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    return next((r["evaluation"] for r in records if r["round"] == number), None)


def _table(evaluation: dict[str, Any], level: int) -> list[str]:
    """Of the level; of every level for the whole model, where no level is the whole."""
    levels = evaluation["levels"]
    shown = {str(level): levels[str(level)]} if str(level) in levels else levels
    columns, rows = levels_by_exits(shown)
    title = f"On the {evaluation['split']} split, in this round:"
    return [title, "", _row(columns), _row(["---"] * len(columns)), *(_row(row) for row in rows)]


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _list(values: Sequence[Any]) -> str:
    return " ".join(f"{value:g}" for value in values)
