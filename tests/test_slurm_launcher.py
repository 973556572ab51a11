"""What the SLURM launcher makes of what SLURM's commands say; programs of the tests stand in for them."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import arguments, forget_launch, same_bits, start, state

from scalefl.cli import main
from scalefl.contracts import InputError, Unfinished
from scalefl.federation import slurm
from scalefl.federation.job import Job, NotNowError
from scalefl.federation.resources import Resources
from scalefl.federation.slurm import Slurm, how_it_ended, listed_tasks

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("printed", "tasks"),
    [
        (None, None),
        ("", {}),
        (
            "12_0 RUNNING None\n12_1 PENDING Resources\n",
            {"12_0": "RUNNING None", "12_1": "PENDING Resources"},
        ),
        (
            "12_0 COMPLETING None\n13_0 PENDING BeginTime",
            {"12_0": "COMPLETING None", "13_0": "PENDING BeginTime"},
        ),
        ("  7_3   PENDING   launch failed requeued held", {"7_3": "PENDING   launch failed requeued held"}),
        ("7_N/A RUNNING None\n7_[2-5] PENDING Priority\n7_6", {}),
        ("slurm_load_jobs error: Unable to contact slurm controller\n\x00\ufffd 9_1", {}),
        ("9_1 RUNNING None\nWarning: 12_0 is odd\n", {"9_1": "RUNNING None"}),
    ],
)
def test_tasks_in_the_queue(printed, tasks):
    assert listed_tasks(printed) == tasks


@pytest.mark.parametrize(
    ("printed", "state", "words"),
    [
        (None, None, "gone from the queue"),
        ("slurm_load_jobs error: Invalid job id specified", None, "gone from the queue"),
        ("JobId=3 LastJobState=RUNNING Reason=None", None, "gone from the queue"),
        ("JobState=COMPLETED", "COMPLETED", "SLURM says COMPLETED"),
        ("JobId=3 JobState=FAILED Reason=X ExitCode=2:0 ", "FAILED", "SLURM says FAILED, exit code 2"),
        ("JobId=3 JobState=FAILED ExitCode=0:9", "FAILED", "SLURM says FAILED, signal 9"),
        (
            "JobId=3 JobState=OUT_OF_MEMORY ExitCode=0:125",
            "OUT_OF_MEMORY",
            "SLURM says OUT_OF_MEMORY, signal 125",
        ),
        ("JobId=3 JobState=NODE_FAIL ExitCode=", "NODE_FAIL", "SLURM says NODE_FAIL"),
        ("JobId=3 JobState=PENDING Restarts=2 ExitCode=0:0", "PENDING", "SLURM says PENDING, exit code 0"),
    ],
)
def test_how_a_job_ended(printed, state, words):
    assert how_it_ended(printed) == (state, words)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Sets what a command prints, and its exit code; each notes its arguments and variables in a file."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def say(name, text="", code=0):
        (folder / f"{name}.says").write_text(text)
        noted = f'echo "$@" >>"{folder}/{name}.typed"; env >"{folder}/{name}.env"'
        (folder / name).write_text(f'#!/bin/sh\n{noted}\ncat "{folder}/{name}.says"\nexit {code}\n')
        (folder / name).chmod(0o755)

    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        say(name)
    say.folder = folder
    return say


def typed(commands, name):
    path = commands.folder / f"{name}.typed"
    return path.read_text().splitlines() if path.exists() else []


def some_jobs(folder, count=2, level=1):
    names = [f"level-{level}.job-{number:04d}" for number in range(1, count + 1)]
    return [
        Job(name=n, level=level, tasks=(folder / f"{n}.task.json",), log=folder / f"{n}.log") for n in names
    ]


def launcher(folder, **resources):
    run = SimpleNamespace(save_path=str(folder), max_jobs=None, dry_run=False)
    wanted = Resources(**resources)
    return Slurm(run, {1: wanted, 2: wanted})


@pytest.fixture
def sent(tmp_path, commands, monkeypatch):
    """A launcher with two jobs, 12_0 and 12_1, and what it says of their ends at the next look."""
    monkeypatch.setattr(slurm, "SECONDS_BETWEEN_LOOKS", 0.0)
    commands("sbatch", "12;cluster\n")
    made, jobs = launcher(tmp_path), some_jobs(tmp_path)
    made.start(jobs)
    return made, jobs


@pytest.mark.parametrize(
    ("queue", "waiting"),
    [
        ("12_0 RUNNING None\n12_1 COMPLETING None", [False, False]),
        ("12_0 PENDING BeginTime\n12_1 CONFIGURING None", [True, True]),
        ("12_0 REQUEUED None\n12_1 SUSPENDED None", [True, True]),
        ("12_0 PENDING JobHeldUser\n12_1 RUNNING None", [True, False]),
    ],
)
def test_what_is_listed_has_not_ended(commands, sent, monkeypatch, queue, waiting):
    monkeypatch.setattr(slurm, "UNLISTED_SECONDS", 0.0)
    commands("squeue", queue)
    made, jobs = sent
    assert [made.waits(job) for job in jobs] == [True, True]
    assert made.ended(jobs) == {}
    assert typed(commands, "scontrol") == []
    assert [made.waits(job) for job in jobs] == waiting


def test_a_queue_that_does_not_answer_says_nothing(commands, sent, monkeypatch):
    monkeypatch.setattr(slurm, "UNLISTED_SECONDS", 0.0)
    made, jobs = sent
    commands("squeue", "slurm_load_jobs error: Unable to contact slurm controller", code=1)
    assert made.ended(jobs) == {}
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.2)
    (commands.folder / "squeue").write_text("#!/bin/sh\nexec sleep 5\n")
    assert made.ended(jobs) == {}
    assert typed(commands, "scontrol") == []


@pytest.mark.parametrize(
    ("scontrol", "code", "at_once", "later"),
    [
        ("JobId=1 JobState=CANCELLED ExitCode=0:15", 0, "SLURM says CANCELLED, signal 15", None),
        ("JobId=1 JobState=TIMEOUT ExitCode=0:0", 0, "SLURM says TIMEOUT, exit code 0", None),
        ("JobId=1 JobState=RUNNING ExitCode=0:0", 0, None, None),
        ("JobId=1 JobState=PENDING Restarts=1", 0, None, None),
        ("JobId=1 JobState=COMPLETING", 0, None, None),
        ("JobId=1 JobState=COMPLETED ExitCode=0:0", 0, None, "SLURM says COMPLETED, exit code 0"),
        ("", 1, None, "gone from the queue"),
        ("nonsense", 0, None, "gone from the queue"),
    ],
)
def test_what_is_not_listed(commands, sent, monkeypatch, scontrol, code, at_once, later):
    """Has ended if it failed; else, if it is not alive, after a while in which its answer may be seen."""
    made, jobs = sent
    commands("squeue", "12_1 RUNNING None")
    commands("scontrol", scontrol, code)
    assert made.ended(jobs) == ({jobs[0].name: at_once} if at_once else {})
    monkeypatch.setattr(slurm, "UNLISTED_SECONDS", 0.0)
    assert made.ended(jobs) == ({jobs[0].name: later} if later else {})
    assert "-o show job 12_0" in typed(commands, "scontrol")


@pytest.mark.parametrize("reason", ["launch failed requeued held", "JobHoldMaxRequeue", "BadConstraints"])
def test_a_task_that_slurm_will_never_start_has_ended(commands, sent, reason):
    made, jobs = sent
    commands("squeue", f"12_0 RUNNING None\n12_1 PENDING {reason}")
    assert made.ended(jobs) == {jobs[1].name: f"SLURM keeps it: PENDING {reason}"}
    assert typed(commands, "scancel")[-1] == "--quiet 12_1"


def test_what_is_asked_is_not_bent_by_variables(tmp_path, commands, sent, monkeypatch):
    """Of this job, or of the user; but for those that say how SLURM is reached, and what is submitted."""
    kept = {"SLURM_CONF": "/c", "SLURM_JWT": "j", "SBATCH_ACCOUNT": "a"}
    dropped = {"SQUEUE_STATES": "R", "SCANCEL_STATE": "PENDING", "SLURM_JOB_ID": "5", "SLURM_NTASKS": "9"}
    dropped |= {"CUDA_VISIBLE_DEVICES": "3", "RANK": "0", "ACCELERATE_USE_CPU": "true"}
    for name, value in (kept | dropped).items():
        monkeypatch.setenv(name, value)
    made, jobs = sent
    made.ended(jobs)
    made.start(some_jobs(tmp_path))
    for name in ("squeue", "sbatch"):
        shown = dict(
            line.partition("=")[::2] for line in (commands.folder / f"{name}.env").read_text().splitlines()
        )
        assert {k: shown.get(k) for k in kept} == kept
        assert not dropped.keys() & shown.keys()


def test_jobs_of_a_run_are_cancelled_by_its_name(tmp_path, commands, sent):
    """At its start what a killed process left, at the end what runs."""
    made, jobs = sent
    made.cancel(jobs[0])
    made.close()
    first, second, third = typed(commands, "scancel")
    assert first == third and first.startswith(f"--quiet --user={os.getuid()} --name=scalefl-")
    assert second == "--quiet 12_0"
    name = first.partition("--name=")[2]
    assert f"--job-name={name} " in typed(commands, "sbatch")[-1]
    launcher(tmp_path / "other")
    assert not typed(commands, "scancel")[-1].endswith(name)
    made.close()
    assert len(typed(commands, "scancel")) == 4, "nothing runs any more"


def test_jobs_that_could_not_be_cancelled_are_named(tmp_path, commands, sent, caplog):
    made, _ = sent
    commands("scancel", "scancel: error: Unable to contact slurm controller", code=1)
    made.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("jobs may be left in SLURM's queue; `scancel --quiet --user=")


def test_a_submission_that_is_wrong(tmp_path, commands):
    made = launcher(tmp_path)
    commands("sbatch", "sbatch: error: invalid partition\nspecified: nowhere\n", code=1)
    with pytest.raises(InputError) as refused:
        made.start(some_jobs(tmp_path))
    assert str(refused.value) == (
        "sbatch level-1.job-0001.sbatch: sbatch: error: invalid partition specified: nowhere; mend `sbatch` "
        "of level 1 in --level_resources."
    )
    commands("sbatch", "submitted, I think\n")
    with pytest.raises(InputError, match="submitted, I think; mend"):
        made.start(some_jobs(tmp_path))
    commands("sbatch", "sbatch: error: AssocMaxSubmitJobLimit", code=1)
    with pytest.raises(NotNowError):
        made.start(some_jobs(tmp_path))


@pytest.mark.parametrize(
    ("level", "said"),
    [
        (
            2,
            "sbatch: error: Unable to contact slurm controller (connect failure)",
        ),
        (2, "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"),
        (2, "sbatch: error: QOSMaxSubmitJobPerUserLimit"),
        (1, "sbatch: error: something new"),
    ],
)
def test_a_submission_that_is_not_taken_for_now(tmp_path, commands, sent, monkeypatch, level, said):
    """The controller is away, or full; or a level's jobs were taken before. For half an hour at most."""
    made, _ = sent
    commands("sbatch", said, code=1)
    more = some_jobs(tmp_path, level=level)
    with pytest.raises(NotNowError):
        made.start(more)
    assert made.room(1) == 0
    monkeypatch.setattr(made, "_try_again_at", 0.0)
    assert made.room(1) > 0
    monkeypatch.setattr(slurm, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(Unfinished, match="SLURM took no job for 0 s; sbatch says: sbatch: error: "):
        made.start(more)
    commands("sbatch", "13")
    made.start(more)
    monkeypatch.setattr(slurm, "PATIENCE_SECONDS", 60.0)
    commands("sbatch", said, code=1)
    with pytest.raises(NotNowError):
        made.start(more)


def test_a_signal_to_all_processes_does_not_break_off_a_submission(tmp_path, commands):
    """It would leave jobs that nobody knows of."""
    made = launcher(tmp_path)
    (commands.folder / "sbatch").write_text(
        "#!/bin/sh\nfor s in INT USR1 TERM; do kill -$s $$; done\necho 12\n"
    )
    made.start(some_jobs(tmp_path))
    assert made.waits(some_jobs(tmp_path)[0])


def test_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        InputError, match="--job_launcher: got slurm, but `sbatch --version` does not run here"
    ):
        launcher(tmp_path)


