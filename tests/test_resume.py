"""A run that was stopped or killed at any moment, and then resumed, is the run that was not."""

import os
import random
import signal
import time

import pytest
from runs import (
    Job,
    arguments,
    forget_launch,
    largest_difference,
    launched,
    load_latest,
    records,
    resume,
    same_bits,
    start,
    state,
    tree,
)

from scalefl.cli import main
from scalefl.config import saved
from scalefl.console import Display
from scalefl.contracts import Interrupted
from scalefl.evaluate import Evaluator
from scalefl.federation.client import ClientTrainer

MANY_SAVES = {"save_every_seconds": 0.0, "KD_start": 0.0}
"""A checkpoint after every client; distillation does not depend on the number of rounds."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three rounds."""
    return start(tmp_path_factory.mktemp("whole"), **MANY_SAVES, num_rounds=3)


def assert_same_run(run_folder, expected, rounds=3):
    assert same_bits(state(run_folder, rounds), state(expected, rounds))
    assert records(run_folder) == records(expected)
    assert [record["round"] for record in records(run_folder)] == list(range(1, rounds + 1))
    results = [(folder / "results.json").read_text() for folder in (run_folder, expected)]
    assert results[0] == results[1]


def checkpoints(folder):
    """Names of a run's checkpoints, which change as its rounds begin and end."""
    return {path.name for path in folder.glob("run/checkpoints/round-*")}


@pytest.mark.slow
def test_killed_at_five_random_moments(tmp_path_factory):
    """kill -9, five times within one run: while it reads, trains, merges, evaluates or writes."""
    options = {**MANY_SAVES, "num_rounds": 30}
    started = time.monotonic()
    expected = start(tmp_path_factory.mktemp("expected"), **options)
    longest = (
        time.monotonic() - started
    ) / 12  # five of these do not reach the end, however fast the machine
    folder = tmp_path_factory.mktemp("killed")
    command = ["-m", "scalefl", *arguments(folder, **options)]
    moments, last = random.Random(7), set()
    for _ in range(5):
        with Job(folder, command) as job:
            job.wait_until(lambda before=last: checkpoints(folder) != before)  # it went on from there
            time.sleep(moments.uniform(0.0, longest))
            assert job.process.poll() is None, "the run is over already: train longer"
            os.kill(job.process.pid, signal.SIGKILL)
        last = checkpoints(folder)
        command = ["scalefl", "train", "--resume", str(folder / "run")]
    assert resume(folder / "run") == 0
    assert_same_run(folder / "run", expected, rounds=30)


def stop_at_step(monkeypatch, number, step):
    """Send this process a signal at a client's step, counted over the run."""
    steps = []
    shown = Display.client_step

    def client_step(self, *args):
        steps.append(args)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return shown(self, *args)

    monkeypatch.setattr(Display, "client_step", client_step)


@pytest.mark.parametrize(
    ("number", "step", "finished"),
    [(signal.SIGINT, 1, 0), (signal.SIGTERM, 7, 3), (signal.SIGUSR1, 10, 4), (signal.SIGTERM, 17, 3)],
    ids=["first step", "fourth client", "last step", "second round"],
)
def test_a_signal_in_mid_round(tmp_path, monkeypatch, whole, number, step, finished):
    """The round has 3 + 1 + 1 + 5 steps of four clients; those that had finished do not train again."""
    stop_at_step(monkeypatch, number, step)
    forget_launch()
    assert main(arguments(tmp_path, **MANY_SAVES, num_rounds=3)) == 128 + number
    monkeypatch.undo()
    last = load_latest(tmp_path / "run" / "checkpoints")
    assert last.folder_name == f"round-{1 + step // 11:04d}-part"
    assert len(last.partial.clients) == finished
    assert resume(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)
    assert not list((tmp_path / "run" / "checkpoints").glob("*part"))


