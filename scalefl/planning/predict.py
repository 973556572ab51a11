"""What a level will cost and take in this run, for the configured levels and for any width and depth."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scalefl.batches import Candidates
from scalefl.config.derived import (
    adjusts_logits,
    caches_features,
    check_attention,
    checkpoints,
    feature_dtype,
    holds_whole_base,
    micro_batch_size,
    uses_gpu,
)
from scalefl.config.options import RunConfig
from scalefl.config.planoptions import PlanOptions
from scalefl.contracts import LevelSpec
from scalefl.engine.optimizers import PAGED, check_optimizer
from scalefl.evaluate import TOKENS_BEYOND
from scalefl.features import FEATURE_BATCH
from scalefl.models.build import ModelSource, plan_levels
from scalefl.models.cost import LevelCost, level_cost
from scalefl.models.holding import DTYPES, Holding
from scalefl.models.submodels import WHOLE, SubModels
from scalefl.planning.estimate import Launch, MemoryEstimate, estimate, estimate_inference
from scalefl.planning.standin import Held, StandIns, held_by
from scalefl.planning.subject import PLACEHOLDER_ID, Subject
from scalefl.planning.trace import StepShape, trace_features, trace_scoring, trace_step

MARGIN = 0.05
"""Share of the predicted peak that is kept free."""
RUNTIME = {"cpu": 500_000_000, "cuda": 600_000_000}
"""Bytes of Python and its libraries (measured: 440 MB), or of a GPU's context and libraries (assumed)."""

KERNELS = {"fp32": 8 << 20, "bf16": 24 << 20}
"""Bytes that PyTorch's kernels take on the CPU beside tensors, by precision: measured with a model of next to
no weight (benchmarks/plan_accuracy.py --small).
"""


@dataclass(frozen=True, kw_only=True)
class LevelPlan:
    """One level, before anything is trained."""

    spec: LevelSpec
    cost: LevelCost
    round: MemoryEstimate
    """Training, in a process that trains clients of all levels, and holds the whole base for them."""
    own: MemoryEstimate
    """Training, in a process that holds this level's slice alone."""
    evaluation: MemoryEstimate
    """Scoring held-out examples, in the process of a round."""
    need: int
    """Bytes that a client's machine is to have for a process of its own, from its features to its change."""

    @property
    def size(self) -> tuple[int, int]:
        """Larger sub-models compare greater."""
        return self.cost.parameters, self.cost.macs


