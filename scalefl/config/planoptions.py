"""Options of `scalefl plan` alone, beside those of a run: name, type, default and meaning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from scalefl.config.values import coerce
from scalefl.contracts import InputError


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to predict memory for, and for whom. A plan reads no data and no weights."""

    client_budgets: str | None = None
    """YAML or JSON list of {client, memory, flops, bandwidth}: pick each client's level."""
    out: str | None = None
    """Write the assignment to this YAML file, which `scalefl train --config` takes."""
    search: bool = False
    """Search widths and depths for each client's largest sub-model, instead of the run's own levels."""
    zero_stage: int = 0
    """DeepSpeed's ZeRO: share optimizer state (1), gradients (2) and weights (3) among processes."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What ZeRO keeps in host memory; all: weights too, under ZeRO-3."""
    world_size: int = 1
    """Processes that train one client together."""
    seq_length: int | None = None
    """Positions of a row. Unset: image, prompt and answer."""
    answer_length: int | None = None
    """Answer tokens of a row, end symbol included. Unset: those of the longest of --answers."""
    client_examples: int = 100
    """Examples of a client, for seconds per round."""
    device: Literal["cpu", "cuda"] | None = None
    """Where clients train. Unset: what this machine has."""
    json: bool = False
    """Print one JSON object instead of tables."""


PLAN_KINDS: Mapping[str, Any] = get_type_hints(PlanOptions)
"""Option -> its type."""

COUNTS = ("world_size", "seq_length", "answer_length", "client_examples")


def read_plan_options(raw: Mapping[str, Any]) -> PlanOptions:
    """The options as typed: texts and switches. Raises InputError with one line per problem."""
    values, problems = {}, []
    for name, value in raw.items():
        try:
            values[name] = coerce(value, PLAN_KINDS[name], f"--{name}")
        except InputError as error:
            problems.append(str(error))
    problems += _problems(values)
    if problems:
        raise InputError("\n".join(problems))
    return PlanOptions(**values)


def _problems(values: Mapping[str, Any]) -> list[str]:
    options = PlanOptions(**values)
    found = [
        f"--{name}: got {getattr(options, name)}; expected a number at least 1."
        for name in COUNTS
        if getattr(options, name) is not None and getattr(options, name) < 1
    ]
    if not 0 <= options.zero_stage <= 3:
        found.append(f"--zero_stage: got {options.zero_stage}; expected 0 (none), 1, 2 or 3.")
    elif options.offload == "all" and options.zero_stage != 3:
        found.append(f"--offload: all moves weights, under --zero_stage {options.zero_stage}; expected 3.")
    elif options.offload == "optimizer" and options.zero_stage == 0:
        found.append("--offload: optimizer is ZeRO's; expected --zero_stage 1, 2 or 3 with it.")
    for name in ("out", "search"):
        if getattr(options, name) and options.client_budgets is None:
            found.append(f"--{name}: needs budgets to assign levels by; give --client_budgets FILE.")
    if options.answer_length and options.seq_length and options.answer_length >= options.seq_length:
        found.append(
            f"--answer_length: got {options.answer_length} of --seq_length {options.seq_length}; "
            "expected fewer: a row holds the prompt as well."
        )
    return found
