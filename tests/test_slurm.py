"""Runs under SLURM, on a real cluster of two pretended nodes.

The batch scripts are those of launch/slurm. A run that is stopped in whatever way ends in the weights of one
that was not: the same bits in one process, within `ROUNDING` in two.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from runs import arguments, largest_difference, load_latest, records, same_bits, start, state
from test_two_processes import ROUNDING

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "launch" / "slurm"
ZERO_3 = str(ROOT / "accelerate_configs" / "zero3.yaml")
TOOL = (
    Path(os.environ.get("SCALEFL_TEST_TOOLS", ROOT.parent / "shared" / "tools")) / "slurm-on-one-machine.sh"
)

OPTIONS = {"num_rounds": 2, "num_clients": 3, "KD_start": 0.0}
UNFINISHED = 75


class Cluster:
    def __init__(self, state: Path) -> None:
        self.conf = state / "slurm.conf"

    def run(self, *command: str, **variables: str) -> str:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "ACCELERATE_"))}
        path = os.pathsep.join(map(str, (ROOT / "tests" / "faults", ROOT, ROOT / "tests")))
        settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SCALEFL_PYTHON": sys.executable}
        environment = kept | settings | {"SLURM_CONF": str(self.conf)} | variables
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def submit(self, script: Path, folder: Path, *typed: str, options: str = "", **variables: str) -> str:
        """`sbatch OPTIONS SCRIPT -- TYPED`; the number of the job."""
        output = f"--output={folder / 'output.txt'}"
        command = ["sbatch", "--parsable", f"--chdir={folder}", output, *options.split(), str(script)]
        return self.run(*command, "--", *typed, **variables).strip()

    def signal(self, job: str) -> None:
        """As SLURM does some time before the limit."""
        self.run("scancel", "--batch", "--signal=USR1", job)

    def listed(self, *which: str) -> list[list[str]]:
        """Number, state and name of every job in the queue, and of every array task."""
        shown = self.run("squeue", "-h", "-r", "-o", "%i %T %j", *which)
        return [line.split() for line in shown.splitlines()]

    def shown(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "-o", "show", "job", job)))

    def until(self, what: Callable[[], object], seconds: float = 120.0, output: Path | None = None) -> None:
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                said = output.read_text() if output is not None and output.exists() else ""
                pytest.fail(f"not within {seconds} s; {self.listed()}\n{said}")
            time.sleep(0.1)

    def end(self, job: str, folder: Path, seconds: float = 120.0) -> dict[str, str]:
        """What is known of a job that is over, with nothing left of it."""
        self.until(lambda: not self.listed("-j", job), seconds, folder / "output.txt")
        self.until(lambda: not left_of(folder), 10.0)
        return self.shown(job)


def left_of(folder: Path) -> list[bytes]:
    """Command lines of processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            shown = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in shown:
            found.append(shown)
    return found


@pytest.fixture(scope="module")
def cluster():
    lacking = None if TOOL.is_file() else f"no {TOOL}; set SCALEFL_TEST_TOOLS to the folder that holds it"
    if os.geteuid() != 0:
        lacking = "a SLURM cluster is started by root alone"
    if lacking is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(lacking)
    folder = Path(tempfile.mkdtemp(prefix="scalefl-slurm-"))  # pytest's own are closed to munged
    settings = {"STATE": str(folder), "PORT": "17817", "PARTITIONS": "main large"}
    environment = os.environ | {f"SLURM_ONE_{name}": value for name, value in settings.items()}
    try:
        subprocess.run(["bash", str(TOOL), "start"], env=environment, check=True, timeout=300)
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", str(TOOL), "stop"], env=environment, check=True, timeout=60)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The run in one process, undisturbed."""
    return start(tmp_path_factory.mktemp("expected"), **OPTIONS)


