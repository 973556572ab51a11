"""The files that a run and its clients exchange: read as they were written, or not at all."""

import os

import pytest
import torch

from scalefl.cli import main
from scalefl.federation import exchange
from scalefl.federation.exchange import BadFileError


def note(folder, **changes):
    folder.mkdir(exist_ok=True)
    tensors = exchange.write_tensors(folder / "update.safetensors", {"w": torch.arange(6.0)})
    content = {"task": "this one", "tensors": tensors, **changes}
    exchange.write_note(folder / "update.json", "update", content)
    return folder / "update.json"


def test_a_file_that_is_not_what_was_written_is_never_read(tmp_path):
    path = note(tmp_path)
    assert torch.equal(
        exchange.read_note(path, "update", answers="this one").tensors()["w"], torch.arange(6.0)
    )
    whole = path.read_bytes()
    for spoilt in (whole[:-20], b"", b"[]", b"{}", whole.replace(b"this one", b"that one")):
        path.write_bytes(spoilt)
        with pytest.raises(BadFileError):
            exchange.read_note(path, "update")
    path.write_bytes(whole)
    for kind, answers, reason in (
        ("task", None, "holds kind update"),
        ("update", "another", "answers another task"),
    ):
        with pytest.raises(BadFileError, match=reason):
            exchange.read_note(path, kind, answers=answers)
    tensors = tmp_path / "update.safetensors"
    for spoilt in (tensors.read_bytes()[:-4], tensors.read_bytes()[:-1] + b"x"):
        tensors.write_bytes(spoilt)
        with pytest.raises(BadFileError, match="cut off, or has changed"):
            exchange.read_note(path, "update").tensors()
    tensors.unlink()
    with pytest.raises(BadFileError, match="cannot be read"):
        exchange.read_note(path, "update").tensors()
    assert not list(tmp_path.glob(".*"))


def test_a_note_names_a_file_beside_it(tmp_path):
    """And nowhere else: an answer from outside must not make the main process read other files."""
    (tmp_path / "elsewhere").mkdir()
    note(tmp_path / "elsewhere")
    said = exchange.read_note(tmp_path / "elsewhere" / "update.json", "update").content["tensors"]
    path = note(tmp_path / "here", tensors={**said, "file": "../elsewhere/update.safetensors"})
    (tmp_path / "here" / "update.safetensors").unlink()
    with pytest.raises(BadFileError, match="cannot be read"):
        exchange.read_note(path, "update").tensors()


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a machine that goes down leaves a file that is there, and empty; and tensors before their note."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(str(new)) or replace(old, new))
    path = note(tmp_path)
    synced_tensors, tensors, synced, named = done
    assert (tensors, named) == (str(path.with_suffix(".safetensors")), str(path))
    assert synced_tensors.startswith(str(tmp_path / ".update.safetensors."))
    assert synced.startswith(str(tmp_path / ".update.json."))


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ([], "--task: nothing given; expected the task files of a run with --executor jobs."),
        (["--task", "nowhere.json"], "--task nowhere.json: No such file or directory; expected a task"),
        (["--task", "run.yaml"], "--task run.yaml: run.yaml is cut off, or is no file of this exchange"),
        (
            ["--task", "a.json", "b.json", "--out", "c.json"],
            "--out: got c.json for 2 task(s); expected a",
        ),
        (
            ["--tusk", "a.json"],
            "--tusk: no option of `scalefl client`; did you mean --task? see `scalefl client --help`.",
        ),
    ],
)
def test_what_is_no_task_is_refused(tmp_path, monkeypatch, capsys, typed, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("num_rounds: 3")
    assert main(["client", *typed]) == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith(f"scalefl: {line}")
