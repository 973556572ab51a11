"""One client on a session equals a plain PyTorch loop, whoever was trained on the session before."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs
from plain import LEVEL, OneClient
from runs import arguments, environment, largest_difference, same_bits

from scalefl.config.derived import micro_batch_size
from scalefl.contracts import InputError
from scalefl.engine.launch import PROCESS_TIMEOUT
from scalefl.engine.zero import accelerator_arguments
from scalefl.federation.run import _check_agreement

ROOT = Path(__file__).resolve().parents[1]
LORA = {"tuning": "lora", "lora_r": 4, "optimizer": "sgd", "lr": 0.05}

SUM_ORDER = 2e-6
"""fp32 sums of some hundred terms of size 1 in another order, 100 x 2^-24, in a few steps of rate 0.05."""


def adam_noise(run, steps):
    """Adam divides g by |g| + 1e-8; rounding moves g by less than 5e-10, so a step by less than lr / 20."""
    return 0.05 * run.lr * steps


@pytest.mark.parametrize(("tuning", "micro_batch_size"), [({}, None), ({}, 1), ({}, 2), (LORA, 2)])
@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adamw", "lr": 1e-3, "momentum": 0.0, "weight_decay": 0.1},
    ],
    ids=["sgd", "adamw"],
)
def test_a_session_equals_a_plain_loop(tmp_path, tuning, micro_batch_size, optimizer):
    """10 examples in steps of 4: two whole ones and an uneven one, twice."""
    client = OneClient(tmp_path, **{"num_epoch": 2, **tuning, **optimizer}, micro_batch_size=micro_batch_size)
    got, expected = client.train(client.task()), client.plain(client.task())
    tolerance = SUM_ORDER if client.run.optimizer == "sgd" else adam_noise(client.run, steps=6)
    assert largest_difference(got, expected) <= tolerance
    assert all(float(tensor.abs().max()) > 10 * tolerance for tensor in expected.values() if tensor.any())
    assert sum(bool(tensor.any()) for tensor in expected.values()) > 0.9 * len(expected)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "momentum": 0.0, "lr": 1e-3}, LORA])
def test_a_client_does_not_see_the_one_before(tmp_path, options):
    client = OneClient(tmp_path, **options)
    later = client.task(client=3)
    assert same_bits(client.train(client.task(), client.task(count=5), later), client.train(later))


def test_a_collective_waits_for_longer_than_any_round(tmp_path):
    """PyTorch's own limit is half an hour with gloo, ten minutes with NCCL."""
    client = OneClient(tmp_path)
    assert client.trainer.engine._accelerator.init_handler.timeout == PROCESS_TIMEOUT >= timedelta(days=1)
    arguments = accelerator_arguments(client.run, use_gpu=False, timeout=PROCESS_TIMEOUT)
    kinds = {type(handler): handler for handler in arguments["kwargs_handlers"]}
    assert kinds[InitProcessGroupKwargs].timeout == PROCESS_TIMEOUT


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "adamw", "momentum": 0.0}])
def test_rate_zero_changes_nothing(tmp_path, optimizer, weight_decay):
    client = OneClient(tmp_path, **optimizer, weight_decay=weight_decay)
    assert not any(tensor.any() for tensor in client.train(client.task(), lr=0.0).values())


@pytest.mark.parametrize("tuning", [{}, LORA])
def test_bf16_computes_in_bf16_and_keeps_fp32_masters(tmp_path, tuning):
    plain = OneClient(tmp_path, **tuning)
    exact = plain.train(plain.task())
    client = OneClient(tmp_path, **tuning, precision="bf16")
    rounded = client.train(client.task())
    assert {tensor.dtype for tensor in rounded.values()} == {torch.float32}
    # A change smaller than bf16 can hold beside the weight (2^-9 of it) arrives all the same.
    sent = client.fed.store.models.level_state(LEVEL, client.state)
    small = [(rounded[n] != 0) & (rounded[n].abs() < sent[n].abs() * 2**-9) for n in rounded]
    assert any(bool(s.any()) for s in small)
    # bf16 rounds each of a dozen operations by up to 2^-9: some hundredths of the change as a whole.
    distance = sum(float((rounded[n] - exact[n]).square().sum()) for n in exact) ** 0.5
    size = sum(float(tensor.square().sum()) for tensor in exact.values()) ** 0.5
    assert 0 < distance < 0.1 * size


