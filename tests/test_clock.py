"""The virtual clock: simulated seconds by hand, and clients that come late or not at all."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import federation, largest_difference, records, resolved, same_bits, start, state

from scalefl.cli import main
from scalefl.contracts import ClientTask
from scalefl.federation.clock import client_seconds, simulate
from scalefl.models.cost import LevelCost

COSTS = {
    1: LevelCost(parameters=9, trainable=3, macs=1_000, bytes_each_way=200),
    2: LevelCost(parameters=90, trainable=30, macs=4_000, bytes_each_way=2_000),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config, _ = resolved(tmp_path_factory.mktemp("run"), num_epoch=3, client_flops=(6_000.0,))
    return config


def tasks(*levels, examples=10):
    return [
        ClientTask(client=client, level=level, round=1, example_ids=tuple(range(examples)))
        for client, level in enumerate(levels)
    ]


def test_seconds_of_a_client_by_hand(run):
    """6 operations x 1,000 MACs x 3 epochs x 10 examples at 6,000 FLOP/s; 2 x 200 bytes at 50 a second."""
    (weak, strong) = tasks(1, 2)
    assert client_seconds(run, weak, COSTS[1]) == 30
    assert client_seconds(run, strong, COSTS[2]) == 120
    linked = dataclasses.replace(run, client_bandwidth=(50.0,))
    assert client_seconds(linked, weak, COSTS[1]) == 30 + 8
    slow = dataclasses.replace(linked, level_speeds=(0.5, 1.0))
    assert client_seconds(slow, weak, COSTS[1]) == 60 + 8
    own = dataclasses.replace(slow, client_flops=(12_000.0, 6_000.0), client_bandwidth=(50.0, 1_000.0))
    assert client_seconds(own, weak, COSTS[1]) == 30 + 8
    assert client_seconds(own, strong, COSTS[2]) == 120 + 4
    steps = dataclasses.replace(run, local_steps=2, batch_size=4)
    assert client_seconds(steps, weak, COSTS[1]) == 8


def test_a_round_lasts_until_its_last_client_or_its_deadline(run):
    whole = simulate(run, tasks(1, 2, 1), COSTS)
    assert (whole.round_seconds, whole.missing) == (120, {})
    assert whole.seconds == {0: 30, 1: 120, 2: 30}
    cut = simulate(dataclasses.replace(run, round_deadline=100.0), tasks(1, 2, 1), COSTS)
    assert (cut.round_seconds, cut.missing) == (100, {1: "late"})
    in_time = simulate(dataclasses.replace(run, round_deadline=500.0), tasks(1, 2, 1), COSTS)
    assert (in_time.round_seconds, in_time.missing) == (120, {})
    all_late = simulate(dataclasses.replace(run, round_deadline=1.0), tasks(2, 1, 1), COSTS)
    assert (all_late.round_seconds, all_late.missing) == (30, {0: "late", 2: "late"}), "one must deliver"
    assert simulate(dataclasses.replace(run, client_flops=()), tasks(1, 2), COSTS).round_seconds is None


@given(rate=st.floats(0, 0.99), seed=st.integers(0, 9), least=st.integers(0, 6), number=st.integers(1, 99))
def test_dropout_is_drawn_by_client_and_round_and_leaves_enough(run, rate, seed, least, number):
    changed = dataclasses.replace(run, dropout_rate=rate, seed=seed, min_clients=least)
    shown = [dataclasses.replace(task, round=number) for task in tasks(*[1, 2] * 5)]
    missing = simulate(changed, shown, COSTS).missing
    assert missing == simulate(changed, shown[::-1], COSTS).missing
    assert len(missing) <= len(shown) - max(least, 1)
    assert set(missing.values()) <= {"dropped out"}
    if rate == 0:
        assert not missing


def test_the_share_that_drops_out_is_the_rate(run):
    changed = dataclasses.replace(run, dropout_rate=0.3)
    counts = [
        len(simulate(changed, [dataclasses.replace(t, round=r) for t in tasks(*[1] * 20)], COSTS).missing)
        for r in range(1, 101)
    ]
    share, deviation = sum(counts) / 2_000, math.sqrt(0.3 * 0.7 / 2_000)
    assert abs(share - 0.3) < 4 * deviation


def test_those_who_do_not_deliver_are_not_trained(tmp_path):
    """A run with stragglers left out is the run of the others; the clock stands beside the real one."""
    options = {"num_rounds": 1, "client_flops": [1e9], "client_bandwidth": [1e6], "level_speeds": [1.0, 1e-6]}
    late = start(tmp_path, **options, round_deadline=5.0)
    (record,) = records(late)
    levels = dict(enumerate(federation(tmp_path).client_levels))
    weak, strong = ([c for c in levels if levels[c] == level] for level in (1, 2))
    assert record["missing"] == {str(client): "late" for client in strong}
    assert [client["client"] for client in record["clients"]] == weak
    assert record["simulated_seconds"] == 5.0
    assert all(record["simulated_client_seconds"][str(c)] > 5 for c in strong)
    before, after = federation(tmp_path).initial_state, state(late, 1)
    plan = federation(tmp_path).store.models.slices[1].trainable_plan
    held = {entry.global_name for entry in plan.values()}
    others = {name for name in before if name not in held}
    assert others and same_bits({n: before[n] for n in others}, {n: after[n] for n in others})
    (tmp_path / "plain").mkdir()
    plain = start(tmp_path / "plain", num_rounds=1)
    assert largest_difference(state(plain, 1), after) > 0
    assert [r["simulated_seconds"] for r in records(plain)] == [None]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--round_deadline 5", "--round_deadline: is of the virtual clock, which needs --client_flops"),
        ("--client_flops 1e9 1e9", "--client_flops: got 2 numbers for 8 clients; expected one for all"),
        ("--client_flops 1e9 --level_speeds 1", "--level_speeds: got 1 numbers for 4 levels"),
        ("--dropout_rate 1", "--dropout_rate: got 1.0; expected a number at least 0 and below 1."),
        ("--min_clients 9", "--min_clients: got 9, but 8 train in a round; expected at most"),
        ("--max_jobs 2", "--max_jobs: belongs to --executor jobs, and this run has sequential;"),
        ("--executor jobs --base_store resident", "--base_store: got resident, but the processes of"),
        ("--data_here held_out", "--data_here: got held_out: clients bring their own data"),
    ],
)
def test_options_that_do_not_go_together(capsys, typed, line):
    assert main(["train", "--data", "synthetic", *typed.split()]) == 2
    assert capsys.readouterr().err.startswith(f"scalefl: {line}")
