"""Rounds under each executor, what a job costs beside its training, and the speed of the merge.

    python benchmarks/executors.py [--parts parallel jobs merge] [--clients 16] [--local-steps 2] [--small]

parallel: a round of clients in four levels by two processes, each clients of its own, against one process
and two that train each client together; one thread a process. Balance is the busiest process's training
time over the mean. jobs: per client, seconds from launch to the client's main function (launch), to its first
step (load), in training (train), and from there to its merge, less the wait for the clients before it
(exchange). merge: bytes of updates added to the sums a second, against a plain copy of memory.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from measuring import Row, show
from midsize import options_of, resolved

from scalefl.aggregation.coverage_mean import CoverageMean
from scalefl.contracts import ClientUpdate
from scalefl.federation import desk, exchange
from scalefl.federation.local import Local
from scalefl.federation.run import train
from scalefl.slicing.plan import PlanEntry

ROUNDS = 2
"""The first one warms up and is not counted."""

FASTER, BALANCE, MERGE = 1.7, 1.15, 0.5
"""Limits: how many times as fast parallel is; busiest process over mean; merge over a copy of memory."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--local-steps", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a model of no weight, to try this script out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    return max(PARTS[part](arguments) for part in arguments.parts)


def parallel(arguments: Any) -> int:
    seconds, records = {}, {}
    for name, processes, executor in (
        ("one process", 1, "sequential"),
        ("two processes, together", 2, "sequential"),
        ("two processes, apart", 2, "parallel"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            records[name] = _rounds(Path(folder), processes, executor, arguments)
        seconds[name] = records[name][-1]["training_seconds"]
    busy = [0.0, 0.0]
    for client in records["two processes, apart"][-1]["clients"]:
        busy[client["rank"]] += client["seconds"]
    balance = max(busy) / (sum(busy) / len(busy))
    one, apart = seconds["one process"], seconds["two processes, apart"]
    judged = not arguments.small
    rows = [
        Row(cells=(name, f"{value:.1f}"), ratio=value / one, limit=None) for name, value in seconds.items()
    ]
    rows[-1] = dataclasses.replace(rows[-1], ratio=apart / one, limit=1 / FASTER if judged else None)
    rows.append(
        Row(cells=("busiest process over mean", "-"), ratio=balance, limit=BALANCE if judged else None)
    )
    title = f"Training of a round of {arguments.clients} clients, {arguments.local_steps} steps each"
    return show(title, ["what", "seconds"], rows)


def _rounds(folder: Path, processes: int, executor: str, arguments: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    options = options_of(
        folder,
        small=arguments.small,
        num_clients=arguments.clients,
        local_steps=arguments.local_steps,
        num_rounds=ROUNDS,
        eval_every=ROUNDS + 1,
        executor=executor,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes"]
        command += [
            str(processes),
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        command += ["-m"]
    done = subprocess.run(
        [*command, "scalefl", "train", "--config", str(folder / "run.yaml")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    lines = (Path(options["save_path"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class Timed(Local):
    """Jobs on this machine, with the time of each client's launch."""

    launched: dict[str, float] = {}
    """Task file -> seconds since the epoch."""

    def start(self, jobs: Sequence[Any]) -> None:
        self.launched.update({task.name: time.time() for job in jobs for task in job.tasks})
        super().start(jobs)


def in_jobs(arguments: Any) -> int:
    """One job at a time, so that jobs do not wait for each other's cores."""
    rows, phases = [], ("launch", "load", "train", "exchange")
    with tempfile.TemporaryDirectory() as folder:
        merged = _trace_jobs()
        run, model_file = resolved(
            Path(folder),
            small=arguments.small,
            num_clients=4,
            local_steps=arguments.local_steps,
            num_rounds=1,
            executor="jobs",
            job_launcher=f"{__name__}:Timed",
            max_jobs=1,
            clients_per_job=1,
            client_split_ratios=(0.25,) * 4,
        )
        train(run, model_file)
    for level, name, times, read, bytes_up in merged:
        spans = [Timed.launched[name], times["begun"], times["ready"], times["trained"], times["written"]]
        parts = [after - before for before, after in zip(spans, spans[1:], strict=False)]
        parts[-1] += read
        rows.append(Row(cells=(level, *(f"{part:.2f}" for part in parts), f"{bytes_up / 1e6:.2f}")))
    title = f"Seconds of a job of one client, {arguments.local_steps} steps, one job at a time"
    return show(title, ["level", *phases, "MB each way"], rows)


def _trace_jobs() -> list[tuple[int, str, dict[str, float], float, int]]:
    """Per merged client: level, task file, its times, seconds in which its answer was read, bytes of it."""
    found: list[tuple[int, str, dict[str, float], float, int]] = []
    outcome = desk.Desk.outcome

    def traced(self: desk.Desk, ticket: desk.Ticket) -> Any:
        started = time.perf_counter()
        update = outcome(self, ticket)
        seconds = time.perf_counter() - started
        if update is None:
            return None
        assert ticket.update is not None and ticket.file is not None
        content = ticket.update.content
        written = exchange.answer_path(ticket.file, "update").stat().st_mtime
        times = {**content["times"], "written": written}
        found.append((ticket.task.level, ticket.file.name, times, seconds, content["tensors"]["bytes"]))
        return update

    desk.Desk.outcome = traced  # type: ignore[method-assign]
    return found


def merge(arguments: Any) -> int:
    """Of a level that holds everything, and of one that holds the first half of the rows and columns."""
    side = 64 if arguments.small else 4096
    state = {f"w{i}": torch.zeros(side, side) for i in range(4)}
    update = {name: torch.ones(side, side) for name in state}
    nbytes, rows = 4 * side * side * len(state), []
    target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    copying = _least(lambda: [target[name].copy_(tensor) for name, tensor in update.items()])
    rows.append(Row(cells=("copy of memory", f"{nbytes / copying / 1e9:.1f}")))
    for name, kept in (("whole level", side), ("half of the rows and columns", side // 2)):
        plan = {n: PlanEntry(global_name=n, index=(slice(0, kept), slice(0, kept))) for n in state}
        rule = CoverageMean(state, {1: plan}, "examples")
        delta = {n: tensor[:kept, :kept].contiguous() for n, tensor in update.items()}
        sent = ClientUpdate(client=0, level=1, delta=delta, num_examples=3, metrics={})
        rule.add(sent)
        adding = _least(lambda rule=rule, sent=sent: rule.add(sent))  # type: ignore[misc]
        speed = sum(tensor.nbytes for tensor in delta.values()) / adding
        ratio, limit = speed / (nbytes / copying), None if arguments.small else 10.0
        rows.append(Row(cells=(name, f"{speed / 1e9:.1f}"), ratio=ratio, limit=limit, least=MERGE))
    return show(f"Merge of an update of {nbytes / 1e6:.0f} MB", ["what", "GB/s"], rows)


def _least(call: Any, times: int = 9) -> float:
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


PARTS = {"parallel": parallel, "jobs": in_jobs, "merge": merge}

if __name__ == "__main__":
    sys.exit(main())
