"""Which sub-model each client trains: the largest that its machine can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from scalefl.contracts import InputError
from scalefl.planning.budgets import Budget
from scalefl.planning.predict import LevelPlan

MARGIN = 0.05
"""Share of the predicted peak that is kept free."""

MEND = (
    "give it more memory, or lower the need: a smaller --batch_size or --micro_batch_size, "
    "--gradient_checkpointing, --quantization nf4"
)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Levels, weakest first, and each client's."""

    levels: tuple[LevelPlan, ...]
    client_levels: tuple[int, ...]
    """Counted from 1."""

    def options(self) -> dict[str, object]:
        """The options of a run that trains by this assignment."""
        counts = [self.client_levels.count(level) for level in range(1, len(self.levels) + 1)]
        return {
            "num_clients": len(self.client_levels),
            "client_levels": list(self.client_levels),
            "vertical_scale_ratios": [plan.spec.width_ratio for plan in self.levels],
            "horizontal_scale_ratios": [plan.spec.depth for plan in self.levels],
            "client_split_ratios": [count / len(self.client_levels) for count in counts],
        }


class SubModelPlans(Protocol):
    """What a search asks; a `Predictor` is one."""

    @property
    def num_exits(self) -> int: ...

    @property
    def width_units(self) -> int: ...

    def submodel(self, width: float, depth: int) -> LevelPlan: ...


def need(plan: LevelPlan) -> int:
    """Bytes that a client's own process is to have for this sub-model."""
    return round(plan.own.total * (1 + MARGIN))


def best_fit(budgets: Sequence[Budget], levels: Sequence[LevelPlan]) -> Assignment:
    """Of the levels that fit a client, the one of most multiply-accumulates, then of most exits.

    Raises InputError with one line for each client that no level fits.
    """
    order = sorted(range(len(levels)), key=lambda i: (levels[i].cost.macs, levels[i].spec.depth))
    smallest = min(levels, key=need)
    chosen, problems = [], []
    for budget in budgets:
        fitting = [i + 1 for i in order if need(levels[i]) <= budget.memory]
        if fitting:
            chosen.append(fitting[-1])
        else:
            level = f"level {levels.index(smallest) + 1}"
            problems.append(_shortage(budget, smallest, f"the smallest, {level},", f"{MEND}, or --search"))
    if problems:
        raise InputError("\n".join(problems))
    return Assignment(levels=tuple(levels), client_levels=tuple(chosen))


def search(budgets: Sequence[Budget], plans: SubModelPlans) -> Assignment:
    """For each client, the sub-model of most parameters, then of most multiply-accumulates, that fits.

    Over every depth and every width that keeps whole units. Raises InputError as `best_fit` does.
    """
    found: dict[int, LevelPlan | None] = {}
    for memory in sorted({budget.memory for budget in budgets}):
        found[memory] = largest_submodel(memory, plans)
    smallest = plans.submodel(1 / plans.width_units, 1)
    problems = [
        _shortage(budget, smallest, "the smallest sub-model", MEND)
        for budget in budgets
        if found[budget.memory] is None
    ]
    if problems:
        raise InputError("\n".join(problems))
    chosen = {memory: plan for memory, plan in found.items() if plan is not None}
    distinct = {(plan.spec.width_ratio, plan.spec.depth): plan for plan in chosen.values()}
    levels = sorted(distinct.values(), key=lambda plan: plan.size)
    places = {(plan.spec.width_ratio, plan.spec.depth): level for level, plan in enumerate(levels, start=1)}
    taken = [chosen[budget.memory].spec for budget in budgets]
    return Assignment(
        levels=tuple(levels), client_levels=tuple(places[spec.width_ratio, spec.depth] for spec in taken)
    )


def largest_submodel(memory: int, plans: SubModelPlans) -> LevelPlan | None:
    """The largest sub-model that needs no more than `memory`; None if none does."""
    best: LevelPlan | None = None
    for depth in range(plans.num_exits, 0, -1):
        whole = plans.submodel(1.0, depth)
        if best is not None and whole.size <= best.size:
            break  # shallower ones are smaller still
        units = _most_units(memory, plans, depth)
        if units:
            plan = plans.submodel(units / plans.width_units, depth)
            best = plan if best is None or plan.size > best.size else best
    return best


def _most_units(memory: int, plans: SubModelPlans, depth: int) -> int:
    """The largest number of units of width whose sub-model fits; 0 if none does.

    A need grows with units, nearly in a straight line: the next guess lies on the line between the largest
    number that fits and the smallest that does not.
    """

    def needed(units: int) -> int:
        return need(plans.submodel(units / plans.width_units, depth))

    fits, exceeds = 1, plans.width_units
    if needed(exceeds) <= memory:
        return exceeds
    if needed(fits) > memory:
        return 0
    while exceeds - fits > 1:
        low, high = needed(fits), needed(exceeds)
        guess = fits + int((exceeds - fits) * (memory - low) / (high - low))
        guess = min(max(guess, fits + 1), exceeds - 1)
        fits, exceeds = (guess, exceeds) if needed(guess) <= memory else (fits, guess)
    return fits


def _shortage(budget: Budget, smallest: LevelPlan, what: str, mend: str) -> str:
    wanted = need(smallest)
    return (
        f"client {budget.client}: has {_shown(budget.memory)}, {what} needs {_shown(wanted)} "
        f"({MARGIN:.0%} to spare): {_shown(wanted - budget.memory)} missing; {mend}."
    )


def _shown(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
