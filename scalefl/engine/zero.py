"""DeepSpeed: the config a launch brings, what the run adds to it, and sessions under ZeRO 1, 2 and 3.

Trainable parameters, gradients and optimizer state are fp32 whatever the precision: bf16 is torch's autocast
in every engine. DeepSpeed's own bf16 mode would round the parameters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from scalefl.config.options import RunConfig
from scalefl.contracts import InputError, State
from scalefl.engine.optimizers import forget
from scalefl.engine.session import Session

FROM_THE_RUN = ("optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "gradient_clipping")
"""Sections of a DeepSpeed config that options of the run decide."""

BATCH_SIZES: dict[str, tuple[object, ...]] = {
    "train_batch_size": ("auto",),
    "train_micro_batch_size_per_gpu": ("auto",),
    "gradient_accumulation_steps": ("auto", 1),
}
"""What a DeepSpeed config may say of batches."""

CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def accelerator_arguments(run: RunConfig, use_gpu: bool, timeout: timedelta) -> dict[str, Any]:
    """Arguments of `Accelerator` that make it run the launch's DeepSpeed config under this run's options."""
    if not use_gpu and torch.cuda.is_available():
        raise InputError(
            "--use_gpu: got 0 under DeepSpeed, which takes the GPUs it finds; "
            "expected CUDA_VISIBLE_DEVICES= in front of the command to hide them."
        )
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        raise InputError(
            "launch: ACCELERATE_USE_CPU=true turns DeepSpeed off without a word; expected a launch without "
            "it (DeepSpeed takes the CPU where there is no GPU)."
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimizer but its own
    # DeepSpeed 0.19 calls both once for every layer and step; PyTorch 2.13 says each time that they will go.
    for function in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{function}` is deprecated", FutureWarning)
    handlers = []
    if not use_gpu:
        # Without the backend named every process believes to be alone; and this op, which only gloo's
        # stand-in needs, is compiled for half a minute.
        handlers.append(InitProcessGroupKwargs(backend="gloo", timeout=timeout))
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        handlers.append(InitProcessGroupKwargs(timeout=timeout))
    return {
        "deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config_of(run)),
        "kwargs_handlers": handlers,
        "mixed_precision": "no",
    }


def config_of(run: RunConfig) -> dict[str, Any]:
    """The DeepSpeed config of the launch, with what the run decides filled in."""
    path = os.environ.get(CONFIG_FILE, "none")
    config = _read(path) if path != "none" else _from_launcher()
    if found := [key for key in FROM_THE_RUN if key in config]:
        raise InputError(
            f"{path}: {', '.join(found)}: the run decides this (--optimizer, --lr, --precision, "
            "--max_grad_norm); leave it out of the DeepSpeed config."
        )
    sizes = {name: config.get(name, "auto") for name in BATCH_SIZES}
    if set_there := [f"{name} {size}" for name, size in sizes.items() if size not in BATCH_SIZES[name]]:
        raise InputError(
            f"{path}: {', '.join(set_there)}: the run decides this (--batch_size, --micro_batch_size); "
            "leave it out of the DeepSpeed config."
        )
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise InputError(f"{path}: zero_optimization.stage: got {stage}; expected 1, 2 or 3.")
    config |= {
        "train_micro_batch_size_per_gpu": 1,  # what batches hold is ours; DeepSpeed only reports it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.max_grad_norm or 0.0,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW runs on the CPU without a compiler
        "zero_allow_untested_optimizer": True,
    }
    if run.precision == "bf16":
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # else gradients of linear layers would travel in bf16
        }
    config.pop("train_batch_size", None)
    return config


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot read this DeepSpeed config ({error}); expected a JSON file such as "
            "ds_configs/zero2.json; paths count from where the command is run."
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, such as that of ds_configs/zero2.json.")
    return config


def _from_launcher() -> dict[str, Any]:
    """What `accelerate launch --use_deepspeed --zero_stage N ...` says in the environment."""
    stage: dict[str, Any] = {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for part in ("optimizer", "param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device != "none":
            stage[f"offload_{part}"] = {"device": device}
    return {"zero_optimization": stage, "steps_per_print": 1 << 30}


def offloads(accelerator: Accelerator, part: str) -> bool:
    """Whether a part, `optimizer` or `param`, leaves the device; a section may say none."""
    return _zero(accelerator).get(f"offload_{part}", {}).get("device", "none") != "none"


def stage(accelerator: Accelerator) -> int:
    return int(_zero(accelerator)["stage"])


def in_words(accelerator: Accelerator) -> str:
    words = {"param": "weights", "optimizer": "optimizer"}
    moved = " and ".join(word for part, word in words.items() if offloads(accelerator, part))
    return f"ZeRO-{stage(accelerator)}" + (f" with {moved} offloaded" if moved else "")


def _zero(accelerator: Accelerator) -> dict[str, Any]:
    return accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]


def shard(accelerator: Accelerator, parameter: nn.Parameter) -> None:
    """Spread one parameter over the ranks, which all hold it: ZeRO-3 then never sees the whole model."""
    offload = _zero(accelerator).get("offload_param", {})
    deepspeed.zero.Init(
        module=nn.ParameterList([parameter]),
        mem_efficient_linear=False,
        remote_device=offload.get("device"),
        pin_memory=offload.get("pin_memory", False) and torch.cuda.is_available(),
    )


def release(accelerator: Accelerator) -> None:
    """Tear engines down, and drop what DeepSpeed 0.19 holds of ZeRO-3 engines for the life of the process.

    That is a stack of modules, and a cache on a method, whose keys are coordinators and modules.
    """
    parameter_offload.FWD_MODULE_STACK.clear()
    method = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in method.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    accelerator.free_memory()


class ZeroSession(Session):
    """A session on a DeepSpeed engine. Under ZeRO 1 and 2 frozen weights are the store's and stay whole."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, run: RunConfig) -> None:
        super().__init__(accelerator, model, run)
        if not isinstance(self._model, deepspeed.DeepSpeedEngine):
            raise RuntimeError(f"accelerate prepared a {type(self._model).__name__}, not a DeepSpeed engine")
        if self._model.zero_optimization_stage() != stage(accelerator):
            raise RuntimeError(f"DeepSpeed runs ZeRO-{self._model.zero_optimization_stage()}")
        self._is_sharded = stage(accelerator) == 3

    def load(self, state: Mapping[str, Tensor]) -> None:
        """As for any session; DeepSpeed's own fp32 copies of the parameters are overwritten as well."""
        with torch.no_grad(), self._whole(modified=True):
            if not self._is_sharded or self._accelerator.is_main_process:
                for name, parameter in self._trainable.items():
                    parameter.copy_(state[name])
        zero: Any = self._optimizer.optimizer
        zero.refresh_fp32_params()
        zero.zero_grad(set_to_none=True)
        forget(zero.optimizer)

    def _without_sync(self) -> Any:
        return contextlib.nullcontext()  # the accumulation boundary says it; ZeRO-2 has no other way

    def _backward(self, loss: Tensor, last: bool) -> None:
        self._model.set_gradient_accumulation_boundary(is_boundary=last)
        self._model.backward(loss)

    def _update(self) -> None:
        """Clips, as the engine's config says, and steps; the engine zeroes its gradients."""
        self._model.step()

    def delta(self, sent: Mapping[str, Tensor]) -> State:
        with self._whole(modified=False):
            return super().delta(sent) if self._accelerator.is_main_process else {}

    def _whole(self, *, modified: bool) -> Any:
        """All ranks enter; within, sharded trainable parameters are whole. Rank 0's changes are kept."""
        return deepspeed.zero.GatheredParameters(
            list(self._trainable.values()), modifier_rank=0 if modified else None, enabled=self._is_sharded
        )

    def close(self) -> None:
        forget(self._optimizer.optimizer.optimizer)
        self._trainable, self._model, self._optimizer, self._own_optimizer = {}, None, None, None
        release(self._accelerator)