@pytest.mark.parametrize("tuning", [{}, LORA])
def test_gradient_checkpointing_gives_the_same_update(tmp_path, tuning):
    plain, saving = (
        OneClient(tmp_path, **tuning, gradient_checkpointing=on, micro_batch_size=2) for on in (False, True)
    )
    before, after = plain.train(plain.task()), saving.train(saving.task())
    assert largest_difference(before, after) <= SUM_ORDER
    assert any(tensor.any() for tensor in after.values())


def test_a_batch_is_shared_equally_or_refused(tmp_path):
    run = OneClient(tmp_path, batch_size=6).run
    shares = [(run, 1, 6), (run, 2, 3), (run, 3, 2), (replace(run, micro_batch_size=1), 3, 1)]
    assert [micro_batch_size(r, processes) for r, processes, _ in shares] == [size for *_, size in shares]
    for changes, processes, line in [
        ({}, 4, "--batch-size 6 cannot be shared by 4 processes in micro-batches of 1; "
                "expected a multiple of 4, such as 8, or fewer processes."),
        ({"batch_size": 1}, 2, "--batch-size 1 cannot be shared by 2 processes in micro-batches of 1; "
                               "expected a multiple of 2, such as 2, or fewer processes."),
        ({"micro_batch_size": 3}, 4, "--batch-size 6 cannot be shared by 4 processes in micro-batches of 3; "
                                     "expected a multiple of 12, such as 12, or fewer processes."),
    ]:  # fmt: skip
        with pytest.raises(InputError) as refusal:
            micro_batch_size(replace(run, **changes), processes)
        assert str(refusal.value) == line


DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json",
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"},
}
ZERO = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("launch", "config", "words"),
    [
        (
            {"WORLD_SIZE": "2"},
            None,
            "launch: WORLD_SIZE is 2, but RANK and MASTER_ADDR not set; unset it for one process, or start "
            "all with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            None,
            "launch: ACCELERATE_USE_DEEPSPEED is true, but RANK and",
        ),
        (
            DEEPSPEED | {"ACCELERATE_USE_CPU": "true"},
            ZERO,
            "launch: ACCELERATE_USE_CPU=true turns DeepSpeed off",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            None,
            "launch: mixed_precision bf16, but --precision is fp32;",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            None,
            "launch: gradient_accumulation_steps 4; expected",
        ),
        (DEEPSPEED, None, "ds.json: cannot read this DeepSpeed config ([Errno 2] No such file or directory"),
        (
            DEEPSPEED,
            {"zero_optimization": {}},
            "ds.json: zero_optimization.stage: got None; expected 1, 2 or 3.",
        ),
        (DEEPSPEED, ZERO | {"optimizer": {}, "bf16": {}}, "ds.json: optimizer, bf16: the run decides this"),
        (
            DEEPSPEED,
            ZERO | {"train_batch_size": 64, "gradient_accumulation_steps": 2},
            "ds.json: train_batch_size 64, gradient_accumulation_steps 2: the run decides this",
        ),
        (DEEPSPEED, [1], "ds.json: expected a JSON object, such as that of ds_configs/zero2.json."),
    ],
)
def test_a_wrong_launch_is_refused_at_once(tmp_path, launch, config, words):
    command = [sys.executable, "-m", "scalefl", *arguments(tmp_path)]
    if config is not None:
        (tmp_path / "ds.json").write_text(json.dumps(config))
    variables = environment(**launch, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("scalefl: ")]
    assert line.startswith(f"scalefl: {words}")
    assert not (tmp_path / "run").exists()


def test_processes_that_go_on_from_different_runs_are_refused(tmp_path):
    """As on a second machine that does not see the run's folder."""
    client = OneClient(tmp_path)
    here = client.engine.gather

    class Elsewhere:
        def gather(self, rows):
            return here(rows) + [json.dumps([json.loads(rows[0])[0], [3, []]])]

    with pytest.raises(InputError) as refusal:
        _check_agreement(client.run, None, Elsewhere())
    assert str(refusal.value) == (
        "launch: processes go on from different runs (round and finished clients by rank: [None, [3, []]]); "
        f"expected a --save_path that every machine sees, got {client.run.save_path}."
    )
    _check_agreement(client.run, None, client.engine)
