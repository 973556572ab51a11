"""A model with the rule by which its exits answer, as the options of a command ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from scalefl.config.askoptions import AskOptions
from scalefl.contracts import InputError
from scalefl.inference import ExitRule
from scalefl.prediction.calibration import read_calibration
from scalefl.prediction.loaded import Answer, Answering, device_of, task_of

NEVER = 2.0
"""A threshold that no confidence passes."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One model, one question, one rule."""

    model: Answering
    rule: ExitRule
    max_new_tokens: int

    def answer(self, pixels: Sequence[Tensor]) -> list[Answer]:
        """One answer for each image."""
        return self.model.answer(pixels, self.rule, self.max_new_tokens)


def load(options: AskOptions) -> Asked:
    """Raises InputError if there is no model, no GPU where one is wanted, or no such exit."""
    assert options.model is not None
    folder = Path(options.model)
    answers = None if options.open else options.answers or task_of(folder).answers
    model = Answering(folder, device_of(options.use_gpu), options.question, answers)
    rule = _rule(options, folder, model.num_exits)
    return Asked(model=model, rule=rule, max_new_tokens=options.max_new_tokens)


def _rule(options: AskOptions, folder: Path, num_exits: int) -> ExitRule:
    """As typed; else as calibrated, for the question and the candidates that the calibration is of."""
    if options.max_exit is not None and options.max_exit > num_exits:
        raise InputError(f"--max_exit: got {options.max_exit}; this model has exits 1 to {num_exits}.")
    is_own = options.answers is None and options.question in (None, task_of(folder).question)
    if options.exit_threshold is None and not options.open and is_own:
        if (calibration := read_calibration(folder, num_exits)) is not None:
            return calibration.rule(options.max_exit)
    threshold = NEVER if options.exit_threshold is None else options.exit_threshold
    return ExitRule(
        thresholds=(threshold,) * (num_exits - 1),
        measure=options.measure or "probability",
        max_exit=options.max_exit,
    )
