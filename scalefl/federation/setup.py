"""Everything a run needs, built once: data, partition, model, levels, engine."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import is_flash_attn_2_available

from scalefl.batches import Batcher
from scalefl.config.derived import (
    LABEL_PARTITIONERS,
    adjusts_logits,
    caches_features,
    check_attention,
    holds_whole_base,
    micro_batch_size,
    trains_here,
)
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.saved import BaseFiles, save_config
from scalefl.contracts import SPLITS, DataSplits, InputError, State
from scalefl.data.images import decode_all
from scalefl.data.partition import partition, partition_held_out
from scalefl.engine.launch import Engine
from scalefl.engine.optimizers import check_quantisation
from scalefl.evaluate import Evaluator
from scalefl.features import image_features
from scalefl.federation.resources import read_resources
from scalefl.federation.start import Origin, start_from
from scalefl.levels import assign_levels
from scalefl.models.files import write_order
from scalefl.models.store import Store
from scalefl.registry import resolve
from scalefl.seeding import numpy_rng
from scalefl.slicing.order import Order

HELD_OUT = ("val", "test")


@dataclass(frozen=True, kw_only=True)
class Federation:
    run: RunConfig
    model_file: ModelFile
    engine: Engine
    data: DataSplits
    processor: Any
    store: Store
    initial_state: State
    base: BaseFiles | None
    """What the frozen base was read from, if from files."""
    origin: Origin
    """Where the frozen base comes from."""
    order: Order
    """Of heads and channels, for the export to undo."""
    batchers: dict[str, Batcher]
    """Per split."""
    evaluators: dict[str, Evaluator]
    """Per held-out split."""
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
    def example_row(self) -> Mapping[str, Any]:
        """A training row, from whichever split has one, by which costs are counted."""
        batcher = next(batcher for batcher in self.batchers.values() if batcher.examples)
        return batcher.training([0]).inputs

    @property
    def adjusts_logits(self) -> bool:
        return adjusts_logits(self.run, closed_answers=self.data.answers is not None)

    def write_config(self, folder: Path) -> None:
        """The run's config and the processor; the model's too where the weights are all there.

        Without it transformers refuses a folder that lacks the frozen base, whose weights it would make up.
        """
        save_config(folder, self.run, self.model_file, self.base)
        if not self.store.models.base_shapes:
            self.store.models.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        write_order(folder, self.order)


def build(
    run: RunConfig, model_file: ModelFile, checkpoint: Path | None = None, spare_base: Path | None = None
) -> Federation:
    """Read and check the data, deal it to clients, and build the global model.

    `checkpoint` is what a run goes on from, or what is evaluated: other data must not train another
    tokenizer, and the frozen base must be the one it was trained on. `spare_base` is the folder of a base in
    files where that of the run must stay as it is. An evaluation needs training examples for
    `--evalmode local` alone, to know what its clients hold.
    """
    engine = Engine(run)
    check_launch(run, engine)
    data = read_data(run)
    family, trained_on = resolve("arch", run.arch), [] if checkpoint is None else [checkpoint]
    start = start_from(run, model_file, family, _texts(data), engine, trained_on, spare_base)
    processor, store = start.processor, start.store
    clients = _deal(run, data)
    client_levels = run.client_levels or assign_levels(run.num_clients, run.client_split_ratios, run.seed)
    batchers = _batchers(run, engine, store, processor, data)
    judging = {"run": run, "engine": engine, "store": store, "answers": data.answers, "processor": processor}
    return Federation(
        run=run,
        model_file=model_file,
        engine=engine,
        data=data,
        processor=processor,
        store=store,
        initial_state=start.state,
        base=start.base,
        origin=start.origin,
        order=start.order,
        batchers=batchers,
        evaluators={split: Evaluator(batcher=batchers[split], **judging) for split in HELD_OUT},
        clients=clients,
        client_levels=client_levels,
        held_out={split: _held_out(run, data, split, clients, client_levels, store) for split in HELD_OUT},
    )


def check_launch(run: RunConfig, engine: Engine) -> None:
    """Refuse what this launch cannot do before data is read."""
    ranks_apart = resolve("executor", run.executor).splits
    if run.executor == "jobs" and run.evaluate_from is None:
        levels = tuple(range(1, len(run.horizontal_scale_ratios) + 1))
        resources = read_resources(run.level_resources, levels)
        resolve("job_launcher", run.job_launcher)(run, resources)
        for wanted in resources.values():
            micro_batch_size(run, wanted.processes)
    micro_batch_size(run, 1 if ranks_apart else engine.num_processes)
    holds_whole_base(run, engine.shards_weights)
    if trains_here(run):
        check_attention(run, engine.device.type, is_flash_attn_2_available())
    check_quantisation(run, engine.device)


def read_data(run: RunConfig) -> DataSplits:
    """The splits as this run uses them, checked."""
    data = resolve("data", run.data)(run)
    if run.evaluate_from is None:
        data = _training_splits(data, run)
    _check_answers(run, data)
    return data


def _texts(data: DataSplits) -> list[str]:
    """All that a tokenizer may be trained on."""
    shown = {text for split in data.splits.values() for e in split for text in (e.question, e.answer)}
    return [*sorted(shown), *(data.answers or ())]


def _deal(run: RunConfig, data: DataSplits) -> tuple[tuple[int, ...], ...]:
    """Per client, its training examples; none where nobody asks for them."""
    if run.evaluate_from is not None and run.evalmode != "local":
        return ()
    if run.data_here == "held_out":  # clients bring their own
        return ((),) * run.num_clients
    return partition(
        data.splits["train"],
        num_clients=run.num_clients,
        partitioner=run.partitioner,
        alpha=run.alpha,
        classes_per_client=run.classes_per_client,
        min_patients=run.min_patients,
        seed=run.seed,
        client_names=run.client_names,
    )


def _batchers(
    run: RunConfig, engine: Engine, store: Store, processor: Any, data: DataSplits
) -> dict[str, Batcher]:
    """Per split that is looked at; then the frozen base is all where it stays."""
    names = HELD_OUT if run.evaluate_from is not None else ("train", *HELD_OUT)
    shown = {split: data.splits[split] for split in names}
    decode = functools.partial(
        decode_all, read_image=data.read_image, prepare=processor.resize, workers=run.workers
    )
    features = None
    if caches_features(run):
        features = image_features(
            run, engine, store, processor, [e for split in shown.values() for e in split], decode
        )
    store.load()  # after the vision tower has come and gone: both need not fit at once
    return {
        split: Batcher(
            processor, examples, decode(examples) if features is None else {}, engine.device, features
        )
        for split, examples in shown.items()
    }


def _training_splits(data: DataSplits, run: RunConfig) -> DataSplits:
    """With `--use-valid` the splits as they are; without, validation examples are trained on."""
    splits = {name: tuple(data.splits.get(name, ())) for name in SPLITS}
    if run.use_valid and not splits["val"] and run.data_here != "train":
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


def _held_out(
    run: RunConfig,
    data: DataSplits,
    split: str,
    clients: tuple[tuple[int, ...], ...],
    client_levels: tuple[int, ...],
    store: Store,
) -> dict[int, list[int]]:
    """Level -> the examples it is evaluated on.

    `--evalmode global`: everything; `local`: the pooled held-out data of the level's clients. `--eval_limit`
    draws as many of them, by seed: files lie sorted by grade.
    """
    examples = data.splits[split]
    if run.evalmode == "global":
        of_level = {level: list(range(len(examples))) for level in store.models.evaluated_levels}
    else:
        parts = partition_held_out(
            examples, data.splits["train"], clients, partitioner=run.partitioner, seed=run.seed, purpose=split
        )
        of_level = {level: [] for level in store.models.levels if level in client_levels}
        for part, level in zip(parts, client_levels, strict=True):
            of_level[level] += part
    order = numpy_rng(run.seed, f"eval_limit {split}").permutation(len(examples))
    rank = {int(example): place for place, example in enumerate(order)}
    return {
        level: sorted(sorted(ids, key=rank.__getitem__)[: run.eval_limit]) for level, ids in of_level.items()
    }
