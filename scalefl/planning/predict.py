"""What a level will cost and take in this run, for the configured levels and for any width and depth."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scalefl.config.options import RunConfig
from scalefl.config.planoptions import PlanOptions
from scalefl.contracts import InputError, LevelSpec
from scalefl.engine.optimizers import PAGED, check_optimizer
from scalefl.models.build import DTYPES, GlobalModel, plan_levels
from scalefl.models.cost import LevelCost, level_cost
from scalefl.models.submodels import WHOLE, SubModels
from scalefl.planning.estimate import Launch, MemoryEstimate, estimate
from scalefl.planning.standin import Held, StandIns, held_by
from scalefl.planning.subject import Subject
from scalefl.planning.trace import StepShape, trace_step

LABEL_PARTITIONERS = ("dirichlet", "pathological")
"""Those whose clients' logits are adjusted unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class LevelPlan:
    """One level, before anything is trained."""

    spec: LevelSpec
    cost: LevelCost
    round: MemoryEstimate
    """Of a process that trains clients of all levels, and holds the whole base for them."""
    own: MemoryEstimate
    """Of a process that holds this level's slice alone."""

    @property
    def size(self) -> tuple[int, int]:
        """Larger sub-models compare greater."""
        return self.cost.parameters, self.cost.macs


class Predictor:
    """Plans sub-models of one run."""

    def __init__(self, run: RunConfig, subject: Subject, options: PlanOptions) -> None:
        """Raises InputError for what a launch would refuse: its batch, its optimizer, its quantisation."""
        self._run, self._subject = run, subject
        self.micro_batch_size = _micro_batch_size(run, options.world_size)
        self.launch = Launch(
            optimizer=run.optimizer,
            momentum=run.momentum,
            zero_stage=options.zero_stage,
            offload=options.offload,
            world_size=options.world_size,
            accumulates=run.batch_size > self.micro_batch_size * options.world_size,
            device=_device(run, options),
        )
        offloaded = options.offload != "none"
        if self.launch.device == "cpu" or (offloaded and run.optimizer in PAGED):
            check_optimizer(run, torch.device("cpu"), offloaded=offloaded)
        self.caches_features = bool(run.freeze_vit) and run.feature_cache != "off" and not run.augment
        self._models = GlobalModel(run, subject.family, subject.config, {}).models
        if self.caches_features:
            self._models.drop_vision()
        self._found: dict[tuple[float, int], LevelPlan] = {}

    @property
    def num_exits(self) -> int:
        return len(self._models.config.exit_layers)

    @property
    def width_units(self) -> int:
        """Units of the narrowest axis that `--width_axes` cuts: multiples of 1 / units keep them whole."""
        kept = self._models.slices[self._models.levels[0]].spec.kept
        return min(self._models.axes[name].size for name in kept)

    @property
    def rounds_hold_all(self) -> bool:
        """Whether the process of a round holds the whole frozen base: not where it reads it from files."""
        store = self._run.base_store
        return store == "resident" or (store == "auto" and self.launch.zero_stage < 3)

    def levels(self) -> list[LevelPlan]:
        """The run's own, weakest first."""
        limited_to, plans = self._run.checkpointing_levels, []
        for level in self._models.levels:
            checkpoints = self._run.gradient_checkpointing and (not limited_to or level in limited_to)
            plans.append(self._plan(self._models, level, checkpoints))
        return plans

    def submodel(self, width: float, depth: int) -> LevelPlan:
        """The plan of any width and depth, as level 1."""
        if (width, depth) not in self._found:
            run = dataclasses.replace(
                self._run, vertical_scale_ratios=(width,), horizontal_scale_ratios=(depth,)
            )
            models = plan_levels(run, self._subject.family, self._subject.config)
            if self.caches_features:
                models.drop_vision()
            self._found[width, depth] = self._plan(models, 1, run.gradient_checkpointing)
        return self._found[width, depth]

    def _plan(self, models: SubModels, level: int, checkpoints: bool) -> LevelPlan:
        rows = self._micro_batch(self.micro_batch_size)
        mode = FakeTensorMode()
        model = self._stand_ins(models, checkpoints).make(level, mode)
        moments, held = trace_step(model, models.vocab_size, rows, mode), held_by(model)
        base, state = self._base, sum(math.prod(shape) for shape in models.trainable_shapes.values())
        whole = held
        if self.rounds_hold_all:
            whole = dataclasses.replace(
                held, frozen_bytes=base.frozen_bytes, frozen_elements=base.frozen_elements
            )
        sent = models.slice_bytes(level)
        return LevelPlan(
            spec=models.slices[level].spec,
            cost=level_cost(models, level, self._micro_batch(1).inputs()),
            round=estimate(whole, moments, self.launch).with_host(3 * 4 * state + sent),
            own=estimate(held, moments, self.launch).with_host(2 * sent),
        )

    @functools.cached_property
    def _base(self) -> Held:
        """The whole model."""
        return held_by(self._stand_ins(self._models, checkpoints=False).make(WHOLE, FakeTensorMode()))

    def _stand_ins(self, models: SubModels, checkpoints: bool) -> StandIns:
        run = dataclasses.replace(self._run, gradient_checkpointing=checkpoints)
        return StandIns(models=models, run=run, vit_dtype=self._vit_dtype)

    @property
    def _vit_dtype(self) -> torch.dtype:
        return DTYPES[self._subject.model_file.vit_precision]

    def _micro_batch(self, rows: int) -> StepShape:
        run, subject = self._run, self._subject
        size = subject.config.vision_config.image_size
        images: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "pixel_values": ((rows, 3, size, size), torch.float32)
        }
        if self.caches_features:
            dtype = DTYPES["bf16"] if run.precision == "bf16" else self._vit_dtype
            if run.feature_dtype != "auto":
                dtype = DTYPES[run.feature_dtype]
            images = {"image_features": ((rows, *subject.image_features), dtype)}
        skewed = run.partitioner in LABEL_PARTITIONERS and not run.balanced_sampling
        return StepShape(
            rows=rows,
            length=subject.length,
            answer_length=subject.answer_length,
            images=images,
            autocast=run.precision == "bf16",
            distill_weight=run.KD_gamma,
            temperature=run.KD_T,
            adjusts_logits=run.logit_adjustment == "on" or (run.logit_adjustment == "auto" and skewed),
        )


def _micro_batch_size(run: RunConfig, world_size: int) -> int:
    """Rows of a forward pass of one process."""
    size = run.micro_batch_size or run.batch_size // world_size
    if size < 1 or run.batch_size % (size * world_size):
        unit = max(size, 1) * world_size
        raise InputError(
            f"--world_size: {world_size} processes cannot share --batch_size {run.batch_size} in "
            f"micro-batches of {max(size, 1)}; expected a batch size that is a multiple of {unit}."
        )
    return size


def _device(run: RunConfig, options: PlanOptions) -> str:
    if options.device is not None:
        return options.device
    use_gpu = torch.cuda.is_available() if run.use_gpu is None else run.use_gpu
    return "cuda" if use_gpu else "cpu"
