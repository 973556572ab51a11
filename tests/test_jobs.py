"""The jobs executor: clients in processes of their own, files between, and what becomes of failures."""

import contextlib
import dataclasses
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import (
    Job,
    arguments,
    federation,
    forget_launch,
    largest_difference,
    records,
    resolved,
    resume,
    same_bits,
    start,
    state,
)
from safetensors.torch import load_file

from scalefl.aggregation.coverage_mean import CoverageMean
from scalefl.cli import main
from scalefl.config.clientoptions import ClientOptions
from scalefl.config.saved import to_dict
from scalefl.contracts import ClientUpdate, InputError
from scalefl.federation import exchange, jobs, worker
from scalefl.federation.attempts import halved, lacks_memory, unusable
from scalefl.federation.client import ClientTrainer
from scalefl.federation.rounds import sample_cohort, trainer_of

ROOT = Path(__file__).resolve().parents[1]

OPTIONS = {"num_rounds": 1, "num_clients": 4, "KD_start": 0.0, "tuning": "lora", "lora_targets": ["q_proj"]}
IN_JOBS = {**OPTIONS, "executor": "jobs", "max_jobs": 2, "clients_per_job": 2}

ROUNDING = 1e-6
"""As in `test_parallel.py`."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The run in one process."""
    return start(tmp_path_factory.mktemp("expected"), **OPTIONS)


@pytest.fixture
def processes(monkeypatch):
    """Makes processes that are started find this code, and the faults that a test asks for."""
    path = os.pathsep.join(map(str, (ROOT / "tests" / "faults", ROOT, ROOT / "tests")))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def faulty(at, kind, **more):
        fault = {"client": 1, "kind": kind, "marks": str(at / "marks"), **more}
        monkeypatch.setenv("SCALEFL_FAULT", json.dumps(fault))

    return faulty


def client_processes(folder):
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            shown = (entry / "cmdline").read_bytes().split(b"\0")
            if b"client" in shown and any(str(folder).encode() in part for part in shown):
                found.append(int(entry.name))
    return found


def knees(folder, counts):
    """Radiographs of noise, a patient each, their grades in turn."""
    for split, count in counts.items():
        for number in range(count):
            path = folder / split / str(number % 5) / f"9000{len(split)}{number:02d}L.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 255, (28, 28), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    return folder


def assert_nothing_is_left(run_folder):
    assert client_processes(run_folder) == []
    assert [path.name for path in (run_folder / "jobs").iterdir()] == ["model"]
    assert not list(run_folder.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.4])
def test_jobs_give_the_bits_of_one_process(tmp_path, processes, tuning, dropout_rate):
    """On the same batches."""
    options = {"num_rounds": 2, "num_clients": 5, "tuning": tuning, "dropout_rate": dropout_rate}
    (tmp_path / "one").mkdir()
    one = start(tmp_path / "one", **options)
    run_folder = start(tmp_path, executor="jobs", max_jobs=2, clients_per_job=3, **options)
    assert same_bits(state(run_folder, 2), state(one, 2))
    assert records(run_folder) == records(one)
    assert_nothing_is_left(run_folder)