def test_options_of_a_level_reach_sbatch(tmp_path, commands):
    def command(**resources):
        made = launcher(tmp_path, **resources)
        return made.preview(some_jobs(tmp_path, 3))[0].split()

    plain = command(sbatch=("--partition=a", "--time=60"))
    assert plain[:4] == ["sbatch", "--parsable", "--requeue", "--open-mode=append"]
    assert plain.index("--partition=a") < plain.index("--array=0-2")
    assert "--gres=gpu:2" in command(gpus=2)
    assert not any("--gres" in word for word in command(gpus=2, sbatch=("--gpus-per-node=a100:2",)))
    assert not any("--gres=gpu:2" in word for word in command(gpus=2, sbatch=("-G2",)))


@pytest.mark.parametrize("gpus", ["", "2"])
def test_the_script_of_an_array_runs_each_job_in_its_place(tmp_path, commands, monkeypatch, gpus):
    """Whatever signs there are in the names of folders."""
    folder = tmp_path / "it's $HOME; a `folder` (1)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    python = folder / "python"
    python.write_text('#!/bin/sh\npwd; echo "$ACCELERATE_USE_CPU $OMP_NUM_THREADS"\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    made, jobs = launcher(folder, processes=2), some_jobs(folder, 3)
    commands("sbatch", "7")
    made.start(jobs)
    script = folder / "level-1.job-0001.sbatch"
    assert str(script) in typed(commands, "sbatch")[-1]
    variables = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_ON_NODE": "9", "SLURM_GPUS_ON_NODE": gpus}
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    subprocess.run(["bash", str(script)], env=kept | variables, cwd=tmp_path, check=True)
    here, settings, *words = jobs[1].log.read_text().splitlines()
    assert Path(here) == folder
    assert settings == f"{'' if gpus else 'true'} 4"
    assert words[-2:] == ["--task", str(jobs[1].tasks[0])]
    assert words[:2] == ["-m", "accelerate.commands.launch"]
    assert not jobs[0].log.exists() and not jobs[2].log.exists()


@pytest.mark.slow
def test_a_run_outlasts_a_controller_that_is_away(tmp_path, commands, monkeypatch):
    """The first submission is not taken; later ones are trained here."""
    monkeypatch.setattr(slurm, "SECONDS_BETWEEN_TRIES", 1.0)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {"num_rounds": 1, "num_clients": 2, "client_levels": [1, 2], "KD_start": 0.0}
    (tmp_path / "one").mkdir()
    one = start(tmp_path / "one", **options)
    commands("squeue", code=1)
    (commands.folder / "sbatch").write_text(
        f"""#!/bin/bash
[[ "$1" != --version ]] || exit 0
if [[ ! -e {commands.folder}/away ]]; then
    touch {commands.folder}/away
    echo "sbatch: error: Unable to contact slurm controller" >&2
    exit 1
fi
SLURM_ARRAY_TASK_ID=0 bash "${{@: -1}}" >/dev/null 2>&1 &
echo 1
"""
    )
    forget_launch()
    began = time.monotonic()
    assert main(arguments(tmp_path, executor="jobs", job_launcher="slurm", **options)) == 0
    assert time.monotonic() - began > 1.0
    assert same_bits(state(tmp_path / "run", 1), state(one, 1))
