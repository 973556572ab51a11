"""What a run starts from: `--init_from`, or random weights; and where its frozen base is held."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalefl import checkpoint
from scalefl.config.derived import holds_whole_base
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.origin import base_of_part
from scalefl.config.saved import CONFIG_FILE, BaseFiles, saved_base
from scalefl.contracts import InputError, State
from scalefl.conversion.command import of_model_file, write_model
from scalefl.conversion.minigptv2 import Released
from scalefl.engine.launch import Engine
from scalefl.models.adapters import saved_adapters
from scalefl.models.build import ModelSource, check_weights, new_model
from scalefl.models.family import ModelFamily
from scalefl.models.files import TensorFiles, new_folder, saved_order
from scalefl.models.holding import DTYPES
from scalefl.models.store import Store
from scalefl.slicing.order import Order

log = logging.getLogger("scalefl")

MADE_FROM = "made_from.json"
"""Beside a base that a run wrote for itself: what decided its bits."""

DECIDE_BASE = ("tuning", "freeze_vit", "lora_targets", "precision", "quantization", "double_quant")
"""Options that a base in files depends on, beside the model itself."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a base comes from, for processes that make or read it themselves."""

    folder: str | None
    """Of the model's files; None of a base from scratch."""
    seed: int
    """Of a base from scratch."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from."""

    processor: Any
    store: Store
    state: State
    """Trainable state."""
    base: BaseFiles | None
    """What the frozen base was read from; None of a base from scratch, or none at all."""
    origin: Origin
    order: Order
    """In which `scalefl reorder` put heads and channels; empty if they are in their own."""


def start_from(
    run: RunConfig,
    model_file: ModelFile,
    family: ModelFamily,
    texts: list[str],
    engine: Engine,
    trained_on: Sequence[Path] = (),
    spare: Path | None = None,
) -> Start:
    """The base and a trainable state; nothing is written where the base is not that of `trained_on`.

    These are checkpoints that were trained on it, the last of which brings the tokenizer; without, and
    without `--init_from`, one is trained on `texts`. A base in files goes to `spare` if that is given and the
    run's own is not the one needed.
    """
    if run.init_from is None and not model_file.names_released_weights:
        processor = (
            family.load_processor(str(trained_on[-1])) if trained_on else family.processor(model_file, texts)
        )
        if run.tuning == "lora":
            log.warning("--tuning lora without --init_from: adapters on a base of random weights")
        config = family.config(model_file, processor)
        weights = dict(new_model(run, family, config).named_parameters())
        return _stored(run, model_file, family, config, weights, engine, processor, trained_on, spare)
    source = _converted(run, model_file, engine) if run.init_from is None else Path(run.init_from)
    if run.init_from is not None and (base := base_of_part(run)) is not None:
        return _from_part(source, *base, family, engine, trained_on, spare)
    config, files = family.load_config(str(source)), TensorFiles(source)
    check_weights(family, config, files)
    processor, adapters = family.load_processor(str(source)), _saved_adapters(run, source)
    return _stored(run, model_file, family, config, files, engine, processor, trained_on, spare, adapters)


def _stored(
    run: RunConfig,
    model_file: ModelFile,
    family: ModelFamily,
    config: Any,
    weights: Mapping[str, Tensor],
    engine: Engine,
    processor: Any,
    trained_on: Sequence[Path],
    spare: Path | None,
    adapters: State | None = None,
) -> Start:
    """The base where `--base_store` wants it, and the trainable state."""
    files = weights if isinstance(weights, TensorFiles) else None
    source = ModelSource(
        run,
        family,
        config,
        weights,
        from_scratch=files is None,
        vit_dtype=DTYPES[model_file.vit_precision],
        adapters=adapters,
    )
    has_base = bool(source.models.base_shapes)  # not under full tuning
    base = None
    if files is not None and has_base:
        base = BaseFiles(digest=files.digest(), stamps=files.stamps())
    _check_same_base(trained_on, base, run.init_from)
    store: Store
    if holds_whole_base(run, engine.shards_weights) or not has_base:
        store = source.resident(engine.device)
    else:
        folder = Path(run.save_path) / "base"
        if source.needs_folder:
            folder = _made(folder, spare, source, _recipe(run, model_file, config, base), engine)
        store = source.on_disk(engine.device, folder)
    return Start(
        processor=processor,
        store=store,
        state=source.initial_state(),
        base=base,
        origin=Origin(folder=None if files is None else str(files.folder.absolute()), seed=run.seed),
        order=_order(trained_on, files),
    )


def _order(trained_on: Sequence[Path], files: TensorFiles | None) -> Order:
    """That of the checkpoint, which keeps what it was trained in; of a first one, that of its base."""
    if trained_on:
        return saved_order(trained_on[-1])
    return {} if files is None else saved_order(files.folder)


def _converted(run: RunConfig, model_file: ModelFile, engine: Engine) -> Path:
    """The folder into which the released weights that the model file names are converted, once for a run."""
    folder = Path(run.save_path) / "model"
    if engine.is_main and not folder.is_dir():
        write_model(Released(of_model_file(model_file, run.lora_alpha), model_file), folder)
    engine.barrier()
    return folder


def _saved_adapters(run: RunConfig, source: Path) -> State | None:
    """Those that lie beside a model, from which training goes on. Raises InputError where it cannot."""
    if (saved := saved_adapters(source)) is None:
        return None
    spec, state = saved
    if run.tuning == "full":
        raise InputError(
            f"--init_from {source}: has adapters beside its weights, which --tuning full does not train; "
            "expected --tuning lora, or a folder into which they are merged: `scalefl export --merge_lora`."
        )
    asked = _typed(run.lora_r, run.lora_alpha, run.lora_targets)
    if differing := [flag for flag in _typed(spec.rank, spec.alpha, spec.targets) if flag not in asked]:
        raise InputError(f"--init_from {source}: has other adapters; expected {' '.join(differing)}.")
    return state