@pytest.mark.slow
def test_files_hold_the_trainable_slices_alone(tmp_path, processes, monkeypatch):
    written = []
    write = exchange.write_tensors
    monkeypatch.setattr(exchange, "write_tensors", lambda *args: written.append(write(*args)) or written[-1])
    answers = []
    load = exchange.Note.tensors
    monkeypatch.setattr(exchange.Note, "tensors", lambda self: answers.append(self) or load(self))
    run_folder = start(tmp_path, **IN_JOBS)
    models = federation(tmp_path, **OPTIONS).store.models
    assert [said["bytes"] for said in written] == [models.slice_bytes(level) for level in (1, 2)]
    merged = {note.content["client"]: note.content["tensors"]["bytes"] for note in answers}
    (record,) = records(run_folder)
    for client in record["clients"]:
        assert merged[client["client"]] == models.slice_bytes(client["level"])
    assert record["bytes_down"] == record["bytes_up"] == sum(merged.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more", "options", "cause"),
    [
        ("raise", {}, {}, "RuntimeError: a fault"),
        ("kill", {}, {}, "its job ended without an answer (killed by signal 9 (SIGKILL))"),
        ("sleep", {}, {"client_timeout": 4.0}, "trains for longer than --client_timeout 4 (seconds)"),
        ("nan", {}, {}, "update is not finite in "),
        ("nan", {"unseen": True}, {}, "update is not finite in "),
        ("shapes", {"unseen": True}, {}, "update is of another level: "),
        ("truncate", {}, {}, "client-0001.a1.update.safetensors is cut off"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_client_that_fails_once_is_tried_again(
    tmp_path, processes, expected, kind, more, options, cause, caplog
):
    """And the run is the run without the failure, bit for bit; the cause is in its record, and told once."""
    processes(tmp_path, kind, **more)
    run_folder = start(tmp_path, **IN_JOBS, **options)
    assert same_bits(state(run_folder, 1), state(expected, 1))
    (record,) = records(run_folder)
    failures = {client["client"]: client["failures"] for client in record["clients"]}
    assert [client for client, causes in failures.items() if causes] == [1]
    assert len(failures[1]) == 1
    assert cause in failures[1][0]
    assert record["left_out"] == 0
    (line,) = [text for text in caplog.messages if "client 1" in text]
    assert line == f"client 1 (level 1), round 1, attempt 1 of 2: {failures[1][0]}; it is tried again"
    assert_nothing_is_left(run_folder)


@pytest.mark.slow
def test_a_frozen_client_is_given_up(tmp_path, processes, expected, monkeypatch):
    """Its own watchdog is frozen with it; the main process waits for the timeout, and some time to start."""
    monkeypatch.setattr("scalefl.federation.desk.START_SECONDS", 25.0)
    processes(tmp_path, "freeze")
    run_folder = start(tmp_path, **IN_JOBS, client_timeout=5.0)
    assert same_bits(state(run_folder, 1), state(expected, 1))
    failures = [text for client in records(run_folder)[0]["clients"] for text in client["failures"]]
    assert failures == ["no answer within --client_timeout 5 and 25 s to start"]
    assert_nothing_is_left(run_folder)


@pytest.mark.slow
def test_a_client_that_lacks_memory_takes_smaller_passes(tmp_path, processes, expected, monkeypatch):
    sizes = []
    write = exchange.write_note

    def note(path, kind, content):
        if content.get("client") == 1:
            sizes.append(content["micro_batch_size"])
        return write(path, kind, content)

    monkeypatch.setattr(exchange, "write_note", note)
    processes(tmp_path, "memory", times=3)
    run_folder = start(tmp_path, **IN_JOBS, client_retries=3)
    assert sizes == [None, 2, 1, 1]
    assert largest_difference(state(run_folder, 1), state(expected, 1)) <= ROUNDING
    failures = [text for client in records(run_folder)[0]["clients"] for text in client["failures"]]
    assert failures == ["OutOfMemoryError: CUDA out of memory"] * 3


@pytest.mark.slow
def test_a_client_that_goes_on_failing_is_left_out(tmp_path, processes, capsys):
    processes(tmp_path, "raise", times=9)
    run_folder = start(tmp_path, **IN_JOBS, client_retries=2)
    (record,) = records(run_folder)
    left_out = [client for client in record["clients"] if not client["delivered"]]
    assert [(c["client"], c["failures"]) for c in left_out] == [(1, ["RuntimeError: a fault"] * 3)]
    assert record["left_out"] == 1
    assert "1 left out" in capsys.readouterr().out
    assert_nothing_is_left(run_folder)


@pytest.mark.slow
def test_too_few_clients_stop_the_run_which_goes_on_from_there(tmp_path, processes, expected, capsys):
    processes(tmp_path, "raise", times=1)
    forget_launch()
    code = main(arguments(tmp_path, **IN_JOBS, client_retries=0, min_clients=4))
    assert code == 75
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("scalefl:")]
    assert line == (
        "scalefl: round 1: 3 client(s) delivered, --min_clients is 4; the last failure: RuntimeError: a "
        f"fault; stopped; go on with `scalefl train --resume {tmp_path / 'run'}`."
    )
    assert client_processes(tmp_path) == []
    assert resume(tmp_path / "run") == 0
    assert largest_difference(state(tmp_path / "run", 1), state(expected, 1)) <= ROUNDING
    (record,) = records(tmp_path / "run")
    failures = [client["failures"] for client in sorted(record["clients"], key=lambda c: c["client"])]
    assert failures == [[], ["RuntimeError: a fault"], [], []]
    assert_nothing_is_left(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which root alone may")
def test_a_client_that_fills_the_disk(tmp_path, processes, expected, capsys):
    """One line, exit code 2; with room again the run goes on."""
    disk = tmp_path / "run" / "jobs"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], check=True)
    try:
        processes(tmp_path, "fill", folder=str(disk))
        forget_launch()
        assert main(arguments(tmp_path, **IN_JOBS)) == 2
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("scalefl:")]
        assert "No space left on device; free some space" in line
        assert client_processes(tmp_path) == []
        (disk / "filler").unlink()
        assert resume(tmp_path / "run") == 0
        assert same_bits(state(tmp_path / "run", 1), state(expected, 1))
        assert_nothing_is_left(tmp_path / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_late_answer_to_an_earlier_attempt_is_never_read(tmp_path, processes, expected, monkeypatch):
    """It comes as the next attempt is given out: whole, and of the right shapes."""
    write, late = exchange.write_note, []

    def note(path, kind, content):
        write(path, kind, content)
        if kind == "task" and path.name == "client-0001.a2.task.json":
            first = path.with_name("client-0001.a1.task.json")
            late.append(answer(exchange.read_note(first, "task"), value=1.0))

    monkeypatch.setattr(exchange, "write_note", note)
    processes(tmp_path, "raise")
    run_folder = start(tmp_path, **IN_JOBS)
    assert len(late) == 1
    assert same_bits(state(run_folder, 1), state(expected, 1))
    failures = [text for client in records(run_folder)[0]["clients"] for text in client["failures"]]
    assert failures == ["RuntimeError: a fault"]


def answer(task, value=0.0, **changes):
    """Write one to a task, every element of its update being `value`; its path."""
    path = exchange.answer_path(task.path, "update")
    delta = {name: torch.full_like(tensor, value) for name, tensor in task.tensors().items()}
    content = {
        "task": task.content["task"],
        "num_examples": 3,
        "metrics": {"loss": 1.0},
        "batches": "",
        "tensors": exchange.write_tensors(path.with_suffix(".safetensors"), delta),
    }
    exchange.write_note(path, "update", {**content, **changes})
    return path


@pytest.fixture
def desk(tmp_path):
    """Opens the desk of round 1 in a folder, as every process of a run does anew; nothing is launched."""
    options = {**IN_JOBS, "job_launcher": "manual", "client_retries": 2, "micro_batch_size": 4}
    fed = federation(tmp_path, **options)
    tasks = sample_cohort(fed.run, 1, fed.clients, fed.client_levels)

    def opened(**changes):
        trainer = trainer_of(fed, on_failure=lambda task, cause: None)
        executor = jobs.Jobs(trainer, dataclasses.replace(fed, run=dataclasses.replace(fed.run, **changes)))
        return executor._open(tmp_path / "desk", tasks, fed.initial_state, 0.1)

    return opened


def test_a_run_goes_on_with_the_attempt_that_a_client_was_at(desk):
    """And takes the answer to it; a client that was left out begins with its first."""
    first = desk()
    failing, left_out = first.tickets[0], first.tickets[1]
    first._failed(failing, "out of memory")
    for _ in range(3):
        first._failed(left_out, "a fault")
    assert (failing.attempt, failing.micro_batch_size, left_out.attempt) == (2, 2, 4)
    again = desk()
    assert [(t.attempt, t.micro_batch_size) for t in again.tickets] == [(2, 2), (1, 4), (1, 4), (1, 4)]
    assert again.tickets[0].name == failing.name
    assert len(again._ready) == 4
    answer(exchange.read_note(failing.file, "task"), value=0.5)
    last = desk()
    assert [ticket.update is not None for ticket in last.tickets] == [True, False, False, False]
    assert [ticket.task.client for ticket in last._ready] == [t.task.client for t in last.tickets[1:]]
    assert desk(lr_gamma=0.5).tickets[0].attempt == 1, "a task of other options is another task"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"num_examples": float("nan")}, "it was trained on no examples"),
        ({"num_examples": True}, "it was trained on no examples"),
        ({"num_examples": "3"}, "it was trained on no examples"),
        ({"metrics": {}}, "tells no metrics or batches"),
        ({"metrics": {"loss": "low"}}, "tells no metrics or batches"),
        ({"metrics": [1.0]}, "tells no metrics or batches"),
        ({"batches": 3}, "tells no metrics or batches"),
    ],
    ids=str,
)
def test_an_answer_of_other_types_is_a_failure(desk, changes, cause):
    """Such as one that was written by other means: the digest is of the file, not of who wrote it."""
    opened = desk()
    ticket = opened.tickets[0]
    note = exchange.read_note(answer(exchange.read_note(ticket.file, "task"), **changes), "update")
    assert opened._problem(ticket, note).endswith(cause)
    note = exchange.read_note(answer(exchange.read_note(ticket.file, "task")), "update")
    assert opened._problem(ticket, note) is None


