"""Faults in the processes of a run, for tests that put this folder on PYTHONPATH.

`SCALEFL_FAULT`, a JSON object, says which: `client` (or the first one of `rank`) and `round`, whose training
is hit; `kind`, what happens; `times`, how many attempts are hit, counted over all processes in files of the
folder `marks`; `unseen`, that the client's own check is passed; `silence`, after how many seconds a rank that
says nothing is lost; `grace`, after how many a process that was told to end is ended;
`meeting`, in how many the processes of a launch must meet; `patience`, for how many a rank whose client
failed waits for the others' word. Of kinds `slow save`,
`slow end` and `full disk` no client is hit: a checkpoint, or the results, take `seconds`, or what `rank` has
of a round cannot be written. Nor of kinds `raise in evaluation` and `stop in evaluation` of `rank`. Of kind
`note` every client's level, rank and launch go to the file `marks`.
"""

import errno
import json
import os
import signal
import time
from pathlib import Path


def _hit(fault: dict) -> bool:
    """Whether this attempt is hit; it is counted."""
    marks = Path(fault["marks"])
    marks.mkdir(parents=True, exist_ok=True)
    for number in range(fault.get("times", 1)):
        try:
            (marks / str(number)).touch(exist_ok=False)
            return True
        except FileExistsError:
            continue
    return False


def _install(fault: dict) -> None:
    import dataclasses

    import torch

    from scalefl import checkpoint
    from scalefl.engine import launch, watchdog
    from scalefl.federation import exchange
    from scalefl.federation.client import ClientTrainer
    from scalefl.federation.records import RunFolder

    rank = int(os.environ.get("RANK", "0"))
    watchdog.SILENCE_SECONDS = fault.get("silence", watchdog.SILENCE_SECONDS)
    watchdog.MEETING_SECONDS = fault.get("meeting", watchdog.MEETING_SECONDS)
    watchdog.GRACE_SECONDS = fault.get("grace", watchdog.GRACE_SECONDS)
    launch.PATIENCE_SECONDS = fault.get("patience", launch.PATIENCE_SECONDS)
    if fault["kind"] == "slow end":
        results = RunFolder.write_results
        RunFolder.write_results = lambda self, content: (
            time.sleep(fault["seconds"] if self._writes else 0) or results(self, content)
        )
        return
    if fault["kind"] == "slow save":
        save = checkpoint.save
        checkpoint.save = lambda *args: time.sleep(fault["seconds"]) or save(*args)
        return

    if fault["kind"] == "full disk":
        save_part = checkpoint.save_rank_part
        checkpoint.save_rank_part = lambda folder, *args: (
            _no_space(folder) if rank == fault["rank"] else save_part(folder, *args)
        )
        return
    if fault["kind"] in ("raise in evaluation", "stop in evaluation"):
        _hit_evaluation(fault, rank)
        return
    train, write_note = ClientTrainer.train, exchange.write_note
    if fault["kind"] == "note":
        ClientTrainer.train = lambda self, session, task, *args: (
            _note(fault, f"level {task.level}, rank {rank}: {self.engine.launch}")
            or train(self, session, task, *args)
        )
        return

    def faulty(self, session, task, sent, lr):
        where = (fault.get("client", task.client), fault.get("rank", rank), fault.get("round", 1))
        chosen = where == (task.client, rank, task.round)
        if not chosen or not _hit(fault):
            return train(self, session, task, sent, lr)
        kind = fault["kind"]
        if kind == "raise":
            raise RuntimeError("a fault")
        if kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "sleep":
            time.sleep(3600)
        if kind == "wait":
            while True:  # until the run is told to stop
                self.check_stop(self.engine)
                time.sleep(0.05)
        if kind == "fill":
            _fill(Path(fault["folder"]) / "filler")
        update = train(self, session, task, sent, lr)
        delta = {name: tensor.clone() for name, tensor in update.delta.items()}
        if kind == "nan" and delta:
            next(iter(delta.values())).view(-1)[0] = torch.nan
        if kind == "shapes" and delta:
            name = next(iter(delta))
            delta[name] = torch.zeros(3, 5)
        if kind == "truncate":
            exchange.write_note = truncating
        return dataclasses.replace(update, delta=delta)

    def truncating(path, name, content):
        tensors = path.parent / content["tensors"]["file"]
        with open(tensors, "rb+") as file:
            file.truncate(tensors.stat().st_size // 2)
        exchange.write_note = write_note
        return write_note(path, name, content)

    ClientTrainer.train = faulty
    if fault.get("unseen"):
        from scalefl.federation import attempts

        attempts.unusable = lambda delta, shapes: None


def _note(fault: dict, line: str) -> None:
    with open(fault["marks"], "a") as file:
        file.write(f"{line}\n")


def _hit_evaluation(fault: dict, rank: int) -> None:
    """Of `rank`, which raises; or is told to stop, and cannot save what it has of the round."""
    from scalefl import checkpoint
    from scalefl.evaluate import Evaluator

    level = Evaluator.level

    def faulty(self, *args):
        if rank == fault["rank"] and fault["kind"] == "raise in evaluation":
            raise RuntimeError("a fault")
        if rank == fault["rank"]:
            os.kill(os.getpid(), signal.SIGTERM)
            checkpoint.save = lambda folder, *args: _no_space(folder)
        return level(self, *args)

    Evaluator.level = faulty


def _no_space(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


if "SCALEFL_FAULT" in os.environ:
    _install(json.loads(os.environ["SCALEFL_FAULT"]))
