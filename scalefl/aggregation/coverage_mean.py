"""Coverage mean: every coordinate moves by the weighted mean over the clients that hold it.

Source: ScaleFL (CVPR 2023); unlike the reference implementation it weighs by examples and merges
changes instead of values, so that clients that changed nothing change nothing, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scalefl.contracts import ClientUpdate, State
from scalefl.slicing.ops import add_coverage, add_into
from scalefl.slicing.plan import Plan


class CoverageMean:
    """Streams sums of changes per coordinate and of weights per level: memory does not grow with clients."""

    def __init__(self, global_state: Mapping[str, Tensor], plans: Mapping[int, Plan], weighting: str) -> None:
        """`global_state` is fp32 on the CPU; `plans` are by level; `weighting` is "examples" or "uniform"."""
        self._global_state = global_state
        self._plans = plans
        self._weighting = weighting
        self.sums: dict[str, State] = {}
        """Empty until something is added: ranks that add nothing hold nothing."""

    def add(self, update: ClientUpdate) -> None:
        if "change" not in self.sums:
            self.sums["change"] = {n: torch.zeros_like(value) for n, value in self._global_state.items()}
            self.sums["level_weight"] = {str(level): torch.zeros(()) for level in self._plans}
        weight = float(update.num_examples) if self._weighting == "examples" else 1.0
        add_into(self.sums["change"], update.delta, self._plans[update.level], weight)
        self.sums["level_weight"][str(update.level)] += weight

    def finish(self) -> State:
        """The merged state; a coordinate that no client holds keeps its value."""
        if "change" not in self.sums:
            return dict(self._global_state)
        merged = {}
        for name, value in self._global_state.items():
            change, weight = self.sums["change"][name], self._weight(name, value)
            merged[name] = torch.where(change != 0, value + change / weight, value)  # keeps even a -0.0
        return merged

    def _weight(self, name: str, value: Tensor) -> Tensor:
        """What the clients that hold it weigh together, at every coordinate of one parameter."""
        total = {name: torch.zeros_like(value)}
        for level, plan in self._plans.items():
            holding = {local: entry for local, entry in plan.items() if entry.global_name == name}
            add_coverage(total, holding, float(self.sums["level_weight"][str(level)]))
        return total[name]