@pytest.mark.parametrize("job_launcher", ["local", "manual"])
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"optimizer": "paged_adamw_8bit", "momentum": 0.0}, "--optimizer: paged_adamw_8bit pages its state"),
        ({"attn": "flash_attention_2", "precision": "bf16"}, "--attn flash_attention_2: needs a CUDA GPU"),
    ],
    ids=["optimizer", "attention"],
)
def test_a_server_need_not_have_what_its_clients_train_with(tmp_path, job_launcher, options, line):
    if job_launcher == "manual":
        federation(tmp_path, **IN_JOBS, job_launcher=job_launcher, **options)
        return
    with pytest.raises(InputError, match=line):
        federation(tmp_path, **IN_JOBS, job_launcher=job_launcher, **options)


@pytest.mark.slow
def test_one_update_is_in_memory_beside_the_sums(tmp_path, processes, monkeypatch):
    held = []
    add = CoverageMean.add

    def counted(self, update):
        held.append(sum(isinstance(o, ClientUpdate) and bool(o.delta) for o in gc.get_objects()))
        return add(self, update)

    monkeypatch.setattr(CoverageMean, "add", counted)
    for executor in ("sequential", "parallel", "jobs"):
        (tmp_path / executor).mkdir()
        start(tmp_path / executor, **{**IN_JOBS, "executor": executor})
    assert held == [1] * 12


