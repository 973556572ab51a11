"""Everything a run needs, built once: data, partition, model, levels, engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalefl.batches import Batcher
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.saved import save_config
from scalefl.contracts import SPLITS, DataSplits, Example, InputError, State
from scalefl.data.images import decode_all
from scalefl.data.partition import partition, partition_held_out
from scalefl.engine.launch import Engine
from scalefl.evaluate import Evaluator
from scalefl.features import FEATURE_BATCH, FrozenTower, keep_in_files, keep_in_memory, tower_fingerprint
from scalefl.federation.client import micro_batch_size
from scalefl.federation.start import start_from
from scalefl.levels import assign_levels
from scalefl.models.build import DTYPES
from scalefl.models.store import Store
from scalefl.registry import resolve
from scalefl.seeding import numpy_rng

LABEL_PARTITIONERS = ("dirichlet", "pathological")
HELD_OUT = ("val", "test")
DECODED_AT_ONCE = 64
"""Images whose pixels are in memory while features are computed."""


@dataclass(frozen=True, kw_only=True)
class Federation:
    run: RunConfig
    model_file: ModelFile
    engine: Engine
    data: DataSplits
    processor: Any
    store: Store
    initial_state: State
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
    def adjusts_logits(self) -> bool:
        """`--logit_adjustment auto`: closed answers, and clients whose training draws are skewed by label."""
        if self.run.logit_adjustment == "auto":
            skewed = self.run.partitioner in LABEL_PARTITIONERS and not self.run.balanced_sampling
            return self.data.answers is not None and skewed
        return self.run.logit_adjustment == "on"

    def write_config(self, folder: Path) -> None:
        """The run's config and the processor; the model's too where the weights are all there.

        Without it transformers refuses a folder that lacks the frozen base, whose weights it would make up.
        """
        save_config(folder, self.run, self.model_file)
        if not self.store.models.base_shapes:
            self.store.models.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def build(run: RunConfig, model_file: ModelFile, processor_from: str | None = None) -> Federation:
    """Read and check the data, deal it to clients, and build the global model.

    `processor_from` is a checkpoint whose tokenizer to use: other data must not train another one. Evaluating
    a checkpoint needs training examples for `--evalmode local` alone, to know what its clients hold.
    """
    engine = Engine(run)
    micro_batch_size(run, engine.num_processes)  # refuses a batch that cannot be shared before data is read
    trains = run.evaluate_from is None
    data = resolve("data", run.data)(run)
    data = _training_splits(data, run) if trains else data
    _check_answers(run, data)
    family = resolve("arch", run.arch)
    texts = sorted({text for split in data.splits.values() for e in split for text in (e.question, e.answer)})
    processor, store, state = start_from(
        run, model_file, family, [*texts, *(data.answers or ())], processor_from, engine
    )
    clients: tuple[tuple[int, ...], ...] = ()
    if trains or run.evalmode == "local":
        clients = partition(
            data.splits["train"],
            num_clients=run.num_clients,
            partitioner=run.partitioner,
            alpha=run.alpha,
            classes_per_client=run.classes_per_client,
            min_patients=run.min_patients,
            seed=run.seed,
            client_names=run.client_names,
        )
    client_levels = run.client_levels or assign_levels(run.num_clients, run.client_split_ratios, run.seed)
    shown = {split: data.splits[split] for split in (("train", *HELD_OUT) if trains else HELD_OUT)}
    decode = functools.partial(
        decode_all, read_image=data.read_image, prepare=processor.resize, workers=run.workers
    )
    features = _features(
        run, engine, store, processor, [e for split in shown.values() for e in split], decode
    )
    store.load()  # after the vision tower has come and gone: both need not fit at once
    batchers = {
        split: Batcher(
            processor, examples, decode(examples) if features is None else {}, engine.device, features
        )
        for split, examples in shown.items()
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
        evaluators={
            split: Evaluator(
                run=run,
                engine=engine,
                store=store,
                batcher=batchers[split],
                answers=data.answers,
                processor=processor,
            )
            for split in HELD_OUT
        },
        clients=clients,
        client_levels=client_levels,
        held_out={split: _held_out(run, data, split, clients, client_levels, store) for split in HELD_OUT},
    )


def _features(
    run: RunConfig,
    engine: Engine,
    store: Store,
    processor: Any,
    examples: Sequence[Example],
    decode: Callable[[Sequence[Example]], dict[str, Tensor]],
) -> Mapping[str, Tensor] | None:
    """Image -> what the frozen vision tower says of it; the tower then leaves the device.

    None with `--feature_cache off`, where the tower is trained, and where training moves pixels.
    """
    moves_pixels = run.augment and run.evaluate_from is None
    if run.feature_cache == "off" or not run.freeze_vit or moves_pixels:
        return None
    family, model = store.models.family, store.vision_tower()
    weights = {name: p for name, p in model.named_parameters() if family.is_vision(name)}
    held_in = next(iter(weights.values())).dtype
    computed_in = DTYPES[run.precision] if held_in == DTYPES["fp32"] else held_in

    def encode(pixels_bchw: Tensor) -> Tensor:
        with torch.inference_mode(), engine.autocast():
            return family.encode_images(model, pixels_bchw.to(engine.device))

    tower = FrozenTower(
        normalise=processor.normalise,
        encode=encode,
        dtype=computed_in if run.feature_dtype == "auto" else DTYPES[run.feature_dtype],
    )
    distinct = list({example.image_key: example for example in examples}.values())
    starts = range(0, len(distinct), DECODED_AT_ONCE)
    images = (image for at in starts for image in decode(distinct[at : at + DECODED_AT_ONCE]).items())
    features: Mapping[str, Tensor]
    if run.feature_cache == "file":
        settings = family.vision_settings(store.models.config)
        settings |= {"precision": run.precision, "rows": FEATURE_BATCH}
        fingerprint = tower_fingerprint(json.dumps(settings, sort_keys=True), tower, weights)
        folder = Path(run.feature_folder or Path(run.save_path) / "features")
        features = keep_in_files(images, tower, engine, folder, fingerprint)
    else:
        features = keep_in_memory(images, len(distinct), tower, engine)
    store.drop_vision()
    return features


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