def _typed(rank: int, alpha: float, targets: Sequence[str]) -> list[str]:
    return [f"--lora_r {rank}", f"--lora_alpha {alpha:g}", f"--lora_targets {' '.join(sorted(targets))}"]


def client_store(
    run: RunConfig,
    model_file: ModelFile,
    family: ModelFamily,
    model_folder: Path,
    task: Mapping[str, Any],
    engine: Engine,
) -> Store:
    """The store of a client's own process, which reads its level's slice of the base from files.

    `task` says which base (`base`, its digest) and where it comes from (`origin`). On a machine that does not
    see the run's folder a base that is not read from the model's own files is made. Raises InputError if the
    base is another one here.
    """
    run = dataclasses.replace(run, seed=task["origin"]["seed"])
    config, folder = family.load_config(str(model_folder)), task["origin"]["folder"]
    files = None if folder is None else TensorFiles(Path(folder))
    base = None
    if files is not None and task["base"] is not None:
        base = BaseFiles(digest=files.digest(), stamps=files.stamps())
        if base.digest != task["base"]:
            raise InputError(
                f"{folder}: other weights than those of the run; expected the base that it started from; "
                "name its folder on this machine with --init_from."
            )
    is_made = (Path(run.save_path) / CONFIG_FILE).is_file()  # the run's own folder, and with it its base
    weights: Mapping[str, Tensor] = {} if files is None else files
    if files is None and not is_made and (run.tuning == "lora" or run.freeze_vit):
        weights = dict(new_model(run, family, config).named_parameters())
    source = ModelSource(
        run if weights else dataclasses.replace(run, zero_tails=False),  # tails belong to initial weights
        family,
        config,
        weights,
        from_scratch=files is None,
        vit_dtype=DTYPES[model_file.vit_precision],
    )
    if not source.models.base_shapes:
        return source.resident(engine.device)
    place = Path(run.save_path) / "base"
    if source.needs_folder and not is_made:
        place = _made(place, None, source, _recipe(run, model_file, config, base), engine)
    return source.on_disk(engine.device, place)


def _recipe(run: RunConfig, model_file: ModelFile, config: Any, base: BaseFiles | None) -> dict[str, Any]:
    """All that decides the bits of a base in files, as JSON gives it back."""
    recipe = {
        "arch": run.arch,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "vit_precision": model_file.vit_precision,
        "weights": {"seed": run.seed} if base is None else dataclasses.asdict(base),
        "options": {name: getattr(run, name) for name in DECIDE_BASE},
    }
    return json.loads(json.dumps(recipe))


def _made(
    folder: Path, spare: Path | None, source: ModelSource, recipe: dict[str, Any], engine: Engine
) -> Path:
    """Where a base of this recipe lies, on every rank: in `folder`, else where rank 0 wrote it.

    What is there is whole, for it was renamed into place. A run that died before its first checkpoint may
    have left one of other options.
    """
    if engine.is_main and not _is_made_from(folder, recipe):
        folder = spare or folder
        _write_base(folder, source, engine.device, recipe)
    return Path(engine.gather([str(folder)])[0])


def _is_made_from(folder: Path, recipe: dict[str, Any]) -> bool:
    try:
        return json.loads((folder / MADE_FROM).read_text("utf-8")) == recipe
    except (OSError, ValueError):
        return False


def _write_base(folder: Path, source: ModelSource, device: torch.device, recipe: dict[str, Any]) -> None:
    with new_folder(folder) as temporary:
        source.write(temporary, device)
        (temporary / MADE_FROM).write_text(json.dumps(recipe, indent=1), "utf-8")


def _from_part(
    source: Path,
    base_run: RunConfig,
    base_file: ModelFile,
    family: ModelFamily,
    engine: Engine,
    trained_on: Sequence[Path],
    spare: Path | None,
) -> Start:
    """A checkpoint without its frozen base: build the base as that run did, then take its trainable state."""
    start = start_from(base_run, base_file, family, [], engine, [*trained_on, source], spare)
    state = dict(checkpoint.load(source).state)
    check_same_parameters(state, start.state, str(source))
    return dataclasses.replace(start, state=state)


def _check_same_base(trained_on: Sequence[Path], base: BaseFiles | None, init_from: str | None) -> None:
    """A checkpoint whose frozen base is another one by now is refused; that it may be is told."""
    touched = []
    for checkpoint_folder in trained_on:
        saved = saved_base(checkpoint_folder)
        if saved is None:
            continue
        if base is None or saved.digest != base.digest:
            raise InputError(
                f"{checkpoint_folder}: was trained on other weights than {init_from} holds now; expected the "
                "base as it was; put it back, or name the folder that has it with --init_from."
            )
        if saved.stamps != base.stamps:
            touched.append(checkpoint_folder)
    if touched:
        log.warning(
            "%s: the files of %s have other times or sizes than when it was trained on them; the first and "
            "last row of every tensor are as they were, and no more was compared; if the files were not just "
            "copied or touched, put the earlier ones back.",
            touched[0],
            init_from,
        )


def check_same_parameters(state: State, initial: State, source: str) -> None:
    """A checkpoint of another architecture is refused by the first parameter that differs."""
    for name in sorted(state.keys() | initial.keys()):
        got, expected = (tuple(s[name].shape) if name in s else "nothing" for s in (state, initial))
        if got != expected:
            raise InputError(
                f"{source}: checkpoint of another architecture: {name} has shape {got}, this run's model "
                f"expects {expected}; use the --cfg-path, --tuning and --lora_r it was trained with."
            )