def a_run(folder: Path, *typed: str) -> list[str]:
    """What stands behind `--`; in mid-round a checkpoint is written at a stop alone."""
    return arguments(folder, *typed, **OPTIONS, save_every_seconds=3600.0)[1:]


def waiting(folder: Path, times: int) -> dict[str, str]:
    """Variables under which processes that train client 1 wait in mid-round, so many of them in all."""
    (folder / "marks").mkdir(exist_ok=True)
    fault = {"client": 1, "kind": "wait", "times": times, "marks": str(folder / "marks")}
    return {"SCALEFL_FAULT": json.dumps(fault)}


def waits(folder: Path) -> int:
    """How many have waited, or do."""
    return len(list((folder / "marks").iterdir()))


def stub(path: Path, script: str) -> str:
    """A program in place of python, for what the batch scripts do alone."""
    path.write_text(f"#!{sys.executable} -S\nimport os, pathlib, signal, sys, time\n{script}\n")
    path.chmod(0o755)
    return str(path)


UNTIL_TOLD = """
signal.signal(signal.SIGUSR1, lambda *_: {usr1})
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
pathlib.Path("up").touch()
while {condition}:
    time.sleep(0.05)
"""
AT_FIRST = "os.environ.get('SLURM_RESTART_COUNT', '0') == '0'"


@pytest.fixture(scope="module")
def at_the_limit(cluster, tmp_path_factory):
    """Two jobs of a minute, in a partition whose jobs nobody preempts: they wait while other tests run.

    One is a run; the other a program that does not end when it is told to.
    """
    folders = [tmp_path_factory.mktemp(name) for name in ("limit", "stubborn")]
    options = "--partition=urgent --time=1 --signal=B:USR1@20"
    run = cluster.submit(
        *(SCRIPTS / "single_node.sbatch", folders[0], *a_run(folders[0])),
        options=options,
        **waiting(folders[0], 1),
    )
    stubborn = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile {AT_FIRST}:\n    time.sleep(0.1)"
    other = cluster.submit(
        *(SCRIPTS / "single_node.sbatch", folders[1], "--save_path", "run"),
        options="--partition=urgent --time=1",
        SCALEFL_PYTHON=stub(folders[1] / "python", stubborn),
    )
    return [(run, folders[0]), (other, folders[1])]


@pytest.mark.slow
def test_a_run_on_one_node_may_be_stopped_at_any_time(tmp_path, cluster, at_the_limit, expected):
    """While it starts, and in training; requeued once, and submitted again after that."""
    output = tmp_path / "output.txt"
    typed = (SCRIPTS / "single_node.sbatch", tmp_path, *a_run(tmp_path))
    job = cluster.submit(*typed, PROCESSES="2", MAX_REQUEUES="1", **waiting(tmp_path, 4))
    cluster.until(lambda: any(b"accelerate" in line for line in left_of(tmp_path)), output=output)
    cluster.signal(job)
    cluster.until(lambda: cluster.shown(job)["Restarts"] == "1", output=output)
    assert "goes back to the queue (requeue 1 of at most 1)" in output.read_text()
    cluster.until(lambda: not left_of(tmp_path))
    before = waits(tmp_path)  # none, unless training began before the signal met a process that heeds it
    cluster.until(lambda: waits(tmp_path) == before + 2, output=output)
    cluster.signal(job)
    ended = cluster.end(job, tmp_path)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{UNFINISHED}:0", "1")
    assert output.read_text().splitlines()[-1] == (
        f"launch/slurm: job {job} was requeued 1 time(s), MAX_REQUEUES is 1; the run is not finished: submit "
        "it again as you did, with a longer --time or more requeues"
    )
    assert load_latest(tmp_path / "run" / "checkpoints").partial is not None
    again = cluster.submit(*typed, PROCESSES="2")
    assert cluster.end(again, tmp_path)["JobState"] == "COMPLETED", output.read_text()
    assert "2 process(es) on cpu" in output.read_text()
    assert largest_difference(state(tmp_path / "run", 2), state(expected, 2)) <= ROUNDING


