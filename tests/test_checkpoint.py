"""A checkpoint is there as a whole or not at all, and nothing that fails harms the one before it."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from runs import arguments, federation, forget_launch, load_latest, refuse, same_bits, start, state, tree
from safetensors.torch import save_file

from scalefl import checkpoint
from scalefl.checkpoint import Partial, Progress
from scalefl.cli import main
from scalefl.contracts import InputError


def weights(value):
    return {"a": torch.full((2, 3), float(value)), "b": torch.tensor([value, -0.0])}


def progress(round, value=None, **fields):
    return Progress(state=weights(round if value is None else value), round=round, metrics_bytes=9, **fields)


def write(folder, *args, keep_last=2, write_config=lambda folder: None):
    return checkpoint.save(folder, progress(*args), keep_last, write_config)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(one, other):
    return same_bits(one.state, other.state) and all(
        getattr(one, name) == getattr(other, name) for name in ("round", "best", "metrics_bytes")
    )


def test_what_is_saved_is_loaded(tmp_path):
    before = progress(3, best={"round": 2, "value": 0.25})
    checkpoint.save(tmp_path, before, 2, lambda folder: None)
    assert same(load_latest(tmp_path), before)
    assert load_latest(tmp_path / "nowhere") is None


def test_sums_in_mid_round_are_loaded_bit_for_bit(tmp_path):
    write(tmp_path, 7)
    generator = torch.Generator().manual_seed(0)
    sums = {kind: {"a.b/c": torch.randn(3, 4, generator=generator)} for kind in ("change", "weight")}
    clients = [{"client": 3, "level": 1, "examples": 5, "dropped": False, "loss": 0.1 + 0.2, "seconds": 1e-9}]
    before = progress(7, partial=Partial(sums=sums, clients=clients))
    checkpoint.save(tmp_path, before, 2, lambda folder: None)
    assert names(tmp_path) == ["round-0007", "round-0008-part"]
    after = load_latest(tmp_path)
    assert same(after, before) and after.partial.clients == clients
    assert all(same_bits(after.partial.sums[kind], sums[kind]) for kind in sums)
    write(tmp_path, 8)
    assert names(tmp_path) == ["round-0007", "round-0008"]


def test_why_clients_failed_is_kept_until_they_are_tried_again(tmp_path):
    partial = Partial(sums={}, clients=[], failures={"3": ["RuntimeError: a fault"]})
    checkpoint.save(tmp_path, progress(7, partial=partial), 2, lambda folder: None)
    assert load_latest(tmp_path).partial.failures == {"3": ["RuntimeError: a fault"]}


def test_what_ranks_had_of_a_round_is_added_up_once(tmp_path):
    """Sums of other ranks' clients, of a rank whose clients all failed too; not those that rank 0 took in."""

    def part(value, client):
        sums = {} if value is None else {"change": weights(value)}
        return Partial(sums=sums, clients=[{"client": client}], failures={f"after {client}": ["a fault"]})

    known = progress(7, partial=part(1, 0))
    for rank, (value, client) in enumerate([(2, 1), (None, 2), (40, 0)], start=1):
        checkpoint.save_rank_part(tmp_path, 8, rank, part(value, client))
    checkpoint.save_rank_part(tmp_path, 9, 1, part(500, 9))
    whole = checkpoint.with_rank_parts(tmp_path, known)
    assert [record["client"] for record in whole.partial.clients] == [0, 1, 2]
    assert sorted(whole.partial.failures) == ["after 0", "after 1", "after 2"]
    assert torch.equal(whole.partial.sums["change"]["a"], torch.full((2, 3), 3.0))
    without = checkpoint.with_rank_parts(tmp_path, progress(7))
    assert [record["client"] for record in without.partial.clients] == [1, 2, 0]
    assert torch.equal(without.partial.sums["change"]["a"], torch.full((2, 3), 42.0))


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    best = {"round": 2, "value": 0.9}
    for number in range(1, 7):
        fields = {"best": best if number >= 2 else None}
        checkpoint.save(tmp_path, progress(number, **fields), 2, lambda folder: None)
    assert names(tmp_path) == ["round-0002", "round-0005", "round-0006"]
    checkpoint.save(tmp_path, progress(7, best={"round": 7, "value": 1.0}), 1, lambda folder: None)
    assert names(tmp_path) == ["round-0006", "round-0007"]


class StoppedError(Exception):
    pass