@pytest.mark.slow
def test_clients_killed_at_random_moments(tmp_path, processes):
    """kill -9 of a client's process, ten times in a run, whatever it does then."""
    options = {**IN_JOBS, "num_rounds": 5, "client_retries": 20}
    (tmp_path / "one").mkdir()
    one = start(tmp_path / "one", **{**OPTIONS, "num_rounds": 5})
    moments, killed, over = random.Random(3), [], threading.Event()

    def kill():
        while not over.wait(moments.uniform(0.5, 5.0)) and len(killed) < 10:
            for number in client_processes(tmp_path)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
                    killed.append(number)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run_folder = start(tmp_path, **options)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 10, "the run is over already: train longer"
    assert same_bits(state(run_folder, 5), state(one, 5))
    assert_nothing_is_left(run_folder)


@pytest.mark.slow
def test_the_main_process_killed_at_random_moments(tmp_path, processes):
    """kill -9, five times in a run: clients end by themselves; what they answered is not trained again."""
    options = {**IN_JOBS, "num_rounds": 6, "save_every_seconds": 0.0}
    (tmp_path / "one").mkdir()
    one = start(tmp_path / "one", **{**OPTIONS, "num_rounds": 6})
    command = ["-m", "scalefl", *arguments(tmp_path, "--resume", **options)]
    moments = random.Random(5)
    killed = 0
    while killed < 5:
        with Job(tmp_path, command, PYTHONPATH=os.environ["PYTHONPATH"]) as job:
            job.wait_for("client  ")
            time.sleep(moments.uniform(0.2, 5.0))
            assert job.process.poll() is None, "the run is over already: train longer"
            os.kill(job.process.pid, signal.SIGKILL)
            killed += 1
            job.process.wait()
            end = time.monotonic() + 20
            while client_processes(tmp_path) and time.monotonic() < end:
                time.sleep(0.1)
            assert client_processes(tmp_path) == []
    assert resume(tmp_path / "run") == 0
    assert same_bits(state(tmp_path / "run", 6), state(one, 6))
    clients = [client for record in records(tmp_path / "run") for client in record["clients"]]
    assert all(client["failures"] == [] for client in clients), "no fault of theirs"
    assert_nothing_is_left(tmp_path / "run")


