"""Every option of local training reaches what it names: shown on the path a run takes."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from plain import OneClient, plain_round
from runs import federation, largest_difference, records, same_bits, start, state
from torch.optim.optimizer import register_optimizer_step_post_hook

from scalefl.batches import Batcher
from scalefl.federation.rounds import sample_cohort

SUM_ORDER = 2e-6
"""fp32 sums of some hundred terms of size 1 in another order, 100 x 2^-24, in a few steps of rate 0.05."""


@pytest.fixture
def rates():
    """The learning rate of every optimizer step, as the optimizer itself had it."""
    seen = []
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"])
    )
    yield seen
    hook.remove()


def test_the_rate_of_a_step_rises_to_that_of_its_round(tmp_path, rates):
    """Step k of every client and round: the round's rate x min(1, k / 4); the round's is halved by round."""
    schedule = {"lr": 0.08, "lr_schedule": "exponential", "lr_gamma": 0.5, "warmup_steps": 4}
    run_folder = start(tmp_path, **schedule, local_steps=6, num_rounds=3)
    warmed = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    expected = [
        0.08 * 0.5 ** (record["round"] - 1) * share
        for record in records(run_folder)
        for client in record["clients"]
        if client["examples"]
        for share in warmed
    ]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert [record["lr"] for record in records(run_folder)] == pytest.approx([0.08, 0.04, 0.02], rel=1e-12)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"lr_schedule": "multistep", "lr_milestones": [1, 2]}, (1, 0.1, 0.01)),
        ({"lr_schedule": "cosine"}, (1, 0.75, 0.25)),
        ({"lr_schedule": "none"}, (1, 1, 1)),
    ],
    ids=["multistep", "cosine", "none"],
)
def test_a_schedule_reaches_the_optimizer(tmp_path, rates, options, rate):
    """Cosine over 3 rounds: (1 + cos(pi t / 3)) / 2 at t = 0, 1, 2."""
    start(tmp_path, **options, local_steps=1, num_rounds=3, num_clients=2, partitioner="iid")
    assert rates == pytest.approx([0.05 * share for share in rate for _ in range(2)], rel=1e-12)


@pytest.mark.parametrize(
    "changed",
    [{"warmup_steps": 4}, {"local_steps": 2}, {"KD_T": 0.5}, {"KD_gamma": 0.0}, {"max_grad_norm": 0.5}],
    ids=lambda changed: next(iter(changed)),
)
def test_an_option_changes_a_client_as_it_changes_a_plain_loop(tmp_path, changed):
    """6 steps of 4 or 2 examples: 10 examples, twice; as much distillation as labels."""
    base = {"num_epoch": 2, "KD_gamma": 5.0}
    plain, client = (OneClient(tmp_path, **base | options) for options in ({}, changed))
    got = client.train(client.task())
    assert largest_difference(got, client.plain(client.task())) <= SUM_ORDER
    assert largest_difference(got, plain.train(plain.task())) > 100 * SUM_ORDER


def test_local_steps_count_steps_and_not_epochs(tmp_path):
    """Beyond one pass of the smaller clients, within one of the larger."""
    run_folder = start(tmp_path, local_steps=3, num_epoch=7)
    clients = [client for record in records(run_folder) for client in record["clients"]]
    assert {client["steps"] for client in clients if client["examples"]} == {3}
    assert len({client["examples"] for client in clients}) > 1


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_weighting_reaches_the_merge(tmp_path, weighting):
    options = {"weighting": weighting, "logit_adjustment": "off", "num_rounds": 1}
    run_folder = start(tmp_path, *(part for k, v in options.items() for part in (f"--{k}", str(v))))
    fed = federation(tmp_path, **options)
    tasks = sample_cohort(fed.run, 1, fed.clients, fed.client_levels)
    rounds = {
        how: plain_round(
            fed.store, fed.initial_state, replace(fed.run, weighting=how), fed.batchers["train"], tasks
        )
        for how in ("examples", "uniform")
    }
    assert largest_difference(rounds["examples"], rounds["uniform"]) > 100 * SUM_ORDER
    assert largest_difference(state(run_folder, 1), rounds[weighting]) <= SUM_ORDER


def test_eval_every_leaves_rounds_out_but_never_the_last(tmp_path):
    run_folder = start(tmp_path, eval_every=2, num_rounds=5)
    evaluated = [record["evaluation"] is not None for record in records(run_folder)]
    assert evaluated == [False, True, False, True, True]


@pytest.mark.parametrize("balanced", [False, True])
def test_balanced_sampling_draws_every_label_equally_often(tmp_path, monkeypatch, balanced):
    """A client of 9 knees of one grade and 1 of another, 30 passes: 300 draws, of which 150 +- 26 (3 sigma)
    are the rare one; without it exactly 30.
    """
    client = OneClient(tmp_path, balanced_sampling=balanced, num_epoch=30, batch_size=10)
    by_grade = {}
    for i, example in enumerate(client.batcher.examples):
        by_grade.setdefault(example.label, []).append(i)
    common, rare = sorted(by_grade.values(), key=len, reverse=True)[:2]
    seen = Counter()
    training = Batcher.training

    def count(self, ids, *args):
        seen.update(int(i) for i in ids)
        return training(self, ids, *args)

    monkeypatch.setattr(Batcher, "training", count)
    ids = tuple([*common, *common][:9]) if len(common) < 9 else tuple(common[:9])
    client.train(replace(client.task(), example_ids=(*ids, rare[0])), lr=0.0)
    assert sum(seen.values()) == 300
    assert (abs(seen[rare[0]] - 150) < 27) if balanced else (seen[rare[0]] == 30)


def test_augmentation_is_of_the_step_and_not_of_the_micro_batch(tmp_path):
    plain = OneClient(tmp_path)
    whole, halves = (OneClient(tmp_path, augment=True, micro_batch_size=size) for size in (4, 2))
    of_whole, of_halves = (client.train(client.task()) for client in (whole, halves))
    assert largest_difference(of_whole, of_halves) <= SUM_ORDER
    assert largest_difference(of_whole, plain.train(plain.task())) > 100 * SUM_ORDER
    assert same_bits(of_whole, whole.train(whole.task()))
    assert not any(tensor.any() for tensor in whole.train(whole.task(), lr=0.0).values())


def test_augmented_rounds_at_rate_zero_change_nothing(tmp_path):
    run_folder = start(tmp_path, augment=True, lr=0.0, weight_decay=0.5)
    assert same_bits(state(run_folder, 2), federation(tmp_path).initial_state)
    assert all(torch.isfinite(tensor).all() for tensor in state(run_folder, 2).values())
