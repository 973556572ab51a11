"""Everything a run needs, built once: data, partition, model, levels, engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scalefl import checkpoint
from scalefl.batches import Batcher
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.saved import CONFIG_FILE, load_config, save_config
from scalefl.contracts import SPLITS, DataSplits, InputError, State
from scalefl.data.images import decode_all
from scalefl.data.partition import partition, partition_held_out
from scalefl.engine import Engine
from scalefl.evaluate import Evaluator
from scalefl.federation.client import micro_batch_size
from scalefl.levels import assign_levels
from scalefl.models.build import build_global, new_model
from scalefl.models.store import ResidentStore
from scalefl.registry import resolve

LABEL_PARTITIONERS = ("dirichlet", "pathological")


@dataclass(frozen=True, kw_only=True)
class Federation:
    run: RunConfig
    model_file: ModelFile
    engine: Engine
    data: DataSplits
    processor: Any
    store: ResidentStore
    initial_state: State
    batchers: dict[str, Batcher]
    """Per split."""
    evaluator: dict[str, Evaluator]
    """Per split."""
    clients: tuple[tuple[int, ...], ...]
    """Per client, indices into the training split."""
    client_levels: tuple[int, ...]
    held_out: dict[str, dict[int, list[int]]]
    """Split -> level -> the examples it is evaluated on."""

    @property
    def answer_ids(self) -> tuple[tuple[int, ...], ...] | None:
        """The closed answer set as token ids, with their end symbol."""
        if self.data.answers is None:
            return None
        return tuple(tuple(self.processor.encode_answer(answer)) for answer in self.data.answers)

    @property
    def adjusts_logits(self) -> bool:
        """`--logit_adjustment auto`: closed answers, and clients whose training draws are skewed by label."""
        if self.run.logit_adjustment == "auto":
            skewed = self.run.partitioner in LABEL_PARTITIONERS and not self.run.balanced_sampling
            return self.data.answers is not None and skewed
        return self.run.logit_adjustment == "on"

    def write_config(self, folder: Path) -> None:
        """The run's config, the model's and the processor, which make a folder of weights loadable."""
        save_config(folder, self.run, self.model_file)
        self.store.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def build(run: RunConfig, model_file: ModelFile, processor_from: str | None = None) -> Federation:
    """Read and check the data, deal it to clients, and build the global model.

    `processor_from` is a checkpoint whose tokenizer to use: other data must not train another one.
    """
    engine = Engine(run)
    micro_batch_size(run, engine.num_processes)  # refuses a batch that cannot be shared before data is read
    data = _training_splits(resolve("data", run.data)(run), run)
    _check_answers(run, data)
    family = resolve("arch", run.arch)
    texts = sorted({text for split in data.splits.values() for e in split for text in (e.question, e.answer)})
    processor, store, state = _model(
        run, model_file, family, [*texts, *(data.answers or ())], processor_from, engine.device
    )
    clients = partition(
        data.splits["train"],
        num_clients=run.num_clients,
        partitioner=run.partitioner,
        alpha=run.alpha,
        classes_per_client=run.classes_per_client,
        min_patients=run.min_patients,
        seed=run.seed,
    )
    client_levels = assign_levels(run.num_clients, run.client_split_ratios, run.seed)
    pixels = {
        split: decode_all(examples, data.read_image, processor.resize, run.workers)
        for split, examples in data.splits.items()
    }
    batchers = {
        split: Batcher(processor, examples, pixels[split], engine.device)
        for split, examples in data.splits.items()
    }
    evaluator = {
        split: Evaluator(
            run=run, engine=engine, store=store, batcher=batcher, answers=data.answers, processor=processor
        )
        for split, batcher in batchers.items()
    }
    return Federation(
        run=run,
        model_file=model_file,
        engine=engine,
        data=data,
        processor=processor,
        store=store,
        initial_state=state,
        batchers=batchers,
        evaluator=evaluator,
        clients=clients,
        client_levels=client_levels,
        held_out={
            split: _held_out(run, data, split, clients, client_levels, store) for split in ("val", "test")
        },
    )


def _training_splits(data: DataSplits, run: RunConfig) -> DataSplits:
    """With `--use-valid` the splits as they are; without, validation examples are trained on."""
    splits = {name: tuple(data.splits.get(name, ())) for name in SPLITS}
    if run.use_valid and not splits["val"]:
        raise InputError(
            f"--use-valid: {data.name} has no validation examples; expected a val split, or --no-use-valid "
            "to keep the last round instead of the best."
        )
    if not run.use_valid:
        splits = {"train": splits["train"] + splits["val"], "val": (), "test": splits["test"]}
    return DataSplits(name=data.name, splits=splits, answers=data.answers, read_image=data.read_image)


def _check_answers(run: RunConfig, data: DataSplits) -> None:
    if data.answers is not None:
        return
    for option, value, ok in (
        ("--logit_adjustment", run.logit_adjustment, run.logit_adjustment != "on"),
        ("--scoring", run.scoring, run.scoring != "rank"),
        ("--partitioner", run.partitioner, run.partitioner not in LABEL_PARTITIONERS),
        ("--balanced_sampling", run.balanced_sampling, not run.balanced_sampling),
    ):
        if not ok:
            raise InputError(
                f"{option} {value}: {data.name} has free-text answers; expected a closed answer set, "
                "or --logit_adjustment off --scoring generate --partitioner iid."
            )


def _model(
    run: RunConfig,
    model_file: ModelFile,
    family: Any,
    texts: list[str],
    processor_from: str | None,
    device: torch.device,
) -> tuple[Any, ResidentStore, State]:
    """The processor, the store and the trainable state a run starts from."""
    if run.init_from is None:
        processor = (
            family.load_processor(processor_from) if processor_from else family.processor(model_file, texts)
        )
        model = new_model(run, family, family.config(model_file, processor))
        store, state = build_global(run, family, model, from_scratch=True, device=device)
        return processor, store, state
    source = Path(run.init_from)
    if (source / CONFIG_FILE).is_file():
        earlier, earlier_file = load_config(source)
        if earlier.arch != run.arch:
            raise InputError(f"--init_from {source}: holds a {earlier.arch}; expected a {run.arch}.")
        if earlier.tuning == "lora" or earlier.freeze_vit:
            return _from_part(run, source, earlier, earlier_file, family, device)
    if not (source / "config.json").is_file():
        raise InputError(
            f"--init_from {source}: no model there; expected a folder with config.json and model.safetensors "
            "or a checkpoint such as SAVE_PATH/checkpoints/round-0005."
        )
    model, processor = family.load_folder(str(source))
    store, state = build_global(run, family, model, from_scratch=False, device=device)
    return processor, store, state


def _from_part(
    run: RunConfig,
    source: Path,
    earlier: RunConfig,
    earlier_file: ModelFile,
    family: Any,
    device: torch.device,
) -> tuple[Any, ResidentStore, State]:
    """A checkpoint without its frozen base: build the base as that run did, then take its trainable state."""
    progress = checkpoint.load(source)
    same = ("tuning", "freeze_vit", "lora_r", "lora_targets", "ee_locs")
    differing = [name for name in same if getattr(earlier, name) != getattr(run, name)]
    if differing:
        raise InputError(
            f"--init_from {source}: holds only the trained part of a model; expected the options it was "
            f"trained with: {', '.join(f'--{name} {getattr(earlier, name)}' for name in differing)}."
        )
    processor = family.load_processor(str(source))
    if earlier.init_from is None:
        model = new_model(earlier, family, family.config(earlier_file, processor))
    else:
        model, _ = family.load_folder(earlier.init_from)
    store, _ = build_global(run, family, model, from_scratch=earlier.init_from is None, device=device)
    return processor, store, dict(progress.state)


def _held_out(
    run: RunConfig,
    data: DataSplits,
    split: str,
    clients: tuple[tuple[int, ...], ...],
    client_levels: tuple[int, ...],
    store: ResidentStore,
) -> dict[int, list[int]]:
    """`--evalmode global`: everything for every level; `local`: the pooled held-out data of a level's
    clients.
    """
    examples = data.splits[split]
    levels = [level for level in store.slices if level in client_levels or run.evalmode == "global"]
    if run.evalmode == "global" or not examples:
        return {level: list(range(len(examples))) for level in store.evaluated_levels}
    parts = partition_held_out(
        examples, data.splits["train"], clients, partitioner=run.partitioner, seed=run.seed, purpose=split
    )
    return {
        level: sorted(i for part, of in zip(parts, client_levels, strict=True) if of == level for i in part)
        for level in levels
    }
