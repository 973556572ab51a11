"""Bad input: exit code 2, one line that says what to do, and nothing written."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from bad_input import ANYTHING, ROWS, command, rows
from runs import MODEL, forget_launch, start, tree
from safetensors import SafetensorError

from scalefl import checkpoint
from scalefl.cli import main


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    return start(tmp_path_factory.mktemp("old"))


def fill_the_disk(monkeypatch):
    """As safetensors reports it: with the system's error in its text alone (seen on a full tmpfs)."""

    def fail(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", fail)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.tried)
def test_bad_input(row, tmp_path, monkeypatch, capsys, old_run):
    if row.typed == "--use_gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").write_text(yaml.safe_dump(MODEL))
    if row.on_old_run:
        shutil.copytree(old_run, "run")
    row.prepare(tmp_path)
    if row.on_full_disk:
        fill_the_disk(monkeypatch)
    before = tree(tmp_path)
    forget_launch()
    capsys.readouterr()
    assert main(command(row)) == 2
    got = capsys.readouterr().err.replace(f"{tmp_path}/", "")
    expected = "".join(f"scalefl: {line}\n" for line in row.lines.splitlines())
    assert re.fullmatch(re.escape(expected).replace(ANYTHING, ".+"), got), got
    if row.on_full_disk:  # its config and metrics are small, and there already
        assert not list(Path("run", "checkpoints").iterdir())
    else:
        assert tree(tmp_path) == before


def test_the_table_for_the_readme_has_a_line_for_each_row():
    lines = rows().splitlines()
    assert len(lines) == len(ROWS) + 2 >= 22
    assert all(line.count(" | ") == 1 for line in lines if not line.startswith("|-"))


def test_the_readme_shows_that_table():
    """Made by `PYTHONPATH=. python tests/bad_input.py`."""
    assert rows() in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