@pytest.mark.slow
def test_jobs_of_several_processes_end_without_the_main_process(tmp_path, processes):
    """Their launcher, and the workers in sessions of their own."""
    path = tmp_path / "resources.yaml"
    path.write_text(yaml.safe_dump({"default": {"processes": 2}}))
    processes(tmp_path, "sleep", times=2)
    command = arguments(tmp_path, "--level_resources", str(path), **IN_JOBS)
    with Job(tmp_path, ["-m", "scalefl", *command], **passed_on()) as job:
        job.wait_until(lambda: len(list(tmp_path.glob("marks/*"))) == 2)
        assert len(client_processes(tmp_path)) >= 3
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait()
        end = time.monotonic() + 40
        while client_processes(tmp_path) and time.monotonic() < end:
            time.sleep(0.1)
        assert client_processes(tmp_path) == []


@pytest.mark.slow
def test_a_signal_ends_jobs_and_leaves_a_checkpoint(tmp_path, processes):
    options = {**IN_JOBS, "num_epoch": 3000}
    with Job(tmp_path, ["-m", "scalefl", *arguments(tmp_path, **options)]) as job:
        job.wait_for("client  ")
        end = time.monotonic() + 60
        while not client_processes(tmp_path) and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.end(seconds=30) == 143, job.last_lines
    assert client_processes(tmp_path) == []
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-0001-part"]


@pytest.mark.slow
def test_a_job_of_two_processes(tmp_path, processes, expected):
    """Level 2 by two processes under DDP, level 1 by one."""
    processes(tmp_path, "note")
    path = tmp_path / "resources.yaml"
    config = str(ROOT / "accelerate_configs" / "ddp_cpu.yaml")
    path.write_text(yaml.safe_dump({2: {"processes": 2}}))
    run_folder = start(tmp_path, "--level_resources", str(path), **IN_JOBS)
    assert largest_difference(state(run_folder, 1), state(expected, 1)) <= ROUNDING
    assert_nothing_is_left(run_folder)
    assert trained_by(tmp_path) == {
        *("level 1, rank 0: plain PyTorch", "level 2, rank 0: DDP", "level 2, rank 1: DDP"),
    }
    path.write_text(yaml.safe_dump({"default": {"accelerate_config": config}, 2: {"processes": 3}}))
    forget_launch()
    (tmp_path / "again").mkdir()
    assert main(arguments(tmp_path / "again", "--level_resources", str(path), **IN_JOBS)) == 2


def trained_by(folder):
    """Levels, ranks and launches, as the fault `note` tells."""
    return set((folder / "marks").read_text().splitlines())


