"""The command line: every spelling of an option, exit codes, and one line per problem."""

import errno
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from scalefl import __version__
from scalefl.cli import main
from scalefl.config.flags import parse
from scalefl.config.planoptions import PlanOptions
from scalefl.config.resolve import resolve
from scalefl.config.values import OPTION_KINDS
from scalefl.contracts import InputError, Interrupted


def run_of(*arguments: str) -> Any:
    command = parse(["train", *arguments])
    return resolve(command.flags, *command.config_files)[0]


@pytest.fixture
def training(monkeypatch):
    """What the command starts once its input is good: a function to replace, and the runs it got."""
    stub = SimpleNamespace(runs=[])
    stub.train = lambda run, model_file: stub.runs.append(run)
    monkeypatch.setitem(sys.modules, "scalefl.federation.run", stub)
    return stub


def test_the_originals_command_line():
    run = run_of(
        *"--data-root DIR --data kneexray --arch MiniGPTv2 --use-valid --cfg-path tiny".split(),
        *"--num_rounds 5 --num_clients 4 --sample_rate 1.0 --batch-size 1".split(),
        *"--lr 3e-5 --momentum 0.9 --weight-decay 5e-4".split(),
    )
    assert (run.data_root, run.use_valid, run.num_clients, run.batch_size) == ("DIR", True, 4, 1)
    assert (run.optimizer, run.lr, run.momentum, run.weight_decay) == ("sgd", 3e-5, 0.9, 5e-4)


@pytest.mark.parametrize("flag", ["--eval_batch_size", "--eval-batch-size", "--eval-batch_size"])
@pytest.mark.parametrize("joined", [True, False])
def test_dashes_and_underscores_mix(flag, joined):
    assert run_of(*([f"{flag}=7"] if joined else [flag, "7"])).eval_batch_size == 7


def test_values_keep_their_dashes():
    assert run_of("--save-path=a-b_c").save_path == "a-b_c"


def test_capitals_are_kept():
    assert run_of("--KD_gamma", "0.5", "--KD-T", "2").KD_gamma == 0.5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--use_gpu"], True),
        (["--use_gpu", "1"], True),
        (["--use-gpu=true"], True),
        (["--use_gpu", "0"], False),
        (["--use_gpu", "False"], False),
        (["--no-use_gpu"], False),
        (["--no-use-gpu", "--seed", "1"], False),
    ],
)
def test_forms_of_a_switch(arguments, expected):
    assert run_of(*arguments).use_gpu is expected


def test_lists_take_several_values():
    run = run_of("--ee_locs", "1", "3", "--horizontal_scale_ratios", "1", "2", "2", "3", "--report_to")
    assert (run.ee_locs, run.horizontal_scale_ratios, run.report_to) == ((1, 3), (1, 2, 2, 3), ())


def test_of_several_files_the_later_wins(tmp_path):
    mine, assignment = tmp_path / "mine.yaml", tmp_path / "assignment.yaml"
    mine.write_text("num_clients: 7\nseed: 3\n")
    assignment.write_text("num_clients: 4\n")
    files = (str(mine), str(assignment))
    assert run_of("--config", *files).num_clients == 4
    assert run_of("--config", *reversed(files)).num_clients == 7
    assert run_of("--config", files[0], "--config", files[1]).num_clients == 4
    run = run_of("--seed", "5", "--config", *files)
    assert (run.num_clients, run.seed) == (4, 5)


