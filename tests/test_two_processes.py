"""Two processes that train every client together give what one gives; a stop leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import (
    arguments,
    environment,
    largest_difference,
    launched,
    load_latest,
    nearly,
    records,
    same_bits,
    start,
    state,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

ROUNDING = 1e-5
"""Gradients of size 1 are summed in another order, 2^-24 a term; a dozen steps at rate 0.05 keep to this."""

OPTIONS = {"batch_size": 6, "num_rounds": 2, "num_epoch": 2, "KD_start": 0.0}
"""Steps of 6 leave an uneven last step for clients of 2, 10 and 18 examples."""


def launch(folder, engine="ddp", **options):
    """The run under `accelerate launch` with two processes."""
    return launched(folder, engine, ["-m", "scalefl", *arguments(folder, **options)])


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", {"tuning": "full", "micro_batch_size": 1}),
        ("ddp", {"tuning": "lora", "lora_dropout": 0.0}),
        ("zero2", {"tuning": "full", "micro_batch_size": 1}),
        (
            "zero3",
            {"tuning": "full", "micro_batch_size": 1, "scoring": "generate", "gradient_checkpointing": True},
        ),
    ],
)
def test_two_processes_equal_one(tmp_path, engine, options):
    """Adapters under every engine are in `test_matrix.py`."""
    one = start(tmp_path, **OPTIONS, **options)
    (tmp_path / "two").mkdir()
    with launch(tmp_path / "two", engine, **OPTIONS, **options) as job:
        assert job.end() == 0, job.last_lines
    two = tmp_path / "two" / "run"
    assert "2 process(es) on cpu" in job.output
    assert job.output.count("round 1/2") == 1, "only rank 0 speaks"
    assert largest_difference(state(one, 2), state(two, 2)) <= ROUNDING
    for expected, got in zip(records(one), records(two), strict=True):
        assert got == nearly(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("launcher", "settings", "processes"),
    [
        (["bash", "launch/multi_gpu.sh"], {"CPU": "1", "PROCESSES": "2"}, 2),
        ([*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m", "scalefl", "train"], {}, 2),
        (["bash", "launch/local.sh"], {}, 1),
        (["bash", "launch/local.sh", "--executor", "jobs", "--max_jobs", "2"], {}, 1),
    ],
    ids=["multi_gpu.sh", "torchrun", "local.sh", "local.sh, jobs"],
)
def test_whatever_starts_it_the_run_is_the_same(tmp_path, launcher, settings, processes):
    options = {**OPTIONS, "num_rounds": 1}
    one = start(tmp_path, **options)
    (tmp_path / "other").mkdir()
    command = [*launcher, *arguments(tmp_path / "other", **options)[1:]]
    settings = {
        "SCALEFL_PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        **settings,
    }
    done = subprocess.run(
        command, env=environment(**settings), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"{processes} process(es) on cpu" in done.stdout
    got, expected = state(tmp_path / "other" / "run", 1), state(one, 1)
    assert same_bits(got, expected) if processes == 1 else largest_difference(got, expected) <= ROUNDING


def test_a_batch_that_two_cannot_share(tmp_path):
    with launch(tmp_path, batch_size=3) as job:
        assert job.end() != 0
    assert "scalefl: --batch-size 3 cannot be shared by 2 processes" in job.output
    assert job.output.count("scalefl: --batch-size") == 1, "only rank 0 speaks"
    assert not (tmp_path / "run").exists()


def test_sigterm_leaves_a_checkpoint_and_no_process(tmp_path):
    with launch(tmp_path, num_epoch=500, print_freq=5) as job:
        job.wait_for("step 5/")
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.end(seconds=20) != 0
        assert job.running() == []
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-0001-part"], (
        job.last_lines
    )
    assert load_latest(tmp_path / "run" / "checkpoints").partial is not None


def test_no_process_ends_before_the_checkpoint_is_whole(tmp_path):
    """Else the launcher kills the one that still writes it. SIGUSR1, which gives it all the time it takes."""
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests" / "faults", ROOT, ROOT / "tests"))),
        "SCALEFL_FAULT": json.dumps({"kind": "slow save", "seconds": 3.0}),
    }
    command = ["-m", "scalefl", *arguments(tmp_path, num_epoch=500, print_freq=5)]
    with launched(tmp_path, "ddp", command, **variables) as job:
        job.wait_for("step 5/")
        processes = job.running()
        assert len(processes) == 3
        os.kill(max(set(processes) - {job.process.pid}), signal.SIGUSR1)
        checkpoint = tmp_path / "run" / "checkpoints" / "round-0001-part"
        end = time.monotonic() + 30
        while not checkpoint.exists():
            assert time.monotonic() < end, job.last_lines
            seen = job.running()
            time.sleep(0.02)
        assert seen == processes
        assert job.end(seconds=20) != 0
        assert job.running() == []
    assert load_latest(checkpoint.parent).partial is not None
