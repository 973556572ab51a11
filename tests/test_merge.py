"""Laws of cutting and merging, over the real tiny family and random levels."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from builders import Built, build_store
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalefl.aggregation.coverage_mean import CoverageMean
from scalefl.contracts import ClientUpdate, State
from scalefl.slicing.ops import add_coverage, add_into, cut

LEVELS = st.fixed_dictionaries(
    {
        "tuning": st.sampled_from(["full", "lora"]),
        "width_axes": st.sampled_from(["inner", "all"]),
        "kv_heads": st.sampled_from([2, 4]),
        "ratios": st.tuples(*[st.sampled_from([0.5, 0.6, 0.75, 0.9, 1.0])] * 2),
        "depths": st.tuples(*[st.integers(1, 3)] * 2),
    }
)
"""Two random levels; a third is always whole."""

EPSILON = torch.finfo(torch.float32).eps


@functools.cache
def federation(tuning: str, width_axes: str, kv_heads: int, ratios: tuple, depths: tuple) -> Built:
    return build_store(
        tuning=tuning,
        width_axes=width_axes,
        kv_heads=kv_heads,
        vertical_scale_ratios=(*ratios, 1.0),
        horizontal_scale_ratios=(*depths, 3),
    )


def bits(tensor: Tensor) -> Tensor:
    """So that -0.0 is not 0.0, and NaN is itself."""
    return tensor.contiguous().view(torch.int32)


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


def change(built: Built, level: int, seed: int, scale: float = 1.0) -> State:
    """Random changes from 1 to 2 in a level's shapes; scale 0 is a client that changed nothing."""
    generator = torch.Generator().manual_seed(seed)
    shapes = built.store.models.slices[level].trainable_shapes
    return {name: scale * (1 + torch.rand(shape, generator=generator)) for name, shape in shapes.items()}


def update(built: Built, client: int, level: int, num_examples: int, scale: float = 1.0) -> ClientUpdate:
    delta = change(built, level, client, scale)
    return ClientUpdate(client=client, level=level, delta=delta, num_examples=num_examples, metrics={})


def merge(built: Built, updates: Sequence[ClientUpdate], weighting: str = "examples") -> State:
    plans = {level: part.trainable_plan for level, part in built.store.models.slices.items()}
    aggregator = CoverageMean(built.state, plans, weighting)
    for one in updates:
        aggregator.add(one)
    return aggregator.finish()


def held(built: Built, levels: Sequence[int]) -> State:
    """How many of these levels hold each coordinate, counted from cuts of a numbered model."""
    counts = {name: torch.zeros_like(tensor) for name, tensor in built.state.items()}
    numbered = {name: torch.arange(t.numel()).view(t.shape) for name, t in built.state.items()}
    for level in levels:
        plan = built.store.models.slices[level].trainable_plan
        for name, numbers in cut(numbered, plan).items():
            counts[plan[name].global_name].view(-1)[numbers.reshape(-1)] += 1
    return counts


@settings(max_examples=15)
@given(LEVELS)
def test_cut_then_add_gives_the_global_model_back_where_it_is_held(levels: dict) -> None:
    built = federation(**levels)
    for level, part in built.store.models.slices.items():
        total = {name: torch.zeros_like(tensor) for name, tensor in built.state.items()}
        coverage = {name: torch.zeros_like(tensor) for name, tensor in built.state.items()}
        add_into(total, cut(built.state, part.trainable_plan), part.trainable_plan, 1.0)
        add_coverage(coverage, part.trainable_plan, 1.0)
        expected = held(built, [level])
        for name, tensor in built.state.items():
            assert torch.equal(coverage[name], expected[name]), name
            assert torch.equal(total[name], torch.where(expected[name] > 0, tensor, 0.0)), name
    assert all(bool((tensor == 1).all()) for tensor in coverage.values())  # the last level is whole


@settings(max_examples=15)
@given(LEVELS, st.sampled_from(["examples", "uniform"]))
def test_what_no_client_holds_keeps_its_value_bit_for_bit(levels: dict, weighting: str) -> None:
    built = federation(**levels)
    merged = merge(built, [update(built, client, level, 3) for client, level in enumerate((1, 2))], weighting)
    for name, count in held(built, [1, 2]).items():
        nobody = count == 0
        assert torch.equal(bits(merged[name])[nobody], bits(built.state[name])[nobody]), name
        assert not bool((merged[name] == built.state[name])[~nobody].any()) or nobody.all(), name


