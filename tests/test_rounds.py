"""Federated rounds: equal to a plain loop, exact where nothing is learned, honest about what went wrong."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from plain import plain_round
from runs import (
    PEAK_KILOBYTES,
    arguments,
    environment,
    federation,
    forget_launch,
    largest_difference,
    records,
    same_bits,
    start,
    state,
)

from scalefl.batches import step_order
from scalefl.cli import main
from scalefl.federation import rounds
from scalefl.federation.client import ClientTrainer
from scalefl.federation.rounds import learning_rate, sample_cohort
from scalefl.seeding import numpy_rng

NO_RATE = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.5}

SUM_ORDER = 5e-6
"""fp32 sums in another order (2^-24 a term), carried through 3 rounds of a few steps at rate 0.05."""


@pytest.mark.parametrize("recipe", ["scalefl", "paper"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_rounds_equal_a_plain_federation(tmp_path, recipe, tuning):
    """Deep copies, a loop over clients, numpy means: three rounds with half of six clients in each."""
    typed = ["--recipe", recipe, "--logit_adjustment", "off", "--tuning", tuning]
    typed += "--num_rounds 3 --sample_rate 0.5 --num_clients 6 --keep_last 9".split()
    run_folder = start(tmp_path, *typed)
    names = ("recipe", "logit_adjustment", "tuning", "num_rounds", "sample_rate", "num_clients", "keep_last")
    options = dict(zip(names, (recipe, "off", tuning, 3, 0.5, 6, 9), strict=True))
    fed = federation(tmp_path, **options)
    expected = fed.initial_state
    for number in (1, 2, 3):
        tasks = sample_cohort(fed.run, number, fed.clients, fed.client_levels)
        assert len(tasks) == 3
        expected = plain_round(fed.store, expected, fed.run, fed.batchers["train"], tasks)
        assert largest_difference(state(run_folder, number), expected) <= SUM_ORDER
    assert largest_difference(fed.initial_state, expected) > 1000 * SUM_ORDER


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_rate_zero_changes_nothing(tmp_path, tuning):
    run_folder = start(tmp_path, **NO_RATE, tuning=tuning)
    assert same_bits(state(run_folder, 2), federation(tmp_path, **NO_RATE, tuning=tuning).initial_state)


def spoil(monkeypatch, spoilt):
    """Clients in `spoilt` return an update with one value that is not finite."""
    train = ClientTrainer.train

    def broken(self, session, task, sent, lr):
        update = train(self, session, task, sent, lr)
        if task.client not in spoilt:
            return update
        delta = {name: tensor.clone() for name, tensor in update.delta.items()}
        next(iter(delta.values())).view(-1)[0] = math.inf
        return replace(update, delta=delta, metrics={**update.metrics, "loss": math.nan})

    monkeypatch.setattr(ClientTrainer, "train", broken)


def test_an_update_that_is_not_finite_is_left_out_and_recorded(tmp_path, monkeypatch, caplog):
    """After one more attempt."""
    spoil(monkeypatch, {1})
    run_folder = start(tmp_path, "--logit_adjustment", "off")
    assert caplog.text.count("it is left out of the round") == 2
    for record in records(run_folder):
        assert record["left_out"] == 1
        (failed,) = [c for c in record["clients"] if not c["delivered"]]
        assert failed["client"] == 1
        assert len(failed["failures"]) == 2
        assert all(text.startswith("update is not finite in ") for text in failed["failures"])
        assert "loss" not in failed
        assert math.isfinite(record["train_loss"])
    fed = federation(tmp_path, logit_adjustment="off")
    tasks = sample_cohort(fed.run, 1, fed.clients, fed.client_levels)
    others = [task for task in tasks if task.client != 1]
    expected = plain_round(fed.store, fed.initial_state, fed.run, fed.batchers["train"], others)
    assert largest_difference(state(run_folder, 1), expected) <= SUM_ORDER


def test_a_client_that_lacks_memory_takes_smaller_passes(tmp_path, monkeypatch):
    """As many examples a step, and the next client full passes again."""
    passes, train = [], ClientTrainer.train

    def out_of_memory_at_first(self, session, task, *args):
        passes.append((task.client, self.run.micro_batch_size))
        if len(passes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(self, session, task, *args)

    (tmp_path / "undisturbed").mkdir()
    undisturbed = start(tmp_path / "undisturbed", num_rounds=1)
    monkeypatch.setattr(ClientTrainer, "train", out_of_memory_at_first)
    run_folder = start(tmp_path, num_rounds=1)
    first, *others = [client["client"] for client in records(undisturbed)[0]["clients"]]
    assert passes == [(first, None), (first, 2), *((client, None) for client in others)]
    assert largest_difference(state(run_folder, 1), state(undisturbed, 1)) <= 1e-6
    assert records(run_folder)[0]["clients"][0]["failures"] == ["OutOfMemoryError: CUDA out of memory"]


def test_a_round_without_a_usable_update_leaves_the_model_as_it_was(tmp_path, monkeypatch, caplog):
    spoil(monkeypatch, {0, 1, 2, 3})
    run_folder = start(tmp_path, min_clients=0)
    assert same_bits(state(run_folder, 2), federation(tmp_path).initial_state)
    assert "round 1: no client delivered; the model stays as it was" in caplog.text
    assert [(r["left_out"], r["train_loss"]) for r in records(run_folder)] == [(4, None)] * 2


def test_training_that_diverges_is_survived(tmp_path):
    run_folder = start(tmp_path, lr=1e30, momentum=0.0, max_grad_norm=None, min_clients=0)
    assert all(bool(t.isfinite().all()) for t in state(run_folder, 2).values())
    assert len(records(run_folder)) == 2


def test_a_cohort_is_seeded_and_of_the_right_size(tmp_path):
    run = federation(tmp_path).run
    run = replace(run, num_clients=12, sample_rate=0.3)
    clients, levels = tuple((i,) for i in range(12)), [1, 2] * 6
    drawn = [sample_cohort(run, number, clients, levels) for number in range(1, 41)]
    assert {len(tasks) for tasks in drawn} == {4}  # 3.6, rounded
    assert all(len({task.client for task in tasks}) == 4 for tasks in drawn)
    assert len({tuple(task.client for task in tasks) for tasks in drawn}) > 30
    assert {task.client for tasks in drawn for task in tasks} == set(range(12))
    for task in drawn[0]:
        assert (task.level, task.example_ids, task.round) == (levels[task.client], clients[task.client], 1)
    assert drawn == [sample_cohort(run, number, clients, levels) for number in range(1, 41)]
    assert drawn != [sample_cohort(replace(run, seed=1), n, clients, levels) for n in range(1, 41)]
    assert [len(sample_cohort(replace(run, sample_rate=r), 1, clients, levels)) for r in (1e-6, 1.0)] == [
        1,
        12,
    ]


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"lr_schedule": "none"}, lambda t: 1.0),
        ({"lr_schedule": "multistep", "lr_milestones": (2, 5)}, lambda t: 0.5 ** ((t > 2) + (t > 5))),
        ({"lr_schedule": "exponential"}, lambda t: 0.5 ** (t - 1)),
        ({"lr_schedule": "cosine"}, lambda t: (1 + math.cos(math.pi * (t - 1) / 8)) / 2),
    ],
    ids=["none", "multistep", "exponential", "cosine"],
)
def test_learning_rate_over_rounds(tmp_path, options, rate):
    run = replace(federation(tmp_path).run, num_rounds=8, lr=0.2, lr_gamma=0.5, **options)
    got = [learning_rate(run, t) for t in range(1, 9)]
    assert got == pytest.approx([0.2 * rate(t) for t in range(1, 9)], rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_every_example_once_per_epoch(batch_size):
    ids = tuple(range(100, 107))
    options = {"batch_size": batch_size, "num_epoch": 3, "local_steps": None, "balanced": False}
    steps = step_order(ids, [0] * 7, **options, rng=numpy_rng(0, "test"))
    per_epoch = math.ceil(7 / batch_size)
    epochs = [steps[start : start + per_epoch] for start in range(0, 3 * per_epoch, per_epoch)]
    assert [sorted(int(i) for step in epoch for i in step) for epoch in epochs] == [list(ids)] * 3
    assert all(len(step) == batch_size for epoch in epochs for step in epoch[:-1])
    assert len({tuple(int(i) for step in epoch for i in step) for epoch in epochs}) == 3
    short = step_order(ids, [0] * 7, **options | {"local_steps": 2}, rng=numpy_rng(0, "test"))
    assert [step.tolist() for step in short] == [step.tolist() for step in steps[:2]]


def test_distillation_starts_after_its_share_of_the_rounds(tmp_path):
    """At 0.5 of 4 rounds: rounds 1 and 2 are those of a run without distillation, round 3 is not."""
    options = {"num_rounds": 4, "KD_start": 0.5, "keep_last": 9}
    runs = []
    for gamma in (0.0, 5.0):
        (folder := tmp_path / f"gamma{gamma}").mkdir()
        runs.append(start(folder, **options, KD_gamma=gamma))
    assert [same_bits(*(state(run, number) for run in runs)) for number in (1, 2, 3)] == [True, True, False]


def test_a_level_without_clients_is_evaluated_and_nothing_else(tmp_path):
    shares = {"client_split_ratios": [1.0, 0.0]}
    run_folder = start(tmp_path, **shares)
    initial = federation(tmp_path, client_split_ratios=[1.0, 0.0]).initial_state
    assert set(records(run_folder)[0]["evaluation"]["levels"]) == {"1", "2"}
    after, name = state(run_folder, 2), "language_model.model.layers.1.mlp.gate_proj.weight"
    assert same_bits({name: after[name]}, {name: initial[name]})  # the second layer is level 2's alone
    first = name.replace("layers.1", "layers.0")
    assert torch.equal(after[first][12:], initial[first][12:])  # so is its half of the first layer's channels
    assert not torch.equal(after[first][:12], initial[first][:12])


def test_the_whole_model_is_evaluated_where_no_level_is_whole(tmp_path):
    run_folder = start(tmp_path, vertical_scale_ratios=[0.5, 0.5])
    assert set(records(run_folder)[0]["evaluation"]["levels"]) == {"0", "1", "2"}


def test_local_mode_evaluates_each_level_on_its_own_clients_data_alone(tmp_path):
    options = {"evalmode": "local", "partitioner": "natural", "num_patients": 60, "num_rounds": 1}
    fed = federation(tmp_path, **options)
    sites = {c: {fed.data.splits["train"][i].site for i in ids} for c, ids in enumerate(fed.clients)}
    for split in ("val", "test"):
        for level, ids in fed.held_out[split].items():
            own = set().union(*(sites[c] for c, of in enumerate(fed.client_levels) if of == level))
            assert {fed.data.splits[split][i].site for i in ids} <= own
        dealt = sorted(i for ids in fed.held_out[split].values() for i in ids)
        assert dealt == list(range(len(fed.data.splits[split])))
    levels = records(start(tmp_path, **options))[0]["evaluation"]["levels"]
    counts = {str(level): len(ids) for level, ids in fed.held_out["val"].items()}
    assert {level: exits[0]["count"] for level, exits in levels.items()} == counts


def test_a_client_without_validation_data_works_in_local_mode(tmp_path):
    """8 clients and 3 validation patients: a level whose one client holds none of them has no row."""
    options = {"evalmode": "local", "num_clients": 8, "num_patients": 20, "partitioner": "iid"}
    options["client_split_ratios"] = [0.875, 0.125]
    held = federation(tmp_path, **options).held_out["val"]
    assert held[1] and not held[2]
    levels = [record["evaluation"]["levels"] for record in records(start(tmp_path, **options))]
    assert [set(of_round) for of_round in levels] == [{"1"}, {"1"}]


def test_the_test_split_never_selects(tmp_path, monkeypatch):
    """Every result on test grows with the rounds, on validation it falls: the first round is the best."""
    seen = []

    def evaluate(fed, split, at, check_stop):
        seen.append(split)
        value = len(seen) / 10 if split == "test" else 1 - len(seen) / 10
        row = {"count": 1, "loss": 1.0, "exact_match": None, "accuracy": value, "balanced_accuracy": value}
        return {"1": [{**row, "kappa": None, "mae": 0.0, "unparsable": 0}]}

    monkeypatch.setattr(rounds, "evaluate_levels", evaluate)
    run_folder = start(tmp_path, num_rounds=3)
    assert seen == ["val"] * 3
    assert (run_folder / "checkpoints" / "round-0001").is_dir()
    assert '"selected_round": 1' in (run_folder / "results.json").read_text()
    (other := tmp_path / "without").mkdir()
    seen.clear()
    run_folder = start(other, num_rounds=3, use_valid=False)
    assert seen == ["test"] * 3
    results = (run_folder / "results.json").read_text()
    assert '"selected_round": 3' in results and '"selected_by": "last round"' in results


PEAK = f"""
import sys, torch
torch.set_num_threads(1)
from scalefl.cli import main
code = main(sys.argv[1:])
print(code, {PEAK_KILOBYTES})
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_clients(tmp_path):
    """4 and 32 clients of 2 examples: 28 more trained slices of 1 MB are 28 MB; 12 is the heap's noise."""
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 2}
    model = {
        "vision": {**sizes, "num_hidden_layers": 1, "patch_size": 7},
        "text": {**sizes, "num_hidden_layers": 2, "max_position_embeddings": 128},
    }
    peaks = []
    for clients in (4, 32):
        (folder := tmp_path / str(clients)).mkdir()
        typed = f"--num_clients 32 --sample_rate {clients / 32} --partitioner iid --num_patients 46".split()
        command = arguments(folder, *typed, model=model, num_rounds=1)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *command], env=environment(), capture_output=True, text=True
        )
        code, peak_kib = done.stdout.splitlines()[-1].split()
        assert code == "0", done.stderr
        assert len(records(folder / "run")[0]["clients"]) == clients
        peaks.append(int(peak_kib) / 1024)
    assert peaks[1] - peaks[0] < 12, peaks


def test_a_run_is_not_written_over(tmp_path, capsys):
    run_folder = start(tmp_path)
    forget_launch()
    assert main(arguments(tmp_path)) == 2
    assert capsys.readouterr().err == (
        f"scalefl: --save_path {run_folder}: holds a run already (round-0002); "
        "expected --resume to go on with it, or another --save_path.\n"
    )