@pytest.mark.slow
def test_a_job_under_zero_3(tmp_path, processes, expected):
    """Level 2 by two processes that share its weights, beside jobs of one process."""
    processes(tmp_path, "note")
    path = tmp_path / "resources.yaml"
    config = str(ROOT / "accelerate_configs" / "zero3.yaml")
    path.write_text(yaml.safe_dump({2: {"processes": 2, "accelerate_config": config}}))
    run_folder = start(tmp_path, "--level_resources", str(path), **IN_JOBS)
    assert largest_difference(state(run_folder, 1), state(expected, 1)) <= ROUNDING
    assert all(client["failures"] == [] for client in records(run_folder)[0]["clients"])
    assert_nothing_is_left(run_folder)
    one, *of_two = sorted(trained_by(tmp_path))
    assert one == "level 1, rank 0: plain PyTorch"
    assert of_two == ["level 2, rank 0: ZeRO-3", "level 2, rank 1: ZeRO-3"]


@pytest.mark.slow
def test_answers_hold_when_a_run_goes_on_under_other_options(tmp_path, processes, expected, monkeypatch):
    """Those of clients that answered before the run was killed, where only what is free has changed."""
    processes(tmp_path, "sleep", client=3)  # the last one of its job
    with Job(tmp_path, ["-m", "scalefl", *arguments(tmp_path, **IN_JOBS)], **passed_on()) as job:
        answers = tmp_path / "run" / "jobs" / "round-0001"
        job.wait_until(lambda: len(list(answers.glob("*.update.json"))) == 3)
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait()
    given_out = []
    bundles = jobs.Jobs.bundles
    monkeypatch.setattr(jobs.Jobs, "bundles", lambda *args: given_out.extend(args[2]) or bundles(*args))
    assert resume(tmp_path / "run", "--max_jobs", "1", "--client_timeout", "600", "--workers", "1") == 0
    assert [path.name for path in given_out] == ["client-0003.a1.task.json"]
    assert same_bits(state(tmp_path / "run", 1), state(expected, 1))
    assert_nothing_is_left(tmp_path / "run")


def passed_on():
    return {name: os.environ[name] for name in ("PYTHONPATH", "SCALEFL_FAULT")}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tuning": "full"}, {"tuning": "lora", "quantization": "int8"}], ids=str)