@pytest.mark.slow
def test_a_run_on_two_nodes_is_preempted(tmp_path, cluster, at_the_limit, expected):
    output = tmp_path / "output.txt"
    typed = (SCRIPTS / "multi_node.sbatch", tmp_path, *a_run(tmp_path))
    job = cluster.submit(*typed, options="--cpus-per-task=40", **waiting(tmp_path, 2))
    cluster.until(lambda: waits(tmp_path) == 2, output=output)
    assert cluster.shown(job)["NumNodes"] == "2"
    urgent = cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--cpus-per-task=40"),
        *("--output=/dev/null", "--wrap=sleep 1"),
    ).strip()
    cluster.until(lambda: cluster.shown(urgent)["JobState"] == "COMPLETED", output=output)
    ended = cluster.end(job, tmp_path)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output.read_text()
    assert output.read_text().count("2 process(es) on cpu") == 2
    assert "resuming after round 0 of 2" in output.read_text()
    assert largest_difference(state(tmp_path / "run", 2), state(expected, 2)) <= ROUNDING


def array_tasks(cluster: Cluster) -> list[str]:
    """Those in the queue that run."""
    return [number for number, phase, name in cluster.listed() if "_" in number and phase == "RUNNING"]


@pytest.mark.slow
def test_clients_as_array_tasks(tmp_path, cluster, at_the_limit, expected):
    """The server is stopped in mid-round; then one client's task is cancelled, its next one requeued."""
    levels = {level: {"sbatch": [f"--partition={name}"]} for level, name in ((1, "main"), (2, "large"))}
    (tmp_path / "resources.yaml").write_text(yaml.safe_dump(levels))
    output = tmp_path / "output.txt"
    typed = a_run(tmp_path, "--level_resources", str(tmp_path / "resources.yaml"))
    server = cluster.submit(SCRIPTS / "client_array.sbatch", tmp_path, *typed, **waiting(tmp_path, 3))

    def last_task(times: int) -> str:
        """The task of the client that waits, when all others are over."""
        cluster.until(lambda: waits(tmp_path) == times and len(array_tasks(cluster)) == 1, output=output)
        return array_tasks(cluster)[0]

    last_task(1)
    cluster.signal(server)
    cluster.until(lambda: cluster.shown(server)["Restarts"] == "1", output=output)
    cluster.until(lambda: not [number for number, *_ in cluster.listed() if "_" in number], output=output)
    cancelled = last_task(2)
    cluster.run("scancel", cancelled)
    requeued = last_task(3)
    cluster.run("scontrol", "requeue", requeued)
    ended = cluster.end(server, tmp_path)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output.read_text()
    assert "resuming after round 0 of 2" in output.read_text()
    assert cluster.shown(requeued)["Restarts"] == "1"
    assert cluster.shown(cancelled)["JobState"] == "CANCELLED"
    cluster.until(lambda: not [number for number, *_ in cluster.listed() if "_" in number])
    assert [path.name for path in (tmp_path / "run" / "jobs").iterdir()] == ["model"]
    jobs = cluster.run("scontrol", "-o", "show", "job").splitlines()
    name = cluster.shown(cancelled)["JobName"]
    used = {re.search(r" Partition=(\S+)", line)[1] for line in jobs if f"JobName={name} " in line}
    assert used == {"main", "large"}
    assert same_bits(state(tmp_path / "run", 2), state(expected, 2))
    failures = [c["failures"] for record in records(tmp_path / "run") for c in record["clients"]]
    (cause,) = [text for causes in failures for text in causes]
    assert cause.startswith("its job ended without an answer (SLURM says CANCELLED")


