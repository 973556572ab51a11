"""Memory of one client in a process of its own: its training, and before that the look at its images."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from measuring import bytes_in_files, device_peak, forget_device_peak
from safetensors.torch import load_file, save_file

from scalefl.contracts import ClientTask
from scalefl.data.images import decode_all
from scalefl.features import FEATURE_BATCH, image_features
from scalefl.federation.rounds import trainer_of
from scalefl.federation.setup import Federation


def peak_of_a_client(federation: Federation, level: int) -> int:
    """From a state in a file, of which it takes its slice, to its change."""
    run, store, engine = federation.run, federation.store, federation.engine
    path = Path(run.save_path) / "state.safetensors"
    if engine.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(federation.initial_state, path)
    engine.barrier()
    federation = dataclasses.replace(federation, initial_state={})
    state = load_file(path)  # pages of the file, which go with it
    received = {name: t.clone() for name, t in store.models.level_state(level, state).items()}
    model: Any = store.submodel(level, state, own=True, place=engine.place)
    del state
    if run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    # On the CPU a base in files is pages of these; of what is read in passing nothing need stay in memory.
    base = bytes_in_files(model.parameters(), Path(run.save_path) / "base")
    task = ClientTask(client=0, level=level, round=1, example_ids=federation.clients[0])
    forget_device_peak(store.device)
    session = engine.session(model, run)
    update = trainer_of(federation).train(session, task, received, run.lr)
    assert update.metrics["steps"] == run.local_steps
    return device_peak(store.device) + base


def peak_of_features(federation: Federation) -> int:
    """Of the vision tower's pass over a batch of images, beside the trainable state."""
    store, engine, data = federation.store, federation.engine, federation.data
    run = dataclasses.replace(federation.run, feature_cache="memory")
    decode = functools.partial(
        decode_all, read_image=data.read_image, prepare=federation.processor.resize, workers=1
    )
    tower = store.vision_tower()
    base = bytes_in_files(tower.parameters(), Path(run.save_path) / "base")
    del tower
    forget_device_peak(store.device)
    few = data.splits["train"][:FEATURE_BATCH]  # what is kept of them counts in no plan
    image_features(run, engine, store, federation.processor, few, decode)
    return device_peak(store.device) + base