def test_a_site_trains_a_task_on_its_own_data(tmp_path, processes, options, capsys, monkeypatch):
    """Files are carried: the site sees neither the run's folder nor its data, the run not the site's."""
    own = knees(tmp_path / "own", {"train": 6})
    here = knees(tmp_path / "here", {"test": 5, "val": 5})
    settings = {**OPTIONS, "num_clients": 2, "data": "kneexray", **options}
    command = arguments(
        tmp_path,
        *("--data_root", str(here), "--data_here", "held_out", "--client_levels", "1", "2"),
        **{**settings, "executor": "jobs", "job_launcher": "manual"},
    )
    with Job(tmp_path, ["-m", "scalefl", *command]) as job:
        folder = tmp_path / "run" / "jobs" / "round-0001"
        tasks = [folder / f"client-000{client}.a1.task.json" for client in (0, 1)]
        end = time.monotonic() + 90
        while not all(task.is_file() for task in tasks):
            assert time.monotonic() < end and job.process.poll() is None, job.last_lines
            time.sleep(0.1)
        site = tmp_path / "site"
        shutil.copytree(folder, site / "jobs" / "round-0001")
        shutil.copytree(folder.parent / "model", site / "jobs" / "model")
        folder_as_carried = shutil.copytree(site, tmp_path / "as carried")
        hidden = (tmp_path / "run").rename(tmp_path / "hidden")
        here.rename(tmp_path / "hidden data")
        for task in tasks:
            at_site = site / "jobs" / "round-0001" / task.name
            answer = site / f"{task.name.split('.')[0]}.json"
            forget_launch()
            assert (
                main(["client", "--task", str(at_site), "--data_root", str(own), "--out", str(answer)]) == 0
            )
        with monkeypatch.context() as patch:
            patch.setattr(ClientTrainer, "train", failing)
            forget_launch()
            capsys.readouterr()
            typed = ["--task", str(site / "jobs" / "round-0001" / tasks[0].name), "--data_root", str(own)]
            typed += ["--out", str(site / "x.update.json")]
            assert main(["client", *typed]) == 75
            said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("scalefl:")]
            assert said == ["scalefl: client 0 (level 1) failed: RuntimeError: a bug; stopped; its job ends."]
            assert [path.name for path in site.glob("x*")] == ["x.failure.json"]
        forget_launch()
        assert main(["client", *typed]) == 0
        assert sorted(path.name for path in site.glob("x*")) == ["x.update.json", "x.update.safetensors"]
        for what, line in what_a_site_forgets(site, tasks[0].name, own):
            forget_launch()
            capsys.readouterr()
            assert main(["client", "--task", *what]) == 2
            (said,) = capsys.readouterr().err.splitlines()
            assert line in said
        (tmp_path / "hidden data").rename(here)
        hidden.rename(tmp_path / "run")
        carried = [*(path for path in folder_as_carried.rglob("*") if path.is_file()), *site.glob("client-*")]
        shown = "".join(path.read_text(errors="replace") for path in carried)
        assert len(carried) > 8 and "task" in shown
        assert re.findall(r"9000\d{3}L|\.png", shown) == [], "names of images or patients travelled"
        assert_known_contents(carried)
        for task in tasks:
            answer = site / f"{task.name.split('.')[0]}.json"
            update = exchange.answer_path(task, "update")
            shutil.copy(answer.with_suffix(".safetensors"), folder)
            if task == tasks[0]:
                shutil.copy(site / "client-0001.json", update)
                job.wait_for(f"{update.name} answers another task; not taken, waiting for the right one")
                shutil.copy(answer, update)
                job.wait_for("client 0 (level 1) answered; 1 to go")
            else:
                content = json.loads(answer.read_text())
                del content["digest"]
                exchange.write_note(update, "update", {**content, "num_examples": 0})
                job.wait_for("attempt 1 of 2: it was trained on no examples")
                again = folder / "client-0001.a2.task.json"
                forget_launch()
                assert main(["client", "--task", str(again), "--data_root", str(own)]) == 0
        assert job.end() == 0, job.last_lines
    (record,) = records(tmp_path / "run")
    assert [client["examples"] for client in record["clients"]] == [6, 6]
    assert [client["failures"] for client in record["clients"]] == [[], ["it was trained on no examples"]]


def assert_known_contents(carried):
    """Answers hold what is listed here and nothing else; tensors are those of the level's slice."""
    of_level = {}
    for path in carried:
        if path.name.startswith("level-"):
            of_level[int(path.stem[6:])] = load_file(path).keys()
    told = {"task", "client", "round", "num_examples", "metrics", "batches", "times", "tensors"}
    answers = [path for path in carried if re.fullmatch(r"client-\d+\.json", path.name)]
    for path in answers:
        content = json.loads(path.read_text())
        assert content.keys() == told | {"kind", "format", "digest"}
        assert content["metrics"].keys() == {"loss", "steps", "seconds"}
        assert content["tensors"].keys() == {"file", "digest", "bytes"}
        assert re.fullmatch("[0-9a-f]{16}", content["batches"])
        task = path.parent / "jobs" / "round-0001" / f"{path.stem}.a1.task.json"
        names = of_level[json.loads(task.read_text())["level"]]
        assert load_file(path.with_suffix(".safetensors")).keys() == names
    assert len(answers) == 2
    tensors = {path.stem for path in carried if path.suffix == ".safetensors"}
    assert tensors == {*(f"level-{level}" for level in of_level), *(path.stem for path in answers)}


def failing(*_):
    raise RuntimeError("a bug")