STEPS = ["mkdir", "save_file", "write_config", "write_text", "_fsync_tree", "rename", "_fsync", "rmtree"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replacing"])
def test_a_failure_at_any_step_leaves_a_checkpoint_to_go_on_from(tmp_path, monkeypatch, step, call, replaces):
    """After round 3, and where round 4 has a checkpoint in its middle already."""
    write(tmp_path, 3)
    part = Partial(sums={"change": weights(5)}, clients=[])
    if replaces:
        checkpoint.save(tmp_path, progress(3, partial=part), 2, lambda folder: None)
    before = tree(tmp_path)
    owner = {"mkdir": Path, "write_text": Path, "rename": Path, "rmtree": shutil}.get(step, checkpoint)
    original = getattr(owner, step, None)
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == call and (step != "rmtree" or not kwargs.get("ignore_errors")):
            raise StoppedError
        return original(*args, **kwargs) if original is not None else None

    if step != "write_config":
        monkeypatch.setattr(owner, step, fail)
    later = progress(3, 11, partial=Partial(sums={"change": weights(6)}, clients=[{"client": 1}]))
    failed = False
    try:
        checkpoint.save(tmp_path, later, 2, fail if step == "write_config" else lambda folder: None)
    except StoppedError:
        failed = True
    monkeypatch.undo()
    assert failed or len(calls) < call or step == "rmtree"
    after = load_latest(tmp_path)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    if same_bits(after.state, later.state):  # it failed after the new one was in place, or not at all
        assert after.partial.clients == later.partial.clients
    else:
        assert failed and same_bits(after.state, weights(3))
        assert (after.partial is not None) == replaces
        kept = {name: content for name, content in tree(tmp_path).items() if "-part" not in name}
        assert kept == {name: content for name, content in before.items() if "-part" not in name}
    checkpoint.save(tmp_path, progress(4), 2, lambda folder: None)
    assert names(tmp_path) == ["round-0003", "round-0004"]


@pytest.mark.parametrize("left", [".round-0004.tmp", ".round-0004-part.tmp"])
def test_what_a_killed_process_left_half_written_is_not_read(tmp_path, left):
    write(tmp_path, 3)
    shutil.copytree(tmp_path / "round-0003", tmp_path / left)
    (tmp_path / left / "model.safetensors").write_bytes(b"half")
    assert load_latest(tmp_path).round == 3
    write(tmp_path, 4)
    assert names(tmp_path) == ["round-0003", "round-0004"]


def test_a_process_killed_between_two_renames_loses_nothing(tmp_path):
    write(tmp_path, 3)
    checkpoint.save(tmp_path, progress(3, 5, partial=Partial(sums={}, clients=[])), 2, lambda folder: None)
    (tmp_path / "round-0004-part").rename(tmp_path / ".round-0004-part.old")
    assert same_bits(load_latest(tmp_path).state, weights(5))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"", "damaged checkpoint ("),
        ("model.safetensors", b"\0" * 400, "damaged checkpoint ("),
        ("model.safetensors", None, "no checkpoint there (model.safetensors is missing)"),
        ("checkpoint.json", b"{", "damaged checkpoint ("),
        ("checkpoint.json", b"\xff\xfe", "damaged checkpoint ("),
        ("checkpoint.json", b"[]", "damaged checkpoint ("),
        ("checkpoint.json", b"{}", "damaged checkpoint ("),
        ("checkpoint.json", b'{"format": 99, "clients": null}', "checkpoint format 99; this version reads"),
        ("checkpoint.json", None, "no checkpoint there (checkpoint.json is missing)"),
        ("sums.safetensors", b"x", "damaged checkpoint ("),
        ("sums.safetensors", None, "no checkpoint there (sums.safetensors is missing)"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_folder(tmp_path, file, content, words):
    part = Partial(sums={"change": weights(1)}, clients=[])
    folder = checkpoint.save(tmp_path, progress(1, partial=part), 2, lambda folder: None)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(InputError) as refusal:
        checkpoint.load(folder)
    assert str(refusal.value).startswith(f"{folder}: {words}")
    assert "\n" not in str(refusal.value)


def test_only_safetensors_json_and_text_are_written(tmp_path):
    run_folder = start(tmp_path)
    files = {path.name for path in run_folder.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".jsonl", ".jinja", ".txt"}
    for path in run_folder.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)


def test_a_checkpoint_of_another_architecture_is_refused_by_a_parameter(tmp_path, capsys):
    run_folder = start(tmp_path)
    file = run_folder / "checkpoints" / "round-0002" / "model.safetensors"
    changed = {name: tensor.repeat(2) for name, tensor in state(run_folder, 2).items() if tensor.dim() == 1}
    save_file({**state(run_folder, 2), **changed}, file)
    for command in (["evaluate", str(file.parent)], ["train", "--resume", str(run_folder)]):
        forget_launch()
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.endswith(
            "checkpoint of another architecture: exit_norms.0.weight has shape (32,), this run's model "
            "expects (16,); use the --cfg-path, --tuning and --lora_r it was trained with."
        )


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 300 kB: two checkpoints and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(tmp_path, small_disk, capsys):
    options = {"num_rounds": 5, "keep_last": 4, "KD_start": 0.0}
    (tmp_path / "plain").mkdir()
    expected = start(tmp_path / "plain", **options)
    capsys.readouterr()
    forget_launch()
    run_folder = small_disk / "run"
    assert main([*arguments(tmp_path, **options), "--save_path", str(run_folder)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "scalefl:" in line]
    assert line.endswith("No space left on device; free some space, or write into another folder.")
    last = load_latest(run_folder / "checkpoints")
    assert 1 <= last.round < 5
    assert not [name for name in names(run_folder / "checkpoints") if name.endswith(".tmp")]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    forget_launch()
    assert main(["train", "--resume", str(run_folder)]) == 0
    assert same_bits(state(run_folder, 5), state(expected, 5))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_while_writing_passes_on_and_cleans_up(tmp_path, error):
    write(tmp_path, 1)

    def write_config(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        write(tmp_path, 2, write_config=write_config)
    assert names(tmp_path) == ["round-0001"]


def test_a_checkpoint_of_a_run_loads_as_what_the_run_ended_with(tmp_path):
    run_folder = start(tmp_path)
    last = load_latest(run_folder / "checkpoints")
    assert last.round == 2 and last.partial is None
    assert last.metrics_bytes == (run_folder / "metrics.jsonl").stat().st_size
    assert last.state.keys() == federation(tmp_path).initial_state.keys()
