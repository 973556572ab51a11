"""What makes a run impossible or meaningless, found before anything is built.

What only the data or the model can know is checked where they are read.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig

Finding = tuple[tuple[str, ...], str]
"""The options that are involved, the first of them to be named, and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The finite numbers within bounds."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


COUNT, POSITIVE, NOT_NEGATIVE = Range(at_least=1), Range(above=0), Range(at_least=0)
SHARE, FRACTION = Range(above=0, at_most=1), Range(at_least=0, below=1)

RANGES = {
    "num_rounds": COUNT,
    "num_clients": COUNT,
    "num_epoch": COUNT,
    "local_steps": COUNT,
    "batch_size": COUNT,
    "micro_batch_size": COUNT,
    "classes_per_client": COUNT,
    "min_patients": COUNT,
    "num_patients": COUNT,
    "lora_r": COUNT,
    "eval_every": COUNT,
    "eval_limit": COUNT,
    "eval_batch_size": COUNT,
    "keep_last": COUNT,
    "print_freq": COUNT,
    "lr_milestones": COUNT,
    "ee_locs": COUNT,
    "horizontal_scale_ratios": COUNT,
    "client_levels": COUNT,
    "checkpointing_levels": COUNT,
    "clients_per_job": COUNT,
    "max_jobs": COUNT,
    "client_flops": POSITIVE,
    "client_bandwidth": POSITIVE,
    "level_speeds": POSITIVE,
    "round_deadline": POSITIVE,
    "dropout_rate": FRACTION,
    "client_retries": NOT_NEGATIVE,
    "min_clients": NOT_NEGATIVE,
    "client_timeout": POSITIVE,
    "workers": NOT_NEGATIVE,
    "seed": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "KD_gamma": NOT_NEGATIVE,
    "save_every_seconds": NOT_NEGATIVE,
    "alpha": POSITIVE,
    "lora_alpha": POSITIVE,
    "lr_gamma": POSITIVE,
    "max_grad_norm": POSITIVE,
    "KD_T": POSITIVE,
    "sample_rate": SHARE,
    "vertical_scale_ratios": SHARE,
    "momentum": FRACTION,
    "lora_dropout": FRACTION,
    "KD_start": Range(at_least=0, at_most=1),
    "client_split_ratios": Range(at_least=0, at_most=1),
}


def problems(
    run: RunConfig,
    model_file: ModelFile,
    where: Callable[[str], str] = "--{}".format,
    unread: Collection[str] = (),
    asked_for: Collection[str] = (),
) -> list[str]:
    """One line per problem. `where` says where an option came from; `unread` ones are left out.

    `asked_for` are the options that a person gave: of these none may be without effect.
    """
    findings = chain(
        _ranges(run),
        _levels(run),
        _clients(run),
        _exits(run),
        _training(run),
        _tuning(run, model_file),
        _quantisation(run),
        _features(run),
        _answers(run),
        _executor(run, asked_for),
        _simulation(run),
        _without_effect(run, asked_for),
    )
    return [
        f"{where(options[0])}: {text}"
        for options, text in findings
        if not any(option in unread for option in options)
    ]