def test_why_a_client_failed_is_told_though_the_run_was_stopped(tmp_path, monkeypatch):
    """Between its first attempt and the next."""
    train, attempts = ClientTrainer.train, []

    def failing(self, session, task, *args):
        attempts.append(task.client)
        if attempts.count(1) == 1 and task.client == 1:
            raise RuntimeError("a fault")
        if attempts.count(1) == 2 and task.client == 1:
            raise Interrupted(signal.SIGTERM)
        return train(self, session, task, *args)

    monkeypatch.setattr(ClientTrainer, "train", failing)
    forget_launch()
    assert main(arguments(tmp_path, num_rounds=1)) == 143
    assert resume(tmp_path / "run") == 0
    (record,) = records(tmp_path / "run")
    failures = {client["client"]: client["failures"] for client in record["clients"]}
    assert failures == {0: [], 1: ["RuntimeError: a fault"], 2: [], 3: []}


@pytest.mark.slow
def test_a_folder_is_one_run_s_at_a_time(tmp_path, capsys):
    """Also on a machine to which SLURM requeued, as long as the other one lives."""
    options = {**MANY_SAVES, "num_rounds": 1, "tuning": "lora", "base_store": "file", "precision": "bf16"}
    command = ["-m", "scalefl", *arguments(tmp_path, **{**options, "num_epoch": 5000, "print_freq": 1})]
    with Job(tmp_path, command) as job:
        job.wait_for("step 1/")
        before = tree(tmp_path / "run")
        (tmp_path / "two").mkdir()
        forget_launch()
        assert main(arguments(tmp_path, **{**options, "seed": 7})) == 2
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("scalefl:")]
        assert line.startswith(
            f"scalefl: --save_path {tmp_path / 'run'}: another process trains there; expected"
        )
        with launched(tmp_path / "two", "ddp", ["-m", "scalefl", *arguments(tmp_path, **options)]) as two:
            assert two.end() != 0
            assert two.running() == []
        assert [x for x in two.output.splitlines() if x.startswith("scalefl:")] == [line]
        assert tree(tmp_path / "run") == before
        os.kill(job.process.pid, signal.SIGKILL)
    forget_launch()
    assert main(arguments(tmp_path, **options)) == 0


def test_a_signal_in_evaluation(tmp_path, monkeypatch, whole):
    evaluate = Evaluator.level
    levels = []

    def level(self, *args):
        levels.append(args)
        if len(levels) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args)

    monkeypatch.setattr(Evaluator, "level", level)
    forget_launch()
    assert main(arguments(tmp_path, **MANY_SAVES, num_rounds=3)) == 143
    monkeypatch.undo()
    assert len(load_latest(tmp_path / "run" / "checkpoints").partial.clients) == 4
    assert resume(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_exit_code_and_time_of_a_stop(tmp_path, number):
    with Job(tmp_path, ["-m", "scalefl", *arguments(tmp_path, num_epoch=500, print_freq=5)]) as job:
        job.wait_for("step 5/")
        sent = time.monotonic()
        os.kill(job.process.pid, number)
        assert job.end() == 128 + number
    assert time.monotonic() - sent < 20, "a step and a checkpoint; the machine may be busy"
    assert "Traceback" not in job.output
    assert load_latest(tmp_path / "run" / "checkpoints").partial is not None


@pytest.mark.parametrize("typed", [[], ["--num_rounds", "2"], ["--num_rounds", "1"]])
def test_resuming_a_finished_run_does_nothing(tmp_path, typed):
    run_folder = start(tmp_path)
    before = tree(run_folder)
    assert resume(run_folder, *typed) == 0
    assert tree(run_folder) == before


def test_more_rounds_go_on_as_if_asked_for_at_once(tmp_path, whole):
    run_folder = start(tmp_path, **MANY_SAVES, num_rounds=1)
    assert resume(run_folder, "--num_rounds", "3") == 0
    assert_same_run(run_folder, whole)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """An uninterrupted run of two rounds of adapters."""
    return start(tmp_path_factory.mktemp("adapters"), tuning="lora", num_rounds=2)


def assert_same_but_for_rounding(run_folder, expected):
    """After the second round, to the last bits of its change."""
    before, got, whole = state(run_folder, 1), state(run_folder, 2), state(expected, 2)
    largest = max(float((whole[name] - before[name]).abs().max()) for name in whole)
    assert largest_difference(got, whole) < 1e-5 * largest


@pytest.mark.parametrize(
    "typed",
    [
        "--gradient_checkpointing --checkpointing_levels 2",
        "--base_store file",
        "--feature_cache off --eval_batch_size 8",
        "--feature_cache file",
        "--micro_batch_size 1 --attn eager",
    ],
)
def test_a_run_goes_on_with_less_memory(tmp_path, adapters, typed):
    """To the same weights but for the last bits."""
    run_folder = start(tmp_path, tuning="lora", num_rounds=1)
    assert resume(run_folder, "--num_rounds", "2", *typed.split()) == 0
    assert_same_but_for_rounding(run_folder, adapters)


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_a_run_goes_on_without_its_feature_folder(tmp_path, adapters, cache):
    """And is evaluated without it; what lies there stays as it is."""
    shared = tmp_path / "shared"
    run_folder = start(
        tmp_path, tuning="lora", num_rounds=1, feature_cache="file", feature_folder=str(shared)
    )
    features = tree(shared)
    assert features and resume(run_folder, "--num_rounds", "2", "--feature_cache", cache) == 0
    assert_same_but_for_rounding(run_folder, adapters)
    forget_launch()
    checkpoint = run_folder / "checkpoints" / "round-0001"
    assert main(["evaluate", str(checkpoint), "--feature_cache", cache]) == 0
    assert tree(shared) == features


def test_a_changed_option_is_refused_by_name(tmp_path, capsys):
    run_folder = start(tmp_path)
    before = tree(run_folder)
    capsys.readouterr()
    assert resume(run_folder, "--batch-size", "8", "--num_rounds", "3") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"scalefl: --batch_size: got 8, {run_folder} has 4; a saved run keeps it: drop the option, "
        "or start a new run."
    )
    assert tree(run_folder) == before


