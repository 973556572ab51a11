"""Where clients train does not matter: in one process, in several together, or in several apart."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from runs import (
    Job,
    arguments,
    environment,
    federation,
    forget_launch,
    largest_difference,
    launched,
    load_latest,
    nearly,
    records,
    resume,
    same_bits,
    start,
    state,
)

from scalefl.contracts import ClientTask, InputError
from scalefl.federation.client import ClientTrainer
from scalefl.federation.parallel import Parallel
from scalefl.federation.rounds import sample_cohort, trainer_of
from scalefl.federation.workload import deal, examples_trained
from scalefl.models.store import Store

ROOT = Path(__file__).resolve().parents[1]

ROUNDING = 1e-6
"""Sums of five clients' changes of size 0.1 in another order, 2^-24 a term, in two rounds; the change of the
weights is about 0.1.
"""

OPTIONS = {"num_clients": 5, "num_rounds": 2, "num_epoch": 2, "KD_start": 0.0}


def same_work(one, other):
    """The same clients on the same batches, by their recorded digests, and the same who did not deliver."""
    for ours, theirs in zip(records(one), records(other), strict=True):
        shown = [{c["client"]: c["batches"] for c in record["clients"]} for record in (ours, theirs)]
        assert shown[0] == shown[1]
        assert ours["missing"] == theirs["missing"]
        assert ours["evaluation"] == nearly(theirs["evaluation"], abs=1e-4)


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    """Runs of one process by their options, made once."""
    made = {}

    def run(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = start(tmp_path_factory.mktemp("sequential"), **OPTIONS, **options)
        return made[key]

    return run


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.4])
def test_one_process_alone_gives_the_same_bits(tmp_path, sequential, tuning, dropout_rate):
    options = {"tuning": tuning, "dropout_rate": dropout_rate}
    alone = start(tmp_path, executor="parallel", **OPTIONS, **options)
    expected = sequential(**options)
    assert same_bits(state(alone, 2), state(expected, 2))
    same_work(alone, expected)
    assert any(record["missing"] for record in records(alone)) == bool(dropout_rate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "processes", "tuning", "dropout_rate"),
    [
        ("parallel", 2, "full", 0.0),
        ("parallel", 2, "lora", 0.0),
        ("parallel", 2, "full", 0.4),
        ("parallel", 2, "lora", 0.4),
        ("parallel", 3, "full", 0.4),
        ("parallel", 3, "lora", 0.0),
        ("parallel", 7, "full", 0.4),
        ("sequential", 2, "full", 0.4),
        ("sequential", 2, "lora", 0.0),
    ],
)
def test_several_processes(tmp_path, sequential, executor, processes, tuning, dropout_rate):
    """Ranks apart or together. Seven are more than clients, so that some never train."""
    options = {"tuning": tuning, "dropout_rate": dropout_rate}
    command = ["-m", "scalefl", *arguments(tmp_path, executor=executor, **OPTIONS, **options)]
    with launched(tmp_path, "ddp", command, processes=processes) as job:
        assert job.end() == 0, job.last_lines
        assert job.running() == []
    expected = sequential(**options)
    assert largest_difference(state(tmp_path / "run", 2), state(expected, 2)) <= ROUNDING
    same_work(tmp_path / "run", expected)
    assert job.output.count("round 1/2") == 1, "only rank 0 speaks"


@pytest.mark.slow
@pytest.mark.parametrize("together", [{"executor": "sequential"}, {"executor": "parallel"}], ids=str)
def test_ranks_in_bf16_with_dropout_in_the_adapters(tmp_path, together):
    """A rank alone draws what one process draws; ranks together draw other dropout, so it is off for them."""
    dropout = 0.1 if together["executor"] == "parallel" else 0.0
    options = {**OPTIONS, "tuning": "lora", "precision": "bf16", "lora_dropout": dropout, "batch_size": 4}
    one = start(tmp_path, **options)
    folder = tmp_path / "two"
    folder.mkdir()
    with launched(folder, "ddp", ["-m", "scalefl", *arguments(folder, **options, **together)]) as job:
        assert job.end() == 0, job.last_lines
    change = largest_difference(state(one, 2), federation(tmp_path, tuning="lora").initial_state)
    bound = ROUNDING if together["executor"] == "parallel" else 0.02 * change
    assert largest_difference(state(one, 2), state(folder / "run", 2)) <= bound


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_a_stopped_run_goes_on_with_other_processes(tmp_path, sequential, processes):
    """Each rank leaves what it has; whoever goes on takes it all over, once."""
    options = {"tuning": "full", "dropout_rate": 0.0}
    more = {**OPTIONS, **options, "save_every_seconds": 0.0, "executor": "parallel"}
    with launched(tmp_path, "ddp", ["-m", "scalefl", *arguments(tmp_path, **more, print_freq=1)]) as job:
        job.wait_for("round 1/2")
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.end() != 0
        assert job.running() == []
    checkpoints = tmp_path / "run" / "checkpoints"
    assert load_latest(checkpoints) is not None
    if processes == 1:
        assert resume(tmp_path / "run") == 0
    else:
        command = ["-m", "scalefl", "train", "--resume", str(tmp_path / "run")]
        with launched(tmp_path, "ddp", command, processes=processes) as job:
            assert job.end() == 0, job.last_lines
    assert largest_difference(state(tmp_path / "run", 2), state(sequential(**options), 2)) <= ROUNDING
    same_work(tmp_path / "run", sequential(**options))
    assert not list(checkpoints.glob("rank-*")) + list(checkpoints.glob("*part"))


@pytest.mark.slow
def test_ranks_killed_at_random_moments(tmp_path):
    """kill -9 of either rank, five times in a run: the run ends, leaves nothing running, and goes on."""
    options = {**OPTIONS, "num_rounds": 40, "tuning": "full", "save_every_seconds": 0.0}
    (tmp_path / "one").mkdir()
    one = start(tmp_path / "one", **options)
    command = ["-m", "scalefl", *arguments(tmp_path, "--resume", executor="parallel", **options)]
    moments = random.Random(11)
    for trial in range(5):
        with launched(tmp_path, "ddp", command) as job:
            job.wait_for("client 0")
            time.sleep(moments.uniform(0.0, 1.0))
            ranks = sorted(number for number in job.running() if number != job.process.pid)
            assert len(ranks) == 2, "the run is over already: train longer"
            os.kill(ranks[trial % 2], signal.SIGKILL)
            assert job.end(seconds=60) != 0
            assert job.running() == []
            (line,) = [text for text in job.output.splitlines() if text.startswith("scalefl:")]
            assert line.endswith(f"; stopped; go on with `scalefl train --resume {tmp_path / 'run'}`.")
    assert resume(tmp_path / "run") == 0
    assert largest_difference(state(tmp_path / "run", 40), state(one, 40)) <= 40 * ROUNDING
    left = [path for pattern in ("rank-*", "*.tmp", "*.old", ".lock") for path in tmp_path.rglob(pattern)]
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("when", ["as they start", "as they train"])
def test_ranks_end_without_their_launcher(tmp_path, when):
    more = {**OPTIONS, "num_epoch": 5000, "executor": "parallel", "print_freq": 1}
    fault = faulty(tmp_path, "raise", rank=9, meeting=5.0)  # it may be gone before they can know it
    with launched(tmp_path, "ddp", ["-m", "scalefl", *arguments(tmp_path, **more)], **fault) as job:
        if when == "as they start":
            job.wait_until(lambda: len(job.running()) == 3)
        else:
            job.wait_for("step 1/")
        os.kill(job.process.pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while job.running() and time.monotonic() < end:
            time.sleep(0.1)
        assert job.running() == []


def faulty(folder, kind, **more):
    """Variables of processes in which the training of client 1 is hit, or as `more` says, once over all."""
    where = {} if "rank" in more else {"client": 1}
    fault = {**where, "kind": kind, "marks": str(folder / "marks"), **more}
    path = os.pathsep.join(map(str, (ROOT / "tests" / "faults", ROOT, ROOT / "tests")))
    return {"PYTHONPATH": path, "SCALEFL_FAULT": json.dumps(fault)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "times"), [("parallel", 1), ("sequential", 2)], ids=["apart", "together, both of them"]
)
def test_a_client_that_fails_is_tried_again(tmp_path, sequential, executor, times):
    options = {"tuning": "full", "dropout_rate": 0.0}
    command = ["-m", "scalefl", *arguments(tmp_path, executor=executor, **OPTIONS, **options)]
    with launched(tmp_path, "ddp", command, **faulty(tmp_path, "raise", times=times)) as job:
        assert job.end() == 0, job.last_lines
    assert largest_difference(state(tmp_path / "run", 2), state(sequential(**options), 2)) <= ROUNDING
    failures = {c["client"]: c["failures"] for c in records(tmp_path / "run")[0]["clients"]}
    assert failures == {0: [], 1: ["RuntimeError: a fault"], 2: [], 3: [], 4: []}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fault", "options", "cause", "code"),
    [
        (
            "sleep",
            {"grace": 4.0},
            {"executor": "parallel", "client_timeout": 5.0},
            "for longer than --client_timeout 5",
            75,
        ),
        ("raise", {"patience": 5.0}, {"executor": "sequential"}, "RuntimeError: a fault", 75),
        (
            "freeze",
            {"rank": 1, "silence": 3.0, "grace": 4.0},
            {"executor": "parallel"},
            "rank 1 has not been heard of for 3 s",
            75,
        ),
        (
            "freeze",
            {"rank": 0, "silence": 3.0, "grace": 4.0},
            {"executor": "parallel"},
            "rank 0 has not been heard of for 3 s",
            75,
        ),
        (
            "full disk",
            {"rank": 1},
            {"executor": "parallel"},
            "rank 1: CHECKPOINTS: No space left on device",
            None,  # 2 of the one, 75 of the other: whichever ends first
        ),
        (
            "raise in evaluation",
            {"rank": 1},
            {"executor": "parallel"},
            "scalefl: rank 1: RuntimeError: a fault; stopped",
            None,
        ),
        (
            "raise",
            {"times": 9},
            {"executor": "parallel", "client_retries": 0, "min_clients": 5},
            "4 client(s) delivered, --min_clients is 5; the last failure: RuntimeError: a fault",
            75,
        ),
    ],
    ids=[
        "one hangs",
        "one of two fails",
        "one is lost",
        "the first is lost",
        "no space",
        "a collective",
        "too few",
    ],
)
def test_what_ranks_cannot_mend_ends_the_run_resumably(
    tmp_path, sequential, kind, fault, options, cause, code
):
    """In one line. Of two that train a client together, the other waits in a collective for the one that
    failed.
    """
    tuning = {"tuning": "full", "dropout_rate": 0.0}
    more = {**OPTIONS, **tuning, **options, "save_every_seconds": 0.0}
    command = ["-m", "scalefl", *arguments(tmp_path, **more)]
    with launched(tmp_path, "ddp", command, **faulty(tmp_path, kind, **fault)) as job:
        assert job.end() != 0
        assert job.running() == []
    (line,) = [text for text in job.output.splitlines() if text.startswith("scalefl:")]
    cause = cause.replace("CHECKPOINTS", str(tmp_path / "run" / "checkpoints"))
    assert cause in line and line.endswith(f"go on with `scalefl train --resume {tmp_path / 'run'}`.")
    assert code is None or f"exitcode: {code}" in job.output.replace(" ", "").replace(":", ": ")
    assert resume(tmp_path / "run", "--executor", "sequential") == 0
    assert largest_difference(state(tmp_path / "run", 2), state(sequential(**tuning), 2)) <= ROUNDING


@pytest.mark.slow
def test_a_round_that_was_gathered_is_rank_0_s_alone(tmp_path, sequential):
    """Stopped in its evaluation, where rank 0 cannot save it: it is trained once more, with all it had."""
    options = {"tuning": "full", "dropout_rate": 0.0}
    more = {**OPTIONS, **options, "executor": "parallel", "eval_every": 2}
    fault = faulty(tmp_path, "stop in evaluation", rank=0)
    with launched(tmp_path, "ddp", ["-m", "scalefl", *arguments(tmp_path, **more)], **fault) as job:
        assert job.end() != 0
        assert job.running() == []
    assert "No space left on device" in job.output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-0001"]
    assert resume(tmp_path / "run") == 0
    assert largest_difference(state(tmp_path / "run", 2), state(sequential(**options), 2)) <= ROUNDING


@pytest.mark.slow
def test_who_has_finished_is_not_lost(tmp_path):
    """Rank 0 writes for longer than the silence after which it gives up on a rank."""
    more = {**OPTIONS, "num_rounds": 1, "tuning": "full", "executor": "parallel"}
    fault = faulty(tmp_path, "slow end", seconds=9, silence=3.0)
    with launched(tmp_path, "ddp", ["-m", "scalefl", *arguments(tmp_path, **more)], **fault) as job:
        assert job.end() == 0, job.last_lines
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.slow
def test_who_failed_on_another_rank_is_tried_again_at_once(tmp_path):
    """A rank with nobody else had saved its failure as the end of its round."""
    options = {**OPTIONS, "num_clients": 2, "num_rounds": 1}
    (tmp_path / "one").mkdir()
    one = start(tmp_path / "one", **options)
    more = {"executor": "parallel", "client_retries": 0, "min_clients": 2, "save_every_seconds": 0.0}
    fault = faulty(tmp_path, "raise", rank=1)
    with launched(
        tmp_path, "ddp", ["-m", "scalefl", *arguments(tmp_path, **options, **more)], **fault
    ) as job:
        assert job.end() != 0
    assert "1 client(s) delivered, --min_clients is 2" in job.output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-0001-part"]
    assert resume(tmp_path / "run") == 0
    assert largest_difference(state(tmp_path / "run", 1), state(one, 1)) <= ROUNDING
    failures = [c["failures"] for c in records(tmp_path / "run")[0]["clients"]]
    assert sorted(failures) == [[], ["RuntimeError: a fault"]]


@pytest.mark.slow
def test_a_signal_waits_for_the_checkpoint_of_one_process(tmp_path):
    """Nobody kills it, whatever else its watchdog is there for."""
    more = {**OPTIONS, "num_epoch": 5000, "client_timeout": 600.0, "print_freq": 1}
    fault = faulty(tmp_path, "slow save", seconds=4, grace=1.0)
    with Job(tmp_path, ["-m", "scalefl", *arguments(tmp_path, **more)], **fault) as job:
        job.wait_for("step 1/")
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.end() == 143, job.last_lines
    assert load_latest(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.slow
def test_a_client_that_hangs_in_one_process(tmp_path, sequential, monkeypatch):
    """What was saved in mid-round is not trained again."""
    options = {"tuning": "full", "dropout_rate": 0.0}
    more = {**OPTIONS, **options, "save_every_seconds": 0.0, "client_timeout": 4.0}
    fault = faulty(tmp_path, "sleep")
    with Job(tmp_path, ["-m", "scalefl", *arguments(tmp_path, **more)], **fault) as job:
        assert job.end() == 75
    (line,) = [text for text in job.output.splitlines() if text.startswith("scalefl:")]
    assert line.startswith("scalefl: client 1 (level 1), round 1 trains for longer than --client_timeout 4")
    saved = {record["client"] for record in load_latest(tmp_path / "run" / "checkpoints").partial.clients}
    trained, train = [], ClientTrainer.train
    monkeypatch.setattr(
        ClientTrainer,
        "train",
        lambda self, session, task, *args: (
            trained.append((task.round, task.client)) or train(self, session, task, *args)
        ),
    )
    assert resume(tmp_path / "run") == 0
    assert saved and {client for round, client in trained if round == 1} == set(range(5)) - saved
    assert same_bits(state(tmp_path / "run", 2), state(sequential(**options), 2))


ENDS_WHILE_THE_BOARD_IS_ASKED = """
import sys, time
from scalefl.engine import watchdog
from scalefl.engine.board import Board