def _ranges(run: RunConfig) -> Iterator[Finding]:
    for name, range_ in RANGES.items():
        value = getattr(run, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        for number in numbers:
            if not range_.holds(number):
                kind = "number" if math.isfinite(number) else "finite number"
                yield (name,), f"got {number}; expected a {kind} {range_}."


def _levels(run: RunConfig) -> Iterator[Finding]:
    names = ("vertical_scale_ratios", "horizontal_scale_ratios", "client_split_ratios")
    lengths = [len(getattr(run, name)) for name in names]
    if len(set(lengths)) > 1 or 0 in lengths:
        yield (
            names,
            f"got {lengths[0]} levels, with {lengths[1]} in --{names[1]} and {lengths[2]} in --{names[2]}; "
            "expected one number per level in each, and at least one level.",
        )
    total = math.fsum(run.client_split_ratios)
    if run.client_split_ratios and abs(total - 1) > 1e-6:
        yield ("client_split_ratios",), f"the shares sum to {total:g}; expected 1."
    for name in ("client_levels", "checkpointing_levels"):
        if max(getattr(run, name), default=1) > lengths[0]:
            yield (
                (name, "vertical_scale_ratios"),
                f"got level {max(getattr(run, name))}; there are levels 1 to {lengths[0]}.",
            )


def _clients(run: RunConfig) -> Iterator[Finding]:
    if run.client_levels and len(run.client_levels) != run.num_clients:
        yield (
            ("client_levels", "num_clients"),
            f"got {len(run.client_levels)} levels for {run.num_clients} clients; expected one for each.",
        )
    if run.client_names and (len(run.client_names), len(set(run.client_names))) != (run.num_clients,) * 2:
        yield (
            ("client_names", "num_clients"),
            f"got {len(set(run.client_names))} names for {run.num_clients} clients; expected one for each.",
        )
    if run.client_levels and run.partitioner == "natural" and not run.client_names:
        yield (
            ("client_levels", "client_names", "partitioner"),
            "under --partitioner natural a client is a site, and which one is not said; "
            "expected --client_names too, the sites in the same order.",
        )


def _exits(run: RunConfig) -> Iterator[Finding]:
    if any(later <= earlier for earlier, later in pairwise(run.ee_locs)):
        text = f"exits out of order: {_spaced(run.ee_locs)}; expected each layer once, rising, such as "
        yield ("ee_locs",), text + f"{_spaced(sorted(set(run.ee_locs)))}."
    num_exits = len(run.ee_locs) + 1
    if max(run.horizontal_scale_ratios, default=1) > num_exits:
        yield (
            ("horizontal_scale_ratios", "ee_locs"),
            f"got {_spaced(run.horizontal_scale_ratios)}; expected numbers of exits up to {num_exits}, "
            f"for {num_exits - 1} --ee_locs and the last layer; lower it or add an exit.",
        )


def _training(run: RunConfig) -> Iterator[Finding]:
    if run.momentum and run.optimizer != "sgd":
        yield (
            ("momentum", "optimizer"),
            f"{run.optimizer} has no momentum; leave it out, or choose --optimizer sgd.",
        )
    if run.checkpointing_levels and not run.gradient_checkpointing:
        yield (
            ("checkpointing_levels", "gradient_checkpointing"),
            "limits --gradient_checkpointing, which is off; add it, or leave this out.",
        )
    if run.balanced_sampling and run.logit_adjustment == "on":
        yield (
            ("logit_adjustment", "balanced_sampling"),
            "cannot go with --balanced_sampling, which mends the label skew already; drop one.",
        )
    if run.micro_batch_size and run.batch_size % run.micro_batch_size:
        yield (
            ("batch_size", "micro_batch_size"),
            f"got {run.batch_size}, which --micro_batch_size {run.micro_batch_size} does not divide; "
            "expected a multiple of it.",
        )
    if run.lr_schedule == "multistep" and not run.lr_milestones:
        yield (
            ("lr_milestones", "lr_schedule"),
            "missing; expected the rounds at which multistep lowers the rate.",
        )
    if any(later <= earlier for earlier, later in pairwise(run.lr_milestones)):
        yield ("lr_milestones",), f"got {_spaced(run.lr_milestones)}; expected rising rounds."
    if run.resume and run.evaluate_from:
        yield ("resume", "evaluate_from"), "cannot go with --evaluate_from, which does not train; drop one."


def _tuning(run: RunConfig, model_file: ModelFile) -> Iterator[Finding]:
    if run.arch != model_file.arch:
        yield (
            ("arch", "cfg_path"),
            f"got {run.arch}, but {model_file.name} describes {model_file.arch}; "
            "drop it, or give another --cfg_path.",
        )
    if run.tuning == "lora" and run.freeze_vit is False:
        yield (
            ("freeze_vit", "tuning"),
            "got false; --tuning lora keeps the tower frozen; choose --tuning full.",
        )
    if run.tuning == "lora" and not run.lora_targets:
        yield ("lora_targets", "tuning"), "empty; --tuning lora needs at least one, such as q_proj."
    if run.tuning == "full" and not run.freeze_vit and model_file.vit_precision == "fp16":
        yield (
            ("tuning", "freeze_vit"),
            f"full would train the vision tower, which {model_file.name} keeps in fp16 (vit_precision); "
            "set that to fp32 or bf16, or give --freeze_vit.",
        )


def _quantisation(run: RunConfig) -> Iterator[Finding]:
    if run.tuning == "full" and run.quantization != "none":
        yield (
            ("quantization", "tuning"),
            f"got {run.quantization}, but --tuning full trains those weights; "
            "expected none, or --tuning lora.",
        )
    if run.quantization == "nf4" and run.width_axes == "all":
        yield (
            ("quantization", "width_axes"),
            "nf4 packs 64 neighbours of the embedding together, which --width_axes all would cut; "
            "expected int8 or none, or --width_axes inner.",
        )
    if run.quant_compute_dtype != "auto" and run.quantization == "none":
        yield (
            ("quant_compute_dtype", "quantization"),
            f"got {run.quant_compute_dtype}, but nothing is quantised; leave it out, or add --quantization.",
        )


def _features(run: RunConfig) -> Iterator[Finding]:
    if run.feature_cache in ("memory", "file") and run.freeze_vit is False:
        yield (
            ("feature_cache", "freeze_vit"),
            f"got {run.feature_cache}, but the vision tower is trained; expected off, or --freeze_vit.",
        )
    if run.feature_cache in ("memory", "file") and run.augment:
        yield (
            ("feature_cache", "augment"),
            f"got {run.feature_cache}, but --augment changes the pixels at every step; drop one.",
        )


def _answers(run: RunConfig) -> Iterator[Finding]:
    bare = {answer.strip() for answer in run.answers} - {""}
    if not run.answers or bare != set(run.answers) or len(bare) < len(run.answers):
        got = ", ".join(map(repr, run.answers)) or "none"
        yield ("answers",), f"got {got}; expected texts that differ, without blanks around them."


def _executor(run: RunConfig, asked_for: Collection[str]) -> Iterator[Finding]:
    of_jobs = ("job_launcher", "clients_per_job", "max_jobs", "level_resources", "dry_run")
    for name in of_jobs:
        if name in asked_for and getattr(run, name) not in (None, False) and run.executor != "jobs":
            yield (
                (name, "executor"),
                f"belongs to --executor jobs, and this run has {run.executor}; add it, or drop this.",
            )
    if run.executor == "jobs" and run.base_store == "resident":
        yield (
            ("base_store", "executor"),
            "got resident, but the processes of --executor jobs read their slices from files; "
            "expected auto or file.",
        )
    if run.data_here == "held_out" and (run.executor, run.job_launcher) != ("jobs", "manual"):
        yield (
            ("data_here", "executor", "job_launcher"),
            "got held_out: clients bring their own data; expected --executor jobs --job_launcher manual.",
        )
    if run.data_here == "held_out" and run.evalmode == "local":
        yield (
            ("data_here", "evalmode"),
            "got held_out, but --evalmode local asks which client holds what; expected global.",
        )
    cohort = max(1, math.floor(run.sample_rate * run.num_clients + 0.5))
    if run.min_clients > cohort:
        yield (
            ("min_clients", "num_clients", "sample_rate"),
            f"got {run.min_clients}, but {cohort} train in a round; expected at most as many.",
        )


def _simulation(run: RunConfig) -> Iterator[Finding]:
    for name in ("client_flops", "client_bandwidth"):
        if len(getattr(run, name)) not in (0, 1, run.num_clients):
            yield (
                (name, "num_clients"),
                f"got {len(getattr(run, name))} numbers for {run.num_clients} clients; expected one for all, "
                "or one for each.",
            )
    levels = len(run.vertical_scale_ratios)
    if len(run.level_speeds) not in (0, levels):
        yield (
            ("level_speeds", "vertical_scale_ratios"),
            f"got {len(run.level_speeds)} numbers for {levels} levels; expected one for each.",
        )
    for name in ("client_bandwidth", "level_speeds", "round_deadline"):
        if getattr(run, name) and not run.client_flops:
            yield (
                (name, "client_flops"),
                "is of the virtual clock, which needs --client_flops; add it, or drop this.",
            )


def _without_effect(run: RunConfig, asked_for: Collection[str]) -> Iterator[Finding]:
    """A preset, or the run that is gone on from, may have them; it may be that no flag takes them back."""
    if "feature_folder" in asked_for and run.feature_folder is not None and run.feature_cache != "file":
        yield (
            ("feature_folder", "feature_cache"),
            f"got {run.feature_folder}, but --feature_cache is {run.feature_cache}; expected file.",
        )
    if "feature_dtype" in asked_for and run.feature_dtype != "auto" and run.feature_cache == "off":
        yield (
            ("feature_dtype", "feature_cache"),
            f"got {run.feature_dtype}, but --feature_cache is off; leave it out.",
        )
    if "double_quant" in asked_for and not run.double_quant and run.quantization != "nf4":
        yield (
            ("double_quant", "quantization"),
            f"is of --quantization nf4 alone, which is {run.quantization}; leave it out, or choose nf4.",
        )
    if "client_split_ratios" in asked_for and "client_levels" in asked_for and run.client_levels:
        # A plan writes both, and they agree.
        clients, levels = len(run.client_levels), range(1, len(run.client_split_ratios) + 1)
        counts = [run.client_levels.count(level) for level in levels]
        wanted = [share * clients for share in run.client_split_ratios]
        if any(abs(count - share) >= 1 for count, share in zip(counts, wanted, strict=True)):
            yield (
                ("client_split_ratios", "client_levels"),
                f"got {_spaced(run.client_split_ratios)}, but --client_levels deals "
                f"{_spaced(counts)} of the {clients} clients; drop one.",
            )


def _spaced(numbers: Collection[float]) -> str:
    return " ".join(map(str, numbers))
