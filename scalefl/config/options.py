"""Every option of a run, once: name, type, default and meaning.

The command line, YAML files and presets are read against these fields. A preset overrides the defaults here.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which examples there are, and which client holds them."""

    data_root: str | None = None
    """Folder of the data set."""
    data: str = "kneexray"
    """Data set: kneexray, synthetic, or package.module:Name of your own."""
    data_here: Literal["all", "train", "held_out"] = "all"
    """Splits that data_root must have. train: those of a client's own machine; held_out: those of a run whose
    clients bring their own training data (--executor jobs --job_launcher manual)."""
    annotations: str | None = None
    """JSON list or JSONL of records beside an image folder, relative to the data root or absolute."""
    skip_bad_images: bool = False
    """Leave out missing and corrupt images instead of stopping."""
    use_valid: bool = False
    """Choose the best checkpoint on the validation split."""
    question: str = "[vqa] What is the Kellgren-Lawrence grade of this knee?"
    """Asked about every image that brings no question of its own."""
    answers: tuple[str, ...] = ("none", "doubtful", "minimal", "moderate", "severe")
    """The closed answer set, in the order of the labels."""
    partitioner: Literal["dirichlet", "iid", "pathological", "natural", "size_skewed"] = "dirichlet"
    """How patients are dealt to clients."""
    alpha: float = 0.5
    """Concentration of the Dirichlet and size-skewed partitions. Smaller is more uneven."""
    classes_per_client: int = 2
    """Labels that one client holds under the pathological partition."""
    min_patients: int = 1
    """Fewest patients that a client may get."""
    balanced_sampling: bool = False
    """Draw a client's training examples so that its labels come equally often."""
    augment: bool = False
    """Flip and slightly shift training images at random."""
    num_patients: int = 300
    """Size of the synthetic data set."""
    workers: int = 2
    """Processes or threads that read images."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The global model, and which part of it is trained."""

    arch: str = "MiniGPTv2"
    """Model family: MiniGPTv2, or package.module:Name of your own."""
    cfg_path: str | None = None
    """Model file: a shipped preset (tiny, minigpt_v2) or a YAML file in MiniGPT-v2's format. Unset: tiny."""
    init_from: str | None = None
    """Start from the weights in this saved model folder or checkpoint."""
    tuning: Literal["lora", "full"] = "lora"
    """Train adapters, projector and exit norms (lora), or everything (full)."""
    freeze_vit: bool | None = None
    """Keep the vision tower frozen. Unset: frozen under lora, trained under full."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of compute. Trainable weights stay fp32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Hold the frozen linear layers of the language model's blocks in 4 bits (nf4) or 8 bits (int8)."""
    double_quant: bool = True
    """Hold the scales of nf4 in 8 bits as well."""
    quant_compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision that quantised weights are unpacked to and multiplied in. Auto: that of --precision."""
    base_store: Literal["auto", "resident", "file"] = "auto"
    """Hold the frozen base on the device, or read each level's slice from disk. Auto: file under ZeRO-3."""
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of the language model in training; sdpa is PyTorch's own, and picks the fastest."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpointing_levels: tuple[int, ...] = ()
    """Levels to which gradient_checkpointing is limited; none: every level."""
    feature_cache: Literal["auto", "off", "memory", "file"] = "auto"
    """Run a frozen vision tower once per image and keep what it says. Auto: in memory, unless augmenting."""
    feature_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of cached features. Auto: the precision that the tower computes in."""
    lora_r: int = 64
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout before the adapters. Upstream MiniGPT-v2 uses 0.05."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Linear layers of the language model that get an adapter."""


@dataclass(frozen=True, kw_only=True)
class LevelOptions:
    """Capacity levels, weakest first, and what each keeps of the global model."""

    vertical_scale_ratios: tuple[float, ...] = (0.4, 0.55, 0.75, 1.0)
    """Width ratio of each level."""
    horizontal_scale_ratios: tuple[int, ...] = (1, 2, 3, 4)
    """Depth of each level, as a number of exits."""
    client_split_ratios: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    """Share of the clients at each level; the shares sum to 1."""
    client_levels: tuple[int, ...] = ()
    """Level of every client, in place of client_split_ratios; `scalefl plan --client_budgets` writes it."""
    client_names: tuple[str, ...] = ()
    """Name of every client, in the order of client_levels; under --partitioner natural, the site it is."""
    ee_locs: tuple[int, ...] = (8, 16, 24)
    """Layers after which an early exit sits. The last layer is always an exit."""
    width_axes: Literal["inner", "all"] = "inner"
    """Axes that a width ratio cuts: heads and feed-forward channels (inner), or the embedding too (all)."""
    width_scaler: bool = False
    """Scale by 1/ratio where a cut contraction loses terms."""
    zero_tails: bool = True
    """Start from scratch with the units that only strong clients hold having no effect."""
    recipe: Literal["scalefl", "paper"] = "scalefl"
    """Named values for width_axes, width_scaler, zero_tails and logit_adjustment: ours, or the paper's."""