watchdog.SECONDS_BETWEEN_LOOKS = 0.0
board, watching = Board(0, 1), watchdog.Watchdog(None, "go on")
watching.listen(board)
time.sleep(0.3)
sys.exit(3)
"""


def test_a_process_that_ends_by_itself_has_its_own_exit_code():
    """A thread that is in the board's C++ code when Python ends would abort the process."""
    variables = environment(RANK="0", MASTER_ADDR="127.0.0.1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", ENDS_WHILE_THE_BOARD_IS_ASKED]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 50)), max_size=30),
    st.integers(1, 8),
)
def test_every_task_is_dealt_once(shown, num_ranks):
    """No rank has more than the mean and one longest task; the order in which tasks come does not matter."""
    tasks = [
        ClientTask(client=client, level=level, round=1, example_ids=tuple(range(examples)))
        for client, (level, examples) in enumerate(shown)
    ]
    costs = {task.client: float(task.level * len(task.example_ids)) for task in tasks}
    ranks = deal(tasks, costs, num_ranks)
    assert sorted(task.client for mine in ranks for task in mine) == list(range(len(tasks)))
    loads = [sum(costs[task.client] for task in mine) for mine in ranks]
    assert max(loads) <= sum(costs.values()) / num_ranks + max(costs.values(), default=0.0) + 1e-9
    assert deal(tasks[::-1], costs, num_ranks) == ranks


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
@example([1, 1, 1, 1, 4], 2)  # as they come: 6
def test_the_longest_are_dealt_first(examples, num_ranks):
    """Graham's bound of that: 4/3 - 1/(3m) of the best that there is (SIAM J. Appl. Math. 17, 1969)."""
    tasks = [
        ClientTask(client=client, level=1, round=1, example_ids=tuple(range(count)))
        for client, count in enumerate(examples)
    ]
    ranks = deal(tasks, dict(enumerate(map(float, examples))), num_ranks)
    longest = max(sum(len(task.example_ids) for task in mine) for mine in ranks)
    best = min(
        max(sum(n for n, rank in zip(examples, to, strict=True) if rank == r) for r in range(num_ranks))
        for to in itertools.product(range(num_ranks), repeat=len(examples))
    )
    assert longest <= (4 / 3 - 1 / (3 * num_ranks)) * best + 1e-9


