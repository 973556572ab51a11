"""What follows from a run's options, for whoever trains, evaluates or plans it."""

from scalefl.config.options import RunConfig
from scalefl.contracts import InputError

LABEL_PARTITIONERS = ("dirichlet", "pathological")
"""Those that deal by label, so that clients' label frequencies differ."""


def micro_batch_size(run: RunConfig, num_processes: int) -> int:
    """Examples per process and forward pass.

    Raises InputError where `--batch-size` cannot be shared equally; it names sizes that can.
    """
    size = run.micro_batch_size or run.batch_size // num_processes
    if size < 1 or run.batch_size % (size * num_processes):
        unit = max(size, 1) * num_processes
        raise InputError(
            f"--batch-size {run.batch_size} cannot be shared by {num_processes} processes in micro-batches "
            f"of {max(size, 1)}; expected a multiple of {unit}, such as {-(-run.batch_size // unit) * unit}, "
            "or fewer processes."
        )
    return size


def uses_gpu(run: RunConfig, there_is_one: bool) -> bool:
    """Whether a run is to be on a GPU."""
    return there_is_one if run.use_gpu is None else run.use_gpu


def trains_here(run: RunConfig) -> bool:
    """Whether the machine of this process is one that clients train on."""
    return run.evaluate_from is None and (run.executor != "jobs" or run.job_launcher == "local")


def compute_dtype(run: RunConfig) -> str:
    """What quantised weights are unpacked to and multiplied in."""
    return run.precision if run.quant_compute_dtype == "auto" else run.quant_compute_dtype


def checkpoints(run: RunConfig, level: int) -> bool:
    """Whether clients of a level recompute activations in the backward pass."""
    return run.gradient_checkpointing and level in (run.checkpointing_levels or (level,))


def adjusts_logits(run: RunConfig, closed_answers: bool) -> bool:
    """`--logit_adjustment auto`: closed answers, and clients whose training draws are skewed by label."""
    if run.logit_adjustment == "auto":
        skewed = run.partitioner in LABEL_PARTITIONERS and not run.balanced_sampling
        return closed_answers and skewed
    return run.logit_adjustment == "on"


def caches_features(run: RunConfig) -> bool:
    """Whether a frozen vision tower runs once per image: not where training moves pixels."""
    moves_pixels = run.augment and run.evaluate_from is None
    return run.feature_cache != "off" and bool(run.freeze_vit) and not moves_pixels


def features_in_files(run: RunConfig) -> bool:
    """Whether cached features are kept on disk: there clients in processes of their own find them."""
    return run.feature_cache == "file" or (run.feature_cache == "auto" and run.executor == "jobs")


def feature_dtype(run: RunConfig, tower_dtype: str) -> str:
    """What cached features are kept in: what the tower, held in `tower_dtype`, computes in."""
    if run.feature_dtype != "auto":
        return run.feature_dtype
    return run.precision if tower_dtype == "fp32" else tower_dtype


def holds_whole_base(run: RunConfig, shards_weights: bool) -> bool:
    """Whether the whole frozen base lives on the device, rather than a level's slice, read from files.

    `shards_weights` is ZeRO-3. Raises InputError for what it cannot do.
    """
    if shards_weights and run.base_store == "resident":
        raise InputError(
            "--base_store: got resident, but ZeRO-3 spreads weights over the processes as they are read "
            "from files; expected file or auto, or ZeRO-2."
        )
    read_by_jobs = run.executor == "jobs"
    return run.base_store == "resident" or (run.base_store == "auto" and not (shards_weights or read_by_jobs))


def check_attention(run: RunConfig, device: str, has_package: bool = True) -> None:
    """Raise InputError where `--attn flash_attention_2` cannot train; evaluation masks, and takes sdpa."""
    if run.attn != "flash_attention_2":
        return
    lacking = {
        f"a CUDA GPU (this is {device})": device != "cuda",
        f"--precision bf16 (this is {run.precision})": run.precision != "bf16",
        "the package flash-attn (it is not installed)": not has_package,
    }
    if any(lacking.values()):
        needs = " and ".join(what for what, lacks in lacking.items() if lacks)
        raise InputError(
            f"--attn flash_attention_2: needs {needs}; expected sdpa, which takes the fastest kernel that "
            "PyTorch has itself."
        )
