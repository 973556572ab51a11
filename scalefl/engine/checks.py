"""What a launch must be before a run starts in it: a wrong one would train on silently."""

from __future__ import annotations

import os
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType

from scalefl.contracts import InputError


def asks_for_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def check_environment() -> None:
    """Several processes find each other by variables that a launcher sets."""
    missing = [name for name in ("RANK", "MASTER_ADDR") if name not in os.environ]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and missing:
        raise InputError(
            f"launch: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} not set; "
            "unset it for one process, or start all with ACCELERATE_USE_CPU=true accelerate launch "
            "--multi_gpu --num_processes N -m scalefl ..."
        )
    if asks_for_deepspeed() and missing:
        raise InputError(
            f"launch: ACCELERATE_USE_DEEPSPEED is true, but {' and '.join(missing)} not set; unset it, or "
            "start with accelerate launch --config_file accelerate_configs/zero2.yaml -m scalefl ..."
        )


def check_trackers(names: Sequence[str]) -> None:
    """Accelerate leaves out a tracker that is not installed without a word."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in (*installed, "all"):
            raise InputError(
                f"--report_to: got {name}, which is no installed tracker of Accelerate; installed: "
                f"{', '.join(installed) or 'none'}; install it, or drop the option."
            )


def check_launch(accelerator: Accelerator, has_zero: bool, precision: str, run_precision: str) -> None:
    """What was launched must be what runs: a wrong launch trains on silently."""
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != wanted:
        raise InputError(
            f"launch: {wanted} processes were started, but each believes to be one of "
            f"{accelerator.num_processes}; expected on CPUs: ACCELERATE_USE_CPU=true accelerate launch "
            "--multi_gpu --num_processes N -m scalefl ..."
        )
    kind = accelerator.distributed_type
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if kind not in ((DistributedType.DEEPSPEED,) if has_zero else kinds):
        wished = "DeepSpeed" if has_zero else "one process or DDP"
        raise InputError(
            f"launch: runs as {kind.value}; expected {wished}, as the launch asked for: "
            "see the first lines of accelerate_configs/*.yaml for commands that work."
        )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", run_precision):
        also = f", and pass --precision {asked}" if asked == "bf16" else ""
        raise InputError(
            f"launch: mixed_precision {asked}, but --precision is {run_precision}; expected --precision "
            f"alone to decide: leave mixed_precision out of the launch and its config file{also}."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"launch: gradient_accumulation_steps {accelerator.gradient_accumulation_steps}; expected it "
            "left out: --micro_batch_size divides a step into passes."
        )
    if accelerator.mixed_precision != precision:
        raise RuntimeError(f"accelerate runs in {accelerator.mixed_precision}, {precision} was asked for")