@pytest.mark.slow
def test_a_cancelled_server_takes_its_clients_along(tmp_path, cluster, at_the_limit):
    output = tmp_path / "output.txt"
    server = cluster.submit(
        SCRIPTS / "client_array.sbatch", tmp_path, *a_run(tmp_path), **waiting(tmp_path, 1)
    )
    cluster.until(lambda: waits(tmp_path) == 1, output=output)
    cluster.run("scancel", server)
    ended = cluster.end(server, tmp_path)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), output.read_text()
    cluster.until(lambda: not [number for number, *_ in cluster.listed() if "_" in number], 30.0, output)
    assert load_latest(tmp_path / "run" / "checkpoints").partial is not None


def stubbed(cluster: Cluster, folder: Path, script: str, scripts: Path = SCRIPTS, **variables: str) -> str:
    """A job of a stub on one node, once the stub is up."""
    python = stub(folder / "python", script)
    typed = (scripts / "single_node.sbatch", folder, "--save_path", "run")
    job = cluster.submit(*typed, options="--cpus-per-task=40 --nodelist=node1", SCALEFL_PYTHON=python)
    cluster.until((folder / "up").exists, output=folder / "output.txt")
    return job


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 2])
def test_what_need_not_go_on_is_not_requeued(tmp_path, cluster, code):
    """0: the run was finished just then. 2: what only a user can mend."""
    job = stubbed(cluster, tmp_path, UNTIL_TOLD.format(usr1=f"sys.exit({code})", condition=True))
    cluster.signal(job)
    ended = cluster.end(job, tmp_path)
    assert (ended["ExitCode"], ended["Restarts"]) == (f"{code}:0", "0"), (tmp_path / "output.txt").read_text()


@pytest.mark.slow
def test_a_failure_is_not_requeued(tmp_path, cluster):
    job = stubbed(cluster, tmp_path, "pathlib.Path('up').touch()\nsys.exit(1)")
    ended = cluster.end(job, tmp_path)
    assert (ended["ExitCode"], ended["Restarts"]) == ("1:0", "0")


@pytest.mark.slow
def test_a_cancelled_run_stays_cancelled(tmp_path, cluster):
    """Even while it writes its last checkpoint after another signal."""
    job = stubbed(cluster, tmp_path, UNTIL_TOLD.format(usr1=None, condition=True))
    cluster.signal(job)
    time.sleep(1.0)
    cluster.run("scancel", job)
    ended = cluster.end(job, tmp_path)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), (tmp_path / "output.txt").read_text()


@pytest.mark.slow
def test_a_preemption_that_sends_terminate(tmp_path, cluster):
    """As clusters do without preempt_send_user_signal, and to jobs without --signal: to the steps alone."""
    scripts = shutil.copytree(SCRIPTS, tmp_path / "scripts")
    script = scripts / "single_node.sbatch"
    script.write_text(re.sub("^#SBATCH --signal.*\n", "", script.read_text(), flags=re.M))
    job = stubbed(cluster, tmp_path, UNTIL_TOLD.format(usr1="sys.exit(138)", condition=AT_FIRST), scripts)
    command = "sbatch --partition=urgent --nodelist=node1 --cpus-per-task=40 --output=/dev/null --wrap=true"
    cluster.run(*command.split())
    ended = cluster.end(job, tmp_path)
    output = (tmp_path / "output.txt").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output
    assert "goes back to the queue (requeue 1 of at most 20)" in output


@pytest.mark.slow
def test_a_run_longer_than_its_time_limit(cluster, at_the_limit, expected):
    (job, folder), _ = at_the_limit
    ended = cluster.end(job, folder)
    output = (folder / "output.txt").read_text()
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1, output
    assert "DUE TO TIME LIMIT" not in output
    assert "resuming after round 0 of 2" in output
    assert same_bits(state(folder / "run", 2), state(expected, 2))


@pytest.mark.slow
def test_a_run_that_does_not_stop_in_time(cluster, at_the_limit):
    """Is killed at the limit, and goes back to the queue all the same."""
    _, (job, folder) = at_the_limit
    ended = cluster.end(job, folder)
    output = (folder / "output.txt").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output
    assert "DUE TO TIME LIMIT" in output


