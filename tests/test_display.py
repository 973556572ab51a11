"""What people and trackers see of a run: a bar on a terminal, plain lines elsewhere, event files."""

import re

import pytest
from runs import MODEL, arguments, forget_launch, records, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scalefl.cli import main
from scalefl.console import Display
from scalefl.federation.client import ClientTrainer

HIDE, SHOW, BAR = "\x1b[?25l", "\x1b[?25h", "━"
"""Of the cursor, which a bar hides while it lives; and what bars are drawn with."""


@pytest.fixture
def terminal(monkeypatch):
    """Rich takes the output for a terminal, and nothing of the tests' own environment speaks against it."""
    for name, value in {"TTY_COMPATIBLE": "1", "FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pipe(monkeypatch):
    for name in ("TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def test_a_bar_is_shown_on_a_terminal_and_taken_down(tmp_path, terminal, capsys):
    """One bar per round, gone before the line of its round; steps are told by the bar alone."""
    start(tmp_path, print_freq=1)
    shown = capsys.readouterr().out
    assert shown.count(HIDE) == shown.count(SHOW) == 2
    assert shown.count(BAR) > 20
    before, *rounds = re.split(r"round \d/2  ", shown)
    assert len(rounds) == 2 and BAR not in rounds[-1]
    assert before.rfind(HIDE) < before.rfind(SHOW)
    assert "  client 0 (level" not in shown


def test_a_bar_is_taken_down_when_a_client_fails(tmp_path, terminal, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(ClientTrainer, "train", fail)
    forget_launch()
    assert main(arguments(tmp_path)) == 75
    shown, said = capsys.readouterr()
    assert shown.count(HIDE) == 1 and shown.rfind(HIDE) < shown.rfind(SHOW)
    assert (
        "scalefl: round 1: 0 client(s) delivered, --min_clients is 1; the last failure: RuntimeError: a bug"
        in said
    )


def test_a_step_moves_the_bar(terminal, capsys):
    display = Display(speaks=True, print_freq=1)
    display.stop()
    display.round_starts(3, 9, 4)
    display.client_step(7, 2, 1, 5, 10, 1.25)
    display.stop()
    display.stop()
    shown = capsys.readouterr().out
    assert "client 7 (level 2) step 5/10 loss 1.250" in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)
    assert shown.count(HIDE) == shown.count(SHOW) == 1


def test_plain_lines_elsewhere(tmp_path, pipe, capsys):
    """A line for every `print_freq`-th step of a client, one for every round, and nothing that moves."""
    run_folder = start(tmp_path, print_freq=2)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\r" not in shown
    clients = [client for record in records(run_folder) for client in record["clients"]]
    steps = re.findall(r"^  client (\d) \(level \d\) step (\d+)/(\d+) loss \d+\.\d{3}$", shown, re.M)
    assert len(steps) == sum(client["steps"] // 2 for client in clients) > 0
    assert all(int(step) % 2 == 0 for _, step, _ in steps)
    assert len(re.findall(r"^round \d/2  ", shown, re.M)) == 2


def test_a_run_says_how_it_trains_and_what_memory_that_took(tmp_path, pipe, capsys):
    """Of the launches `test_matrix.py` tells the same."""
    text = MODEL["text"] | {"hidden_size": 64}
    options = {"tuning": "lora", "quantization": "nf4", "gradient_checkpointing": True, "num_rounds": 1}
    run_folder = start(tmp_path, model={"text": text}, checkpointing_levels=[2], **options)
    shown = capsys.readouterr().out
    assert (
        "1 process(es) on cpu, plain PyTorch; --precision fp32; frozen base in memory in nf4, double; "
        "image features in memory; checkpointing at level 2; --optimizer sgd"
    ) in shown.splitlines()
    (record,) = records(run_folder, timings=True)
    (line,) = [line for line in shown.splitlines() if line.startswith("round 1/1  ")]
    gigabytes = f"{record['peak_memory_bytes'] / 1e9:.1f}"
    assert re.match(rf"round 1/1  \d+\.\d s  peak {gigabytes} GB  loss \d\.\d{{3}}  val by level: ", line)
    assert float(gigabytes) > 0.1  # PyTorch alone takes more


def test_other_ranks_are_silent(terminal, capsys):
    display = Display(speaks=False, print_freq=1)
    display.round_starts(1, 1, 1)
    display.client_step(0, 1, 0, 1, 1, 1.0)
    display.line("text")
    display.table("title", ["a"], [["b"]])
    display.stop()
    assert capsys.readouterr().out == ""


def test_tensorboard_reads_back_every_round(tmp_path):
    run_folder = start(tmp_path, "--report_to", "tensorboard")
    files = sorted(run_folder.rglob("events.out.tfevents.*"), key=lambda file: len(file.parts))
    events = EventAccumulator(str(files[0].parent)).Reload()  # deeper ones hold the options
    rounds = records(run_folder)
    levels = rounds[1]["evaluation"]["levels"]
    expected = {"train_loss": rounds[1]["train_loss"], "lr": rounds[1]["lr"]}
    for level, exits in levels.items():
        for exit, metrics in enumerate(exits, start=1):
            expected[f"val/level{level}/exit{exit}/loss"] = metrics["loss"]
            expected[f"val/level{level}/exit{exit}/balanced_accuracy"] = metrics["balanced_accuracy"]
    assert len(expected) == 2 + 2 * 3
    for name, value in expected.items():
        scalars = {scalar.step: scalar.value for scalar in events.Scalars(name)}
        assert scalars.keys() == {1, 2}
        assert scalars[2] == pytest.approx(value, rel=1e-6)  # event files hold fp32
