"""Two processes that train every client together give what one gives; a stop leaves nothing behind."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import arguments, environment, largest_difference, records, start, state, wait_for

pytestmark = pytest.mark.slow

ROUNDING = 1e-5
"""Gradients of size 1 are summed in another order, 2^-24 a term; a dozen steps at rate 0.05 keep below this."""

OPTIONS = {"batch_size": 6, "num_rounds": 2, "num_epoch": 2, "KD_start": 0.0}
"""Steps of 6 leave an uneven last step for clients of 2, 10 and 18 examples."""


def launch(command):
    """The command under `accelerate launch` with two processes, as a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return subprocess.Popen(
        [*launcher, "--main_process_port", port, "-m", "scalefl", *command],
        env=environment(ACCELERATE_USE_CPU="true"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_of(folder):
    """Processes that still run with this folder on their command line: launcher and workers, in two sessions."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue  # gone, or no process
    return found


def finish(job, folder, seconds):
    """The job's output; nothing of it runs afterwards, whatever happens."""
    try:
        return job.communicate(timeout=seconds)[0]
    finally:
        for number in processes_of(folder):
            os.kill(number, signal.SIGKILL)
        job.wait()


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
    job = launch(arguments(tmp_path / "two", **OPTIONS, **options))
    output = finish(job, tmp_path, seconds=120)
    assert job.returncode == 0, output
    two = tmp_path / "two" / "run"
    assert "2 process(es)" in output
    assert output.count("round 1/2") == 1, "only rank 0 speaks"
    assert largest_difference(state(one, 2), state(two, 2)) <= ROUNDING
    for expected, got in zip(records(one), records(two), strict=True):
        assert got == approximately(expected)


def approximately(value):
    """The same record, with floats that may differ by rounding; grades that were predicted may not."""
    if isinstance(value, dict):
        return {key: approximately(part) for key, part in value.items()}
    if isinstance(value, list):
        return [approximately(part) for part in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


def test_a_batch_that_two_cannot_share(tmp_path):
    job = launch(arguments(tmp_path, batch_size=3))
    output = finish(job, tmp_path, seconds=60)
    assert "scalefl: --batch-size 3 cannot be shared by 2 processes" in output
    assert output.count("scalefl: --batch-size") == 1, "only rank 0 speaks"
    assert not (tmp_path / "run").exists()


def test_sigterm_leaves_a_checkpoint_and_no_process(tmp_path):
    job = launch(arguments(tmp_path, num_epoch=500, save_every_seconds=0.0))
    try:
        wait_for(lambda: (tmp_path / "run" / "run.json").exists() or job.poll() is not None)
        os.kill(job.pid, signal.SIGTERM)
        job.wait(timeout=20)
        left = processes_of(tmp_path)
    finally:
        output = finish(job, tmp_path, seconds=20)
    assert job.returncode != 0 and left == []
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-0001-part"], output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