class Predictor:
    """Plans sub-models of one run."""

    def __init__(self, run: RunConfig, subject: Subject, options: PlanOptions) -> None:
        """Raises InputError for what a launch would refuse: its batch, its optimizer, its quantisation."""
        self._run, self._subject = run, subject
        self.micro_batch_size = micro_batch_size(run, options.world_size)
        self.launch = Launch(
            optimizer=run.optimizer,
            momentum=run.momentum,
            zero_stage=options.zero_stage,
            offload=options.offload,
            world_size=options.world_size,
            accumulates=run.batch_size > self.micro_batch_size * options.world_size,
            device=_device(run, options),
            kernels=KERNELS[run.precision] if _device(run, options) == "cpu" else 0,
        )
        offloaded = options.offload != "none"
        if self.launch.device == "cpu" or (offloaded and run.optimizer in PAGED):
            check_optimizer(run, torch.device("cpu"), offloaded=offloaded)
        check_attention(run, self.launch.device)
        self.caches_features = caches_features(run)
        self.rounds_hold_all = holds_whole_base(run, shards_weights=options.zero_stage == 3)
        """Whether the process of a round holds the whole frozen base: not where it reads it from files."""
        self._models = ModelSource(run, subject.family, subject.config, {}).models
        self._looking: MemoryEstimate | None = None
        if self.caches_features:
            self._looking = self._feature_pass()
            self._models.drop_vision()
        self._found: dict[tuple[float, int], LevelPlan] = {}

    @property
    def features(self) -> MemoryEstimate | None:
        """Of the vision tower's pass over every image, in a round's process, before the base is there."""
        if self._looking is None:
            return None
        return self._looking.with_states(_state_bytes(self._models), device=self.launch.device)

    @property
    def num_exits(self) -> int:
        return len(self._models.config.exit_layers)

    @property
    def width_units(self) -> int:
        """Units of the narrowest axis that `--width_axes` cuts: multiples of 1 / units keep them whole."""
        kept = self._models.slices[self._models.levels[0]].spec.kept
        return min(self._models.axes[name].size for name in kept)

    @property
    def bytes_of_image(self) -> int:
        """What a run keeps of an image in host memory: its features, or its pixels in 8 bits, in colour."""
        if not self.caches_features:
            return 3 * self._subject.config.vision_config.image_size**2
        ((shape, dtype),) = self._micro_batch(1).images.values()
        return math.prod(shape) * dtype.itemsize if self._run.feature_cache != "file" else 0

    def levels(self) -> list[LevelPlan]:
        """The run's own, weakest first."""
        return [
            self._plan(
                self._models,
                level,
                dataclasses.replace(self._run, gradient_checkpointing=checkpoints(self._run, level)),
            )
            for level in self._models.levels
        ]

    def submodel(self, width: float, depth: int) -> LevelPlan:
        """The plan of any width and depth, as level 1."""
        if (width, depth) not in self._found:
            run = dataclasses.replace(
                self._run, vertical_scale_ratios=(width,), horizontal_scale_ratios=(depth,)
            )
            models = plan_levels(run, self._subject.family, self._subject.config)
            if self.caches_features:
                models.drop_vision()
            self._found[width, depth] = self._plan(models, 1, run)
        return self._found[width, depth]

    def _plan(self, models: SubModels, level: int, run: RunConfig) -> LevelPlan:
        """`run` is as the level trains: its gradient_checkpointing is the level's."""
        rows = self._micro_batch(self.micro_batch_size)
        mode = FakeTensorMode()
        model = self._stand_ins(models, run).make(level, mode)
        moments, held = trace_step(model, models.vocab_size, rows, mode), held_by(model)
        sent, state = models.slice_bytes(level), _state_bytes(models)
        device = self.launch.device
        own = estimate(held, moments, self.launch).with_states(sent, sent, device=device)
        whole = estimate(self._in_round(held), moments, self.launch)
        return LevelPlan(
            spec=models.slices[level].spec,
            cost=level_cost(models, level, self._micro_batch(1).inputs()),
            round=whole.with_states(2 * state, sent, device=device),  # the state, and the sum of changes
            own=own,
            evaluation=self.evaluation(models, level),
            need=self._need(own, sent),
        )

    def evaluation(self, models: SubModels, level: int) -> MemoryEstimate:
        """Of one level in the process of a round."""
        mode = FakeTensorMode()
        model = self._stand_ins(models, _forward_only(self._run)).make(level, mode)
        rows = self._micro_batch(self._run.eval_batch_size)
        generated = self._subject.answer_length + TOKENS_BEYOND if self._run.scoring == "generate" else 0
        held = self._in_round(held_by(model))
        model.requires_grad_(False)  # as a store's: of weights that require none autocast keeps no copies
        moments = trace_scoring(model, models.vocab_size, rows, self._candidates, generated, mode)
        if self.launch.device == "cpu":  # there the trained part is views of the state
            held = dataclasses.replace(held, trainable=())
        states = 3 * _state_bytes(models)  # the one before, the sum of changes, and what was merged of both
        return estimate_inference(held, moments, self.launch).with_states(states, device=self.launch.device)

    def evaluation_of_whole(self, levels: Sequence[LevelPlan]) -> MemoryEstimate | None:
        """Of the whole model, which is evaluated where no level is the whole."""
        if any(self._models.is_whole(level.spec) for level in levels):
            return None
        return self.evaluation(self._models, WHOLE)

    def _feature_pass(self) -> MemoryEstimate:
        mode, size = FakeTensorMode(), self._subject.config.vision_config.image_size
        tower = self._stand_ins(self._models, self._run).tower(mode)
        moments = trace_features(
            tower,
            self._subject.family.encode_images,
            images=(FEATURE_BATCH, 3, size, size),
            autocast=self._run.precision == "bf16",
            mode=mode,
        )
        alone = dataclasses.replace(self.launch, zero_stage=0)  # no engine has it yet
        return estimate_inference(held_by(tower), moments, alone)

    def _in_round(self, held: Held) -> Held:
        if not self.rounds_hold_all:
            return held
        base = self._base
        return dataclasses.replace(held, frozen_bytes=base.frozen_bytes, frozen_elements=base.frozen_elements)

    def _need(self, own: MemoryEstimate, sent: int) -> int:
        """Of a client's own process: first it looks at its images, beside what it was `sent`, then trains."""
        device = self.launch.device
        phases = [own]
        if self._looking is not None:
            phases.append(self._looking.with_states(sent, device=device))
        return round(max(phase.on(device) for phase in phases) * (1 + MARGIN)) + RUNTIME[device]

    @functools.cached_property
    def _base(self) -> Held:
        """The whole model."""
        return held_by(self._stand_ins(self._models, self._run).make(WHOLE, FakeTensorMode()))

    @property
    def _candidates(self) -> Candidates:
        """As many answers as the run's, each as long as the longest; which tokens they are is all one."""
        return Candidates(ids=((PLACEHOLDER_ID,) * self._subject.answer_length,) * len(self._run.answers))

    def _stand_ins(self, models: SubModels, run: RunConfig) -> StandIns:
        vit_dtype = DTYPES[self._subject.model_file.vit_precision]
        return StandIns(holding=Holding(run=run, models=models, vit_dtype=vit_dtype))

    def _micro_batch(self, rows: int) -> StepShape:
        run, subject = self._run, self._subject
        size = subject.config.vision_config.image_size
        images: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "pixel_values": ((rows, 3, size, size), torch.float32)
        }
        if self.caches_features:
            dtype = DTYPES[feature_dtype(run, subject.model_file.vit_precision)]
            images = {"image_features": ((rows, *subject.image_features), dtype)}
        return StepShape(
            rows=rows,
            length=subject.length,
            answer_length=subject.answer_length,
            images=images,
            autocast=run.precision == "bf16",
            distill_weight=run.KD_gamma,
            temperature=run.KD_T,
            adjusts_logits=adjusts_logits(run, closed_answers=True),
        )


def _forward_only(run: RunConfig) -> RunConfig:
    """How the run's models evaluate."""
    return dataclasses.replace(run, gradient_checkpointing=False, attn="sdpa")


def _state_bytes(models: SubModels) -> int:
    """The global trainable state, in fp32."""
    return 4 * sum(math.prod(shape) for shape in models.trainable_shapes.values())


def _device(run: RunConfig, options: PlanOptions) -> str:
    if options.device is not None:
        return options.device
    return "cuda" if uses_gpu(run, torch.cuda.is_available()) else "cpu"