def test_resume_alone_means_the_folder_in_save_path(tmp_path, whole):
    """And starts a run where there is none yet: the same command line serves for both."""
    command = arguments(tmp_path, "--resume", **MANY_SAVES, num_rounds=3)
    forget_launch()
    assert main(command) == 0
    assert_same_run(tmp_path / "run", whole)
    before = tree(tmp_path / "run")
    forget_launch()
    assert main(["train", "--save_path", str(tmp_path / "run"), "--resume"]) == 0
    assert tree(tmp_path / "run") == before


def test_a_run_may_be_moved(tmp_path, whole):
    run_folder = start(tmp_path, **MANY_SAVES, num_rounds=1)
    run_folder.rename(tmp_path / "moved")
    assert resume(tmp_path / "moved", "--num_rounds", "3") == 0
    assert_same_run(tmp_path / "moved", whole)
    assert not run_folder.exists()


def test_resuming_into_another_folder_is_refused(tmp_path, capsys):
    run_folder = start(tmp_path)
    capsys.readouterr()
    other = tmp_path / "other"
    assert resume(run_folder, "--num_rounds", "3", "--save_path", str(other)) == 2
    assert capsys.readouterr().err.startswith(f"scalefl: --save_path: got {other}, but --resume goes on in ")
    assert not other.exists()


def test_lines_beyond_the_checkpoint_are_cut_and_lost_ones_do_not_hurt(tmp_path, whole):
    run_folder = start(tmp_path, **MANY_SAVES, num_rounds=1)
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"round": 2, "half')
    assert resume(run_folder, "--num_rounds", "2") == 0
    assert records(run_folder) == records(whole)[:2]
    (run_folder / "metrics.jsonl").unlink()
    assert resume(run_folder, "--num_rounds", "3") == 0
    assert records(run_folder) == records(whole)[2:]


def test_a_failure_while_the_config_is_written_leaves_the_earlier_one(tmp_path, monkeypatch, whole):
    run_folder = start(tmp_path, **MANY_SAVES, num_rounds=1)
    before = tree(run_folder)
    dumps = saved.json.dumps

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved.json, "dumps", fail)
    assert resume(run_folder, "--num_rounds", "3") == 2
    monkeypatch.setattr(saved.json, "dumps", dumps)
    assert tree(run_folder) == before
    assert resume(run_folder, "--num_rounds", "3") == 0
    assert_same_run(run_folder, whole)
