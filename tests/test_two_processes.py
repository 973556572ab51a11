"""Two processes that train every client together give what one gives; a stop leaves nothing behind."""

import os
import signal

import pytest
from runs import arguments, largest_difference, launched, load_latest, nearly, records, start, state

pytestmark = pytest.mark.slow

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
        assert job.end() == 0, job.output
    two = tmp_path / "two" / "run"
    assert "2 process(es) on cpu" in job.output
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