def test_a_later_file_mends_a_value_that_cannot_be_read(tmp_path, capsys):
    """It is reported all the same, once, as a file's flaw."""
    bad, good = tmp_path / "bad.yaml", tmp_path / "good.yaml"
    bad.write_text("lr: fast\nsed: 1\n")
    good.write_text("lr: 1e-3\nalpha: x\n")
    assert main(["train", "--config", str(bad), str(good)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    named = ("bad.yaml: lr: got 'fast'", "bad.yaml: sed: unknown option", "good.yaml: alpha: got 'x'")
    assert all(name in line for name, line in zip(named, lines, strict=True))


def test_evaluate_takes_its_checkpoint_behind_a_file():
    command = parse(["evaluate", "--config", "a.yaml", "checkpoint"])
    assert command.config_files == ("a.yaml",)
    assert command.flags["evaluate_from"] == "checkpoint"


def test_plan_takes_a_runs_options_and_its_own():
    command = parse(
        ["plan", "--zero-stage", "2", "--json", "--batch-size", "8", "--search", "--client-budgets=b"]
    )
    assert (command.name, command.flags) == ("plan", {"batch_size": "8"})
    plan = command.own
    assert isinstance(plan, PlanOptions)
    assert (plan.zero_stage, plan.json, plan.search, plan.client_budgets) == (2, True, True, "b")


def test_plan_has_a_flag_for_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in (*OPTION_KINDS, *PlanOptions.kinds()))


def test_every_option_is_a_flag(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train", "--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in OPTION_KINDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"scalefl {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "train --batchsize 4",
            "--batchsize: unknown option; did you mean --batch_size? `scalefl train --help` lists them.",
        ),
        (
            "train --num_round 4",
            "--num_round: unknown option; did you mean --num_rounds? `scalefl train --help` ",
        ),
        (
            "train --kd_gamma 4",
            "--kd_gamma: unknown option; did you mean --KD_gamma? `scalefl train --help` ",
        ),
        # An option of one command is suggested where it is one, which is that command's own line.
        ("train --world_sise 2", "--world_sise: unknown option; `scalefl train --help` lists them."),
        ("train --world_size 2", "--world_size: only `scalefl plan` takes it, on its command line."),
        (
            "plan --world_sise 2",
            "--world_sise: unknown option; did you mean --world_size? `scalefl plan --help` lists them.",
        ),
        (
            "plan --batchsize 2",
            "--batchsize: unknown option; did you mean --batch_size? `scalefl plan --help` lists them.",
        ),
        (
            "reorder --model a --out b --exmples 3",
            "--exmples: unknown option; did you mean --examples? `scalefl reorder --help` lists them.",
        ),
        ("reorder --modle a --out b", "--modle: unknown option; did you mean --model? `scalefl reorder"),
        (
            "calibrate --model a --mean_csot 1",
            "--mean_csot: unknown option; did you mean --mean_cost? `scalefl calibrate --help` lists them.",
        ),
        ("train --lr nan", "--lr: got nan; expected a finite number at least 0."),
        ("train --lr", "argument --lr: expected one argument; see `scalefl train --help`."),
        ("train stray", "got 'stray' after the options; expected --name value; see `scalefl train --help`."),
        ("train --config nowhere.yaml", "nowhere.yaml: No such file or directory; expected a YAML file."),
        ("evaluate", "the following arguments are required: CHECKPOINT; see `scalefl evaluate --help`."),
        (
            "evaluate nowhere",
            "nowhere/run.json: No such file or directory; expected a run folder or checkpoint ",
        ),
        (
            "",
            "the following arguments are required: train|evaluate|plan|client|",
        ),
    ],
)
def test_bad_input_exits_with_2_and_one_line(capsys, training, arguments, line):
    assert main(arguments.split()) == 2
    (got,) = capsys.readouterr().err.splitlines()
    assert got.startswith(f"scalefl: {line}")
    assert not training.runs


def test_a_file_of_options_is_offered_no_option_of_plan(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("world_sise: 2\n")
    assert main(["plan", "--config", str(path)]) == 2
    line = f"scalefl: {path}: world_sise: unknown option; `scalefl plan --help` lists them.\n"
    assert capsys.readouterr().err == line


def test_one_line_per_problem(capsys, training):
    assert main(["train", "--lr", "-1", "--alpha", "x", "--sed", "1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_only_the_first_process_speaks(capsys, training, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--lr", "-1"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "command",
    [
        "convert --llama l --vit v --ckpt c --out o",
        "export --checkpoint c --out o",
        "predict x --model m",
        "serve --model m",
        "calibrate --model m",
        "reorder --model m --out o",
    ],
)
def test_a_command_of_one_process_refuses_a_launch_of_several(capsys, monkeypatch, command):
    """Each process would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command.split()) == 2
    name = command.partition(" ")[0]
    line = f"scalefl: {name}: got 2 processes; it runs as one: start it without a launcher.\n"
    assert capsys.readouterr().err == line


def test_a_good_run_starts_and_exits_with_0(training):
    assert main(["train", "--seed", "4"]) == 0
    assert [run.seed for run in training.runs] == [4]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a: b"), 2, "scalefl: a: b"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"),
            2,
            "scalefl: runs/x: No space left on device; free some space, or write into another folder.",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/x"),
            2,
            "scalefl: runs/x: Permission denied; mend the permissions, or write into another folder.",
        ),
        (
            Interrupted(signal.SIGTERM),
            143,
            "scalefl: stopped by signal 15; go on with `scalefl train --resume runs/scalefl`.",
        ),
        (
            Interrupted(signal.SIGINT),
            130,
            "scalefl: stopped by signal 2; go on with `scalefl train --resume runs/scalefl`.",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(capsys, training, error, code, line):
    def fail(run, model_file):
        raise error

    training.train = fail
    assert main(["train"]) == code
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "a bug")])
def test_bugs_keep_their_traceback(training, error):
    def fail(run, model_file):
        raise error

    training.train = fail
    with pytest.raises(type(error)):
        main(["train"])


def test_parsing_and_resolving_load_no_heavy_module():
    script = (
        "import sys; from scalefl.cli import main; from scalefl.config.resolve import resolve; resolve({});"
        "print([m for m in ('torch', 'numpy', 'transformers', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_that_is_a_dangling_link_is_one_line(tmp_path, capsys):
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    assert main(["train", "--data", "synthetic", "--num_rounds", "1", "--save_path", f"{tmp_path}/run"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"scalefl: {tmp_path}/run: File exists; give another path."


def test_a_stop_before_training_says_so(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("scalefl.federation.run.train", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data", "synthetic"])
    assert stop.value.code == 128 + signal.SIGTERM
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "scalefl: stopped outside of training; nothing is lost, start again."
    assert signal.getsignal(signal.SIGTERM) is before