@settings(max_examples=10)
@given(LEVELS, st.sampled_from(["examples", "uniform"]))
def test_clients_that_changed_nothing_change_nothing_bit_for_bit(levels: dict, weighting: str) -> None:
    built = federation(**levels)
    built = replace(built, state={**built.state, "projector.bias": -torch.zeros(32)})  # 0.0 would be a change
    updates = [update(built, client, level, 7 + client, scale=0.0) for client, level in enumerate((1, 2, 3))]
    assert same_bits(merge(built, updates, weighting), built.state)


def test_no_client_at_all_changes_nothing() -> None:
    built = build_store()
    assert same_bits(merge(built, []), built.state)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_full_level_clients_merge_as_in_fedavg(tuning: str, weighting: str) -> None:
    """FedAvg in float64 on values. Ours sums 3 weighted changes in fp32: 6 roundings of means below 10."""
    built, examples = build_store(tuning=tuning), (5, 1, 13)
    updates = [update(built, client, 3, count) for client, count in enumerate(examples)]
    merged = merge(built, updates, weighting)
    shares = [count / sum(examples) if weighting == "examples" else 1 / 3 for count in examples]
    for name, value in built.state.items():
        trained = [value.double() + one.delta[name].double() for one in updates]
        expected = sum(share * client for share, client in zip(shares, trained, strict=True))
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=6 * 10 * EPSILON)


@settings(max_examples=8)
@given(LEVELS, st.sampled_from(["examples", "uniform"]))
def test_a_coordinate_is_the_mean_over_the_clients_that_hold_it(levels: dict, weighting: str) -> None:
    built = federation(**levels)
    updates = [update(built, client, level, 2 + 3 * client) for client, level in enumerate((1, 2, 2, 3))]
    merged = merge(built, updates, weighting)
    total = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in built.state.items()}
    weights = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in built.state.items()}
    numbered = {name: torch.arange(t.numel()).view(t.shape) for name, t in built.state.items()}
    for one in updates:
        weight = one.num_examples if weighting == "examples" else 1
        plan = built.store.models.slices[one.level].trainable_plan
        for name, at in cut(numbered, plan).items():
            target = plan[name].global_name
            total[target].view(-1)[at.reshape(-1)] += weight * one.delta[name].double().reshape(-1)
            weights[target].view(-1)[at.reshape(-1)] += weight
    for name, value in built.state.items():  # the last level is whole, so that every weight is positive
        expected = value.double() + total[name] / weights[name]
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=8 * 10 * EPSILON)


def test_the_order_of_clients_does_not_matter() -> None:
    """Up to 8 roundings (4 sums, a quotient, ...) of means below 10."""
    built = build_store(width_axes="all")
    updates = [update(built, client, level, 2 + 3 * client) for client, level in enumerate((1, 2, 3, 3))]
    orders = [merge(built, order) for order in itertools.permutations(updates)]
    for other in orders[1:]:
        for name, value in orders[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=8 * 10 * EPSILON)


def test_examples_weigh() -> None:
    """Reference defect 3. Two whole clients, 1 example at +1 and 3 examples at +5: the mean is 4, not 3."""
    built = build_store()
    built.state.update({name: torch.zeros_like(tensor) for name, tensor in built.state.items()})
    ones = {name: torch.ones_like(tensor) for name, tensor in built.state.items()}
    fives = {name: torch.full_like(tensor, 5.0) for name, tensor in built.state.items()}
    updates = [
        ClientUpdate(client=0, level=3, delta=ones, num_examples=1, metrics={}),
        ClientUpdate(client=1, level=3, delta=fives, num_examples=3, metrics={}),
    ]
    assert all(bool((tensor == 4).all()) for tensor in merge(built, updates).values())
    assert all(bool((tensor == 3).all()) for tensor in merge(built, updates, "uniform").values())


def test_memory_of_a_merge_does_not_grow_with_clients() -> None:
    built = build_store()
    aggregator = CoverageMean(built.state, {1: built.store.models.slices[1].trainable_plan}, "examples")
    assert not aggregator.sums, "ranks that add nothing hold nothing"
    aggregator.add(update(built, 0, 1, 2))
    before = [tensor.data_ptr() for part in aggregator.sums.values() for tensor in part.values()]
    for client in range(1, 5):
        aggregator.add(update(built, client, 1, 2))
    assert len(before) == len(built.state) + 1, "a change for every parameter, a weight for every level"
    assert before == [tensor.data_ptr() for part in aggregator.sums.values() for tensor in part.values()]
