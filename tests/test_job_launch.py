"""What a job is started with: its processes, GPUs and port; and what is refused before any is."""

import dataclasses
import errno
import socket

import pytest
import yaml
from runs import arguments, federation, forget_launch, records, start

from scalefl.cli import main
from scalefl.federation import local
from scalefl.federation.job import Job as JobOf
from scalefl.federation.resources import Resources

IN_JOBS = {
    "num_rounds": 1,
    "num_clients": 4,
    "tuning": "lora",
    "lora_targets": ["q_proj"],
    "executor": "jobs",
    "max_jobs": 2,
    "clients_per_job": 2,
}


def test_a_dry_run_launches_nothing(tmp_path, capsys):
    forget_launch()
    assert main(arguments(tmp_path, "--dry_run", **IN_JOBS)) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if " -m scalefl client --task " in line]
    assert len(lines) == 2
    assert "client-0001.a1.task.json" in shown
    assert not (tmp_path / "run" / "jobs").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_a_dry_run_leaves_out_who_would_not_train(tmp_path, capsys):
    """Dropout is drawn by seed and round, so it is known before."""
    options = {**IN_JOBS, "dropout_rate": 0.5, "seed": 3}
    forget_launch()
    assert main(arguments(tmp_path, "--dry_run", **options)) == 0
    shown = capsys.readouterr().out
    start(tmp_path, **{**options, "executor": "sequential"})
    (record,) = records(tmp_path / "run")
    trained = {client["client"] for client in record["clients"]}
    assert 0 < len(trained) < 4
    assert {n for n in range(4) if f"client-{n:04}.a1.task.json" in shown} == trained


class NoProcess:
    """In place of `subprocess.Popen`: records how it is started, and ends when it is told to."""

    started: list["NoProcess"] = []

    def __init__(self, command, **settings):
        self.command, self.environment, self.code = command, settings["env"], None
        self.started.append(self)

    def poll(self):
        return self.code


def test_jobs_share_out_the_gpus_of_a_machine(tmp_path, monkeypatch):
    """Three GPUs; level 2 wants two of them. A job sees its own alone, and gives them back at its end."""
    monkeypatch.setattr(local, "visible_gpus", lambda: ["3", "5", "GPU-7"])
    monkeypatch.setattr(local.subprocess, "Popen", NoProcess)
    monkeypatch.setattr(NoProcess, "started", [])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = dataclasses.replace(federation(tmp_path).run, executor="jobs", use_gpu=None)
    launcher = local.Local(run, {1: Resources(), 2: Resources(processes=2, gpus=2)})
    jobs = [
        JobOf(
            name=f"job {number}", level=level, tasks=(tmp_path / "task.json",), log=tmp_path / f"{number}.log"
        )
        for number, level in enumerate((1, 2, 2))
    ]
    assert (launcher.room(1), launcher.room(2)) == (3, 1)
    launcher.start(jobs[:2])
    assert (launcher.room(1), launcher.room(2)) == (0, 0)
    shown = [process.environment["CUDA_VISIBLE_DEVICES"] for process in NoProcess.started]
    assert shown == ["3", "5,GPU-7"]
    assert not {"RANK", "ACCELERATE_USE_CPU"} & NoProcess.started[0].environment.keys()
    one, two = (process.command for process in NoProcess.started)
    assert "accelerate.commands.launch" not in one and two[two.index("--num_processes") + 1] == "2"
    NoProcess.started[1].code = -9
    assert launcher.ended(jobs) == {"job 1": "killed by signal 9 (SIGKILL)"}
    assert launcher.room(2) == 1
    launcher.start(jobs[2:])
    assert NoProcess.started[2].environment["CUDA_VISIBLE_DEVICES"] == "5,GPU-7"
    ports = [
        command[command.index("--main_process_port") + 1] for command in (two, NoProcess.started[2].command)
    ]
    assert all(int(port) > 1023 for port in ports)


def test_ports_cannot_collide(monkeypatch):
    """Neither with those of other runs of this machine, which hold theirs, nor with a server's."""
    with socket.socket() as server, socket.socket() as spare:
        for each in (server, spare):
            each.bind(("127.0.0.1", 0))
        monkeypatch.setattr(local, "PORTS", [server.getsockname()[1], spare.getsockname()[1]])
        spare.close()
        held, port = local.held_port()
        assert port == local.PORTS[1]
        with pytest.raises(OSError) as refused:
            local.held_port()
        assert refused.value.errno == errno.EADDRINUSE
        with socket.socket() as job:  # to which it is left
            job.bind(("127.0.0.1", port))
        held.close()
        again, port = local.held_port()
        again.close()
        assert port == local.PORTS[1]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({3: {"gpus": 1}}, "unknown level 3; expected default or one of 1, 2."),
        ({1: {"gpu": 1}}, "1: unknown name 'gpu'; did you mean 'gpus'? known: "),
        ({1: {"processes": 0}}, "1: processes: got 0; expected a whole number >= 1."),
        ({1: {"sbatch": "--time=1"}}, "1: sbatch: got '--time=1'; expected a list such as ['--time=60']."),
        ({1: {"accelerate_config": "no.yaml"}}, "1: accelerate_config: no file no.yaml; expected one for"),
        ({1: 4}, "1: got 4; expected entries such as processes: 4."),
        ({1: {"gpus": 99}}, "level 1 asks for 99 GPU(s), this machine shows 0"),
    ],
)
def test_resources_that_cannot_be_are_refused(tmp_path, capsys, content, line):
    path = tmp_path / "resources.yaml"
    path.write_text(yaml.safe_dump(content))
    forget_launch()
    assert main(arguments(tmp_path, "--level_resources", str(path), **IN_JOBS)) == 2
    assert line in capsys.readouterr().err
    assert not [name for name in ("jobs", "run.json", "checkpoints") if (tmp_path / "run" / name).exists()]
