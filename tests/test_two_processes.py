"""Two processes that train every client together give what one gives; a stop leaves nothing behind."""

import os
import signal
import socket

import pytest
from runs import Job, arguments, largest_difference, nearly, records, start, state

from scalefl.checkpoint import load_latest

pytestmark = pytest.mark.slow

ROUNDING = 1e-5
"""Gradients of size 1 are summed in another order, 2^-24 a term; a dozen steps at rate 0.05 keep to this."""

OPTIONS = {"batch_size": 6, "num_rounds": 2, "num_epoch": 2, "KD_start": 0.0}
"""Steps of 6 leave an uneven last step for clients of 2, 10 and 18 examples."""


def launch(folder, **options):
    """The run under `accelerate launch` with two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--main_process_port", port, "-m", "scalefl", *arguments(folder, **options)]
    return Job(folder, command, ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize(
    "options",
    [
        {"tuning": "full", "micro_batch_size": 1},
        {"tuning": "lora", "lora_dropout": 0.0},
    ],
    ids=["full", "lora"],
)
def test_two_processes_equal_one(tmp_path, options):
    one = start(tmp_path, **OPTIONS, **options)
    (tmp_path / "two").mkdir()
    with launch(tmp_path / "two", **OPTIONS, **options) as job:
        assert job.end() == 0, job.output
    two = tmp_path / "two" / "run"
    assert "2 process(es)" in job.output
    assert job.output.count("round 1/2") == 1, "only rank 0 speaks"
    assert largest_difference(state(one, 2), state(two, 2)) <= ROUNDING
    for expected, got in zip(records(one), records(two), strict=True):
        assert got == nearly(expected, abs=1e-4)


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
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-0001-part"], job.output
    assert load_latest(tmp_path / "run" / "checkpoints").partial is not None