def test_a_folder_of_the_runs_name_is_the_runs_if_the_task_lies_in_it(tmp_path, monkeypatch):
    """A relative --save_path, such as the default, may be that of another run at a site."""
    run = resolved(tmp_path)[0]
    content = {
        "run": to_dict(dataclasses.replace(run, save_path="mine", feature_folder="/server/features")),
        "model_file": to_dict(resolved(tmp_path)[1]),
        "model": "../model",
    }
    (tmp_path / "mine" / "jobs" / "round-0001").mkdir(parents=True)
    (tmp_path / "carried").mkdir()
    monkeypatch.chdir(tmp_path)
    found, feature_folders = {}, set()
    for place in ("mine/jobs/round-0001", "carried"):
        path = tmp_path / place / "client-0000.a1.task.json"
        note = exchange.Note(path=path, content=content)
        found[place] = worker._run_of(note, ClientOptions(task=(str(path),)))[0].save_path
        own = ClientOptions(task=(str(path),), data_root="own")
        feature_folders.add(worker._run_of(note, own)[0].feature_folder)
    assert feature_folders == {None}, "a folder of the server"
    assert found == {"mine/jobs/round-0001": "mine", "carried": str(tmp_path)}


def what_a_site_forgets(site, task, own):
    """Arguments behind --task, and what is said, as one thing after the other is missing."""
    folder = site / "jobs" / "round-0001"
    path, data = str(folder / task), ["--data_root", str(own)]
    yield [path], "--data_root: nothing given, and the run itself has no training images"
    yield [path, *data, "--out", str(site / "no" / "a.json")], "a.json: its folder is not there"
    (folder / "level-1.safetensors").write_bytes((folder / "level-1.safetensors").read_bytes()[:-9])
    yield [path, *data], "level-1.safetensors is cut off, or has changed since it was written; expected the"
    (folder / "level-1.safetensors").unlink()
    yield [path, *data], "level-1.safetensors cannot be read"
    shutil.copy(site.parent / "hidden" / "jobs" / "round-0001" / "level-1.safetensors", folder)
    shutil.rmtree(site / "jobs" / "model")
    yield [path, *data], "which is not there; carry the run's jobs/model/."


def test_what_cannot_be_merged_has_a_reason():
    shapes = {"a": (2, 3), "b": (4,)}
    good = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    assert unusable(good, shapes) is None
    assert unusable({**good, "b": torch.full((4,), torch.inf)}, shapes) == "update is not finite in b"
    assert "b has shape (5,); expected (4,)" in unusable({**good, "b": torch.zeros(5)}, shapes)
    assert "b has shape nothing; expected (4,)" in unusable({"a": good["a"]}, shapes)
    assert "c has shape (1,); expected nothing" in unusable({**good, "c": torch.zeros(1)}, shapes)


def test_half_of_a_pass_still_divides_the_step(tmp_path):
    run = federation(tmp_path).run
    for batch_size, micro, processes, half in ((12, None, 1, 6), (12, 6, 1, 3), (12, 3, 1, 1), (12, 1, 1, 1)):
        changed = dataclasses.replace(run, batch_size=batch_size, micro_batch_size=micro)
        assert halved(changed, processes) == half
    assert halved(dataclasses.replace(run, batch_size=12), 2) == 3
    assert lacks_memory("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    assert lacks_memory("MemoryError: no text") and not lacks_memory("RuntimeError: a fault")


def test_examples_of_several_tasks_are_read_once():
    """Each task's places point at its own examples among those of all."""
    data = type("Data", (), {"name": "d", "splits": {"train": tuple("abcdef")}})
    tasks = [type("Note", (), {"content": {"example_ids": ids}}) for ids in ([5, 1], [2, 1])]
    examples, places = worker._examples(data, tasks, own=False)
    assert [[examples[i] for i in ids] for ids in places] == [["f", "b"], ["c", "b"]]
    examples, places = worker._examples(data, tasks[:1], own=True)
    assert examples == list("abcdef") and places == [tuple(range(6))]