def dry_run(script: str, *typed: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "ACCELERATE_"))}
    return subprocess.run(
        ["bash", str(SCRIPTS / f"{script}.sbatch"), *typed],
        env=kept | {"SCALEFL_PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_a_script_is_bash_and_short(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert max(map(len, script.read_text().splitlines())) <= 110


@pytest.mark.parametrize(
    ("script", "variables", "launch"),
    [
        ("single_node", {}, ""),
        ("single_node", {"SLURM_GPUS_ON_NODE": "4"}, "--num_machines 1 --num_processes 4 --multi_gpu"),
        ("single_node", {"PROCESSES": "2"}, "--num_machines 1 --num_processes 2 --multi_gpu"),
        ("multi_node", {}, "--num_machines 2 --num_processes 2 --multi_gpu"),
        (
            "multi_node",
            {"SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "8", "ACCELERATE_CONFIG": ZERO_3},
            f"--num_machines 3 --num_processes 24 --config_file {ZERO_3}",
        ),
    ],
)
def test_a_dry_run_of_nodes_prints_the_launch(script, variables, launch):
    done = dry_run(script, "--", "--save_path", "a folder", DRY_RUN="1", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    words = shlex.split(line)
    at = words.index("scalefl")
    on_cpu = [] if "SLURM_GPUS_ON_NODE" in variables else ["--use_gpu", "0"]
    assert words[at + 1 :] == ["train", *on_cpu, "--save_path", "a folder", "--resume"]
    nodes = variables.get("SLURM_JOB_NUM_NODES", "2" if script == "multi_node" else "1")
    assert words[0] == "srun" and f"--nodes={nodes}" in words
    expected = shlex.split(launch)
    for name, value in zip(expected[::2], [*expected[1::2], "--mixed_precision"], strict=False):
        assert words[words.index(name) + 1] == value
    assert ("accelerate.commands.launch" in line) == bool(launch)


def test_a_dry_run_of_clients_prints_what_it_would_submit(tmp_path):
    (tmp_path / "resources.yaml").write_text(yaml.safe_dump({2: {"gpus": 1, "sbatch": ["--partition=a100"]}}))
    typed = a_run(tmp_path, "--level_resources", str(tmp_path / "resources.yaml"))
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = dry_run("client_array", "--", *typed, DRY_RUN="1", PYTHONPATH=path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert shlex.split(first)[1:8] == "-m scalefl train --executor jobs --job_launcher slurm".split()
    arrays = [line for line in done.stdout.splitlines() if line.startswith("sbatch ")]
    assert len(arrays) == 2
    assert "--gres=gpu:1 --partition=a100 --array=0-" in arrays[1] and "--gres" not in arrays[0]
    assert not (tmp_path / "run").exists()


def test_what_the_scripts_refuse():
    """In one line, with exit code 2."""
    cases = {
        "no --save_path among the arguments": dry_run("single_node", "--", "--lr", "1", DRY_RUN="1"),
        "not in a SLURM job; expected sbatch": dry_run("single_node", "--", "--save-path=a"),
        "PROCESSES: got 'abc'; expected a number from 1 on": dry_run(
            "single_node", "--", "--save_path", "a", DRY_RUN="1", PROCESSES="abc"
        ),
        "ACCELERATE_CONFIG: no file no.yaml; expected one": dry_run(
            "multi_node", "--", "--save_path", "a", DRY_RUN="1", ACCELERATE_CONFIG="no.yaml"
        ),
        "nowhere/python: no such program; expected": dry_run(
            "multi_node", "--", "--save_path", "a", SCALEFL_PYTHON="nowhere/python"
        ),
    }
    for words, done in cases.items():
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2
        assert line.startswith(f"launch/slurm: {words}")
