"""A resolved run as JSON, beside its results and in its checkpoints; what a resume may change of it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from scalefl.config.modelfile import ModelFile
from scalefl.config.options import ExecutorOptions, RunConfig, RunOptions
from scalefl.config.values import OPTION_KINDS, coerce
from scalefl.contracts import InputError

Config = TypeVar("Config", RunConfig, ModelFile)

CONFIG_FILE = "run.json"
"""Not config.json, which is the model's own in a folder of weights."""

FOR_MEMORY = frozenset(
    {
        *("gradient_checkpointing", "checkpointing_levels", "micro_batch_size", "eval_batch_size"),
        *("base_store", "feature_cache", "attn"),
    }
)
"""Options that a run may go on under on a machine with less memory: they change the last bits of a result.

Of dropout, other micro-batches make other draws, as does another number of processes.
"""

FREE_ON_RESUME = FOR_MEMORY | {
    *("num_rounds", "data_root", "data_here", "annotations", "init_from", "workers", "evaluate_from"),
    *(f.name for options in (RunOptions, ExecutorOptions) for f in dataclasses.fields(options)),
}
"""Options that change no result but for rounding, or only how far a run goes; paths, as files may move."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """The files that a frozen base was read from."""

    digest: str
    """Of their tensors: see `TensorFiles.digest`."""
    stamps: Mapping[str, list[int]]
    """File -> size in bytes and time of change in nanoseconds."""


def to_dict(config: RunConfig | ModelFile) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`, also after JSON. Options that the values do not name take their defaults."""
    kinds = get_type_hints(kind)
    unknown = set(values) - set(kinds)
    if unknown:
        raise InputError(
            f"saved {kind.__name__}: unknown {', '.join(sorted(unknown))}; use the version that saved it."
        )
    read = {name: _from_json(value, kinds[name], name) for name, value in values.items()}
    if "train" in read:
        read["train"] = {
            name: _from_json(value, OPTION_KINDS[name], name) for name, value in read["train"].items()
        }
    return kind(**read)


def _from_json(value: Any, kind: Any, name: str) -> Any:
    return dict(value) if isinstance(value, Mapping) else coerce(value, kind, f"saved {name}")


def save_config(
    folder: str | Path, run: RunConfig, model_file: ModelFile, base: BaseFiles | None = None
) -> None:
    """Write them into `folder`; `base` is what the frozen base was read from, if from files."""
    content = {
        "run": to_dict(run),
        "model_file": to_dict(model_file),
        "base": None if base is None else dataclasses.asdict(base),
    }
    Path(folder, CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_config(folder: str | Path) -> tuple[RunConfig, ModelFile]:
    """Read both from a run folder or checkpoint. Raises InputError if it is neither."""
    path = Path(folder, CONFIG_FILE)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return from_dict(RunConfig, content["run"]), from_dict(ModelFile, content["model_file"])
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; expected a run folder or checkpoint that `scalefl train` wrote."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); expected what `scalefl train` wrote.") from error


def saved_base(folder: str | Path) -> BaseFiles | None:
    """What the frozen base that a run folder's or checkpoint's weights belong to was read from."""
    path = Path(folder, CONFIG_FILE)
    saved = json.loads(path.read_text(encoding="utf-8")).get("base") if path.is_file() else None
    return BaseFiles(**saved) if isinstance(saved, dict) else None


def changed_on_resume(old: RunConfig, new: RunConfig) -> list[str]:
    """Options that differ and may not: their results would belong to neither run."""
    return [
        name
        for name in OPTION_KINDS
        if name not in FREE_ON_RESUME and getattr(old, name) != getattr(new, name)
    ]