def test_each_rank_builds_a_level_once(tmp_path, monkeypatch):
    """Six clients of two levels, over two ranks."""
    built, submodel = [], Store.submodel

    def count(self, level, state, *, own, **settings):
        built.append(level)
        return submodel(self, level, state, own=own, **settings)

    fed = federation(tmp_path, num_clients=6)
    executor = Parallel(trainer_of(fed), fed)
    tasks = sample_cohort(fed.run, 1, fed.clients, fed.client_levels)
    monkeypatch.setattr(Store, "submodel", count)
    executor._num_ranks, trained = 2, []
    for executor._rank in (0, 1):
        built.clear()
        levels = [update.level for update in executor.train(tasks, fed.initial_state, 0.1)]
        assert built == sorted(set(levels))
        trained += levels
    assert sorted(trained) == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("options", [{"num_epoch": 2}, {"local_steps": 3}], ids=str)
def test_work_in_advance_is_the_work_that_is_done(tmp_path, options):
    """Steps of up to four examples."""
    run_folder = start(tmp_path, num_rounds=1, **options)
    run = federation(tmp_path, **options).run
    for client in records(run_folder)[0]["clients"]:
        examples, steps = examples_trained(run, client["examples"]), client["steps"]
        if run.local_steps is not None:
            assert (steps, examples) == (3, 3 * min(4, client["examples"]))
        else:
            assert examples == 2 * client["examples"] <= 4 * steps < examples + 8


def test_parallel_is_refused_under_deepspeed(tmp_path):
    engine = federation(tmp_path).engine
    engine._zero = object()
    with pytest.raises(InputError, match="--executor: got parallel under DeepSpeed"):
        engine.alone()
    forget_launch()
