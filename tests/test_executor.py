"""The executor itself: one sub-model per level and round, the same updates with and without recomputation."""

import pytest
import torch
from plain import OneClient
from runs import federation, largest_difference, records, start, state
from transformers.models.llama.modeling_llama import LlamaMLP

from scalefl.aggregation.coverage_mean import CoverageMean
from scalefl.federation.rounds import sample_cohort
from scalefl.federation.sequential import Sequential
from scalefl.models.store import Store

SUM_ORDER = 2e-6
"""fp32 sums of some hundred terms of size 1 in another order, 100 x 2^-24, in a few steps of rate 0.05."""


def updates(folder, **options):
    """Of every client in round 1, by the sequential executor."""
    client = OneClient(folder, **options)
    tasks = sample_cohort(client.run, 1, client.fed.clients, client.fed.client_levels)
    executor = Sequential(client.trainer, client.fed)
    return {u.client: u for u in executor.train(tasks, client.state, client.run.lr)}


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_checkpointed_activations_give_the_same_updates(tmp_path, monkeypatch, tuning):
    """And are recomputed: every block of the language model runs twice for each micro-batch."""
    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    counts, results = [], []
    for on in (False, True):
        calls.clear()
        results.append(updates(tmp_path, tuning=tuning, gradient_checkpointing=on))
        counts.append(len(calls))
    off, on = results
    assert off.keys() == on.keys() == {0, 1, 2, 3}
    for client in off:
        assert largest_difference(off[client].delta, on[client].delta) <= SUM_ORDER
        assert any(tensor.any() for tensor in on[client].delta.values()) or not on[client].num_examples
    assert counts[1] == 2 * counts[0] > 0


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_submodel_is_built_once_per_level_and_round(tmp_path, monkeypatch, tuning):
    """6 clients of 2 levels, 3 rounds."""
    built = []
    submodel = Store.submodel

    def count(self, level, state, *, own, **settings):
        if own:
            built.append(level)
        return submodel(self, level, state, own=own, **settings)

    monkeypatch.setattr(Store, "submodel", count)
    run_folder = start(tmp_path, num_clients=6, num_rounds=3, tuning=tuning)
    assert built == [1, 2] * 3
    assert [len(record["clients"]) for record in records(run_folder)] == [6] * 3


class Backwards(Sequential):
    """For `--executor test_executor:Backwards`: the strongest clients first."""

    def order(self, tasks):
        return super().order(tasks)[::-1]


class HalfWay(CoverageMean):
    """For `--aggregation test_executor:HalfWay`: half of what the coverage mean would change."""

    def finish(self):
        merged = super().finish()
        return {name: (merged[name] + before) / 2 for name, before in self._global_state.items()}


class Counting(CoverageMean):
    """For `--aggregation test_executor:Counting`: begins with a sum of its own, which a checkpoint keeps."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sums["updates"] = {"count": torch.zeros(())}

    def add(self, update):
        super().add(update)
        self.sums["updates"]["count"] += 1

    def finish(self):
        counted.append(int(self.sums["updates"]["count"]))
        return super().finish()


counted: list[int] = []


def test_an_executor_of_ones_own_trains(tmp_path):
    """The order of clients does not matter, so the result is the same; the records show the order."""
    (tmp_path / "own").mkdir()
    plain = start(tmp_path, num_rounds=1)
    own = start(tmp_path / "own", "--executor", "test_executor:Backwards", num_rounds=1)
    assert largest_difference(state(plain, 1), state(own, 1)) <= SUM_ORDER
    orders = [[client["client"] for client in records(run)[0]["clients"]] for run in (plain, own)]
    assert orders[0] == orders[1][::-1]


def test_an_aggregation_of_ones_own_merges(tmp_path):
    (tmp_path / "own").mkdir()
    plain = start(tmp_path, num_rounds=1)
    own = start(tmp_path / "own", "--aggregation", "test_executor:HalfWay", num_rounds=1)
    before = federation(tmp_path).initial_state
    expected = {name: (tensor + before[name]) / 2 for name, tensor in state(plain, 1).items()}
    assert largest_difference(state(own, 1), expected) == 0
    assert largest_difference(state(plain, 1), before) > 100 * SUM_ORDER


def test_an_aggregation_of_ones_own_keeps_its_sums(tmp_path):
    counted.clear()
    start(tmp_path, "--aggregation", "test_executor:Counting", num_rounds=2)
    assert counted == [4, 4]
