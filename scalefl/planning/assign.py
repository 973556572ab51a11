"""Which sub-model each client trains: the largest that its machine can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from scalefl.contracts import InputError
from scalefl.planning.budgets import Budget
from scalefl.planning.predict import MARGIN, LevelPlan


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Levels, weakest first, and each client's."""

    levels: tuple[LevelPlan, ...]
    client_levels: tuple[int, ...]
    """Counted from 1."""
    client_names: tuple[str, ...]
    by_site: bool = False
    """Whether the names are those of sites: a run then deals each client its site's data."""

    def options(self) -> dict[str, object]:
        """The options of a run that trains by this assignment."""
        counts = [self.client_levels.count(level) for level in range(1, len(self.levels) + 1)]
        options: dict[str, object] = {"partitioner": "natural"} if self.by_site else {}
        return options | {
            "num_clients": len(self.client_levels),
            "client_levels": list(self.client_levels),
            "client_names": list(self.client_names),
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


def best_fit(budgets: Sequence[Budget], levels: Sequence[LevelPlan], remedies: str = "") -> Assignment:
    """Of the levels that fit a client, the one of most multiply-accumulates, then of most exits.

    Raises InputError with one line for each client that no level fits; `remedies` says what lowers a need.
    """
    order = sorted(range(len(levels)), key=lambda i: (levels[i].cost.macs, levels[i].spec.depth))
    smallest = min(levels, key=lambda level: level.need)
    chosen, problems = [], []
    for budget in budgets:
        fitting = [i + 1 for i in order if levels[i].need <= budget.memory]
        if fitting:
            chosen.append(fitting[-1])
        else:
            level = f"level {levels.index(smallest) + 1}"
            problems.append(_shortage(budget, smallest, f"the smallest, {level},", f"{remedies}, --search"))
    if problems:
        raise InputError("\n".join(problems))
    return _assignment(budgets, levels, chosen)


def search(budgets: Sequence[Budget], plans: SubModelPlans, remedies: str = "") -> Assignment:
    """For each client, the sub-model of most parameters, then of most multiply-accumulates, that fits.

    Over every depth and every width that keeps whole units. Raises InputError as `best_fit` does.
    """
    found: dict[int, LevelPlan | None] = {}
    for memory in sorted({budget.memory for budget in budgets}):
        found[memory] = largest_submodel(memory, plans)
    smallest = plans.submodel(1 / plans.width_units, 1)
    problems = [
        _shortage(budget, smallest, "the smallest sub-model", remedies)
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
    return _assignment(budgets, levels, [places[spec.width_ratio, spec.depth] for spec in taken])


def _assignment(
    budgets: Sequence[Budget], levels: Sequence[LevelPlan], client_levels: Sequence[int]
) -> Assignment:
    names = tuple(budget.client for budget in budgets)
    return Assignment(levels=tuple(levels), client_levels=tuple(client_levels), client_names=names)


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
        return plans.submodel(units / plans.width_units, depth).need

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


def _shortage(budget: Budget, smallest: LevelPlan, what: str, remedies: str) -> str:
    return (
        f"client {budget.client}: has {shown(budget.memory)}, {what} needs {shown(smallest.need)} "
        f"({MARGIN:.0%} to spare): {shown(smallest.need - budget.memory)} missing; "
        f"give it more memory, or lower the need: {remedies}."
    )


def shown(count: float) -> str:
    """Bytes for people."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} bytes"