@dataclass(frozen=True, kw_only=True)
class FederationOptions:
    """Rounds, clients, and how one client trains."""

    num_rounds: int = 5
    """Federated rounds."""
    num_clients: int = 8
    """Clients that hold data."""
    sample_rate: float = 1.0
    """Share of the clients that train in each round."""
    num_epoch: int = 1
    """Passes over a client's data per round."""
    local_steps: int | None = None
    """Optimizer steps of a client per round. Overrides num_epoch."""
    batch_size: int = 16
    """Examples per optimizer step of one client, over all processes that train it."""
    micro_batch_size: int | None = None
    """Examples per forward pass of one process. Unset: as many as batch_size gives it."""
    length_bucketing: bool = False
    """Batch examples of similar length together, so that less is padding."""
    optimizer: Literal["sgd", "adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw"
    """Local optimizer; the last three are those of bitsandbytes. Giving momentum alone means sgd."""
    lr: float = 5e-4
    """Learning rate."""
    momentum: float = 0.0
    """Momentum of sgd."""
    weight_decay: float = 0.0
    """Weight decay."""
    lr_schedule: Literal["none", "multistep", "exponential", "cosine"] = "none"
    """Learning rate over rounds."""
    lr_milestones: tuple[int, ...] = ()
    """Rounds after which multistep multiplies the learning rate by lr_gamma."""
    lr_gamma: float = 0.1
    """Factor of multistep (per milestone) and exponential (per round)."""
    warmup_steps: int = 0
    """First optimizer steps of every client and round, over which the rate rises from zero."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; none: no clipping."""
    aggregation: str = "coverage_mean"
    """Rule that merges updates: coverage_mean, or package.module:Name of your own."""
    weighting: Literal["examples", "uniform"] = "examples"
    """What a client weighs in the merge."""
    seed: int = 0
    """Seed of every random draw."""


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """Where the clients of a round train, and what becomes of those that fail."""

    executor: str = "sequential"
    """sequential: all processes train one client at a time. parallel: each process trains clients of its own.
    jobs: clients are launched processes. Or package.module:Name of your own."""
    client_retries: int = 1
    """Further attempts at a client whose training failed. After an out-of-memory error with half of
    micro_batch_size."""
    min_clients: int = 1
    """Clients that must deliver in a round. With fewer the run stops, to be resumed."""
    client_timeout: float | None = None
    """Seconds that a client may train. Under jobs it then has failed; else the run stops, to be resumed."""
    job_launcher: str = "local"
    """What starts jobs: local (this machine), slurm, or manual (people carry files to `scalefl client`); or
    package.module:Name of your own."""
    clients_per_job: int | None = None
    """Clients of one level that a job trains in turn. Unset: as many as keep max_jobs busy; elsewhere than on
    this machine 1."""
    max_jobs: int | None = None
    """Jobs at a time. Unset: as many as there are GPUs for, or cores; under slurm no limit."""
    level_resources: str | None = None
    """YAML file of what a job of each level is launched with: processes, gpus, accelerate_config, sbatch."""
    dry_run: bool = False
    """Print what jobs would be launched for the next round, and end."""


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """Clients that come late or not at all, by a virtual clock; none of it slows the run."""

    dropout_rate: float = 0.0
    """Share of a cohort that does not deliver, drawn anew each round; min_clients always do."""
    client_flops: tuple[float, ...] = ()
    """FLOP/s of every client, or one number for all. Turns the virtual clock on."""
    client_bandwidth: tuple[float, ...] = ()
    """Bytes a second of every client each way, or one number for all. None: transfers take no time."""
    level_speeds: tuple[float, ...] = ()
    """Factor on the FLOP/s of each level's clients; below 1 are stragglers."""
    round_deadline: float | None = None
    """Simulated seconds after which a round ends without those that have not delivered."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The loss of a client."""

    KD_gamma: float = 1.0
    """Weight of self-distillation from the deepest exit; 0 turns it off."""
    KD_T: float = 3.0
    """Temperature of self-distillation."""
    KD_start: float = 0.25
    """Share of the rounds before self-distillation starts."""
    logit_adjustment: Literal["auto", "on", "off"] = "auto"
    """Adjust training logits by the client's label prior. Auto: for closed answers and a skewed partition."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated, how and when."""

    evalmode: Literal["global", "local"] = "global"
    """Evaluate every level on all held-out data (global), or on that of the level's clients (local)."""
    evaluate_from: str | None = None
    """Evaluate this checkpoint instead of training."""
    scoring: Literal["rank", "generate"] = "rank"
    """Rank the candidate answers by likelihood, or generate and parse."""
    eval_every: int = 1
    """Rounds between evaluations; the last round is always evaluated."""
    eval_limit: int | None = None
    """Evaluate at most this many examples per split."""
    eval_batch_size: int = 64
    """Examples per forward pass in evaluation."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Files, logging and hardware; none of them changes a result."""

    save_path: str = "runs/scalefl"
    """Folder for checkpoints, metrics and the resolved config."""
    resume: str | None = None
    """Continue the run in this folder, under the options it was started with."""
    feature_folder: str | None = None
    """Folder of --feature_cache file, which runs may share. Unset: features/ in save_path."""
    keep_last: int = 2
    """Checkpoints to keep besides the best."""
    save_every_seconds: float = 60.0
    """Least seconds between two checkpoints within a round."""
    report_to: tuple[str, ...] = ()
    """Trackers of Accelerate, such as tensorboard or wandb."""
    print_freq: int = 10
    """Optimizer steps between two progress lines where the output is not a terminal."""
    use_gpu: bool | None = None
    """Run on a GPU, or not. Unset: where there is one."""


GROUPS = (
    DataOptions,
    ModelOptions,
    LevelOptions,
    FederationOptions,
    ExecutorOptions,
    SimulationOptions,
    ObjectiveOptions,
    EvaluationOptions,
    RunOptions,
)


@dataclass(frozen=True, kw_only=True)
class RunConfig(
    DataOptions,
    ModelOptions,
    LevelOptions,
    FederationOptions,
    ExecutorOptions,
    SimulationOptions,
    ObjectiveOptions,
    EvaluationOptions,
    RunOptions,
):
    """Every option of one run, resolved, checked and immutable."""
