"""`scalefl predict`: what it says is what the model says, of whatever images it is given."""

import contextlib
import csv
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from runs import environment, federation, start
from safetensors.torch import load_file, save_file

from scalefl.batches import Candidates
from scalefl.cli import main
from scalefl.inference import confidence
from scalefl.models.minigptv2 import MiniGPTv2ForConditionalGeneration
from scalefl.prediction.calibration import Calibration, write_calibration

ROUNDING = 2e-6
"""Six decimals are told, of sums in fp32."""


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    start(folder, num_rounds=1)
    return federation(folder)


@pytest.fixture(scope="module")
def model(fed, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    checkpoint = f"{fed.run.save_path}/checkpoints/round-0001"
    assert main(["export", "--checkpoint", checkpoint, "--level", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def images(fed, tmp_path_factory):
    """Radiographs in a folder, one of them in a folder below."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for number, example in enumerate(fed.data.splits["val"]):
        place = folder / "more" if number == 0 else folder
        fed.data.read_image(example).save(place / f"{number}.png")
    return folder


def predict(capsys, model, *typed):
    """The records, as JSON."""
    assert main(["predict", "--model", str(model), *map(str, typed), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def expected_of(model, fed, images):
    """Probabilities (M, B, A) of a pass through all exits, for the images in the order of their paths."""
    loaded = MiniGPTv2ForConditionalGeneration.from_pretrained(model).eval()
    order = sorted(images.rglob("*.png"))
    ids = [int(path.stem) for path in order]
    candidates = Candidates(ids=fed.answer_ids)
    with torch.no_grad():
        logits = loaded(**fed.batchers["val"].scoring(ids, candidates)).exit_logits
    scores = [candidates.log_likelihoods(part.unflatten(0, (len(ids), -1))) for part in logits]
    return order, torch.stack([score.softmax(-1) for score in scores])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_deepest_exit_answers(capsys, model, fed, images, batch_size):
    order, all_mba = expected_of(model, fed, images)
    found = predict(capsys, model, images, "--batch_size", batch_size)
    assert [record["image"] for record in found] == [str(path) for path in order]
    for record, row in zip(found, all_mba[-1], strict=True):
        told = torch.tensor([record[f"p({answer})"] for answer in fed.data.answers])
        assert float((told - row).abs().max()) <= ROUNDING
        assert record["answer"] == fed.data.answers[int(row.argmax())]
        assert record["exit"] == 2 and record["milliseconds"] > 0


def test_a_threshold_lets_the_sure_leave(capsys, model, fed, images):
    order, all_mba = expected_of(model, fed, images)
    sure = all_mba[0].max(-1).values
    threshold = float(sure.median()) - 1e-6
    found = predict(capsys, model, images, "--exit_threshold", threshold)
    assert [record["exit"] for record in found] == [1 if s >= threshold else 2 for s in sure]
    assert {record["exit"] for record in found} == {1, 2}


def test_a_budget_and_an_open_answer(capsys, model, images):
    found = predict(capsys, model, images, "--open", "--max_exit", "1", "--max_new_tokens", "3")
    assert {record["exit"] for record in found} == {1}
    assert all(set(record) == {"image", "answer", "exit", "milliseconds"} for record in found)


def test_an_open_answer_is_written_by_the_exit_that_was_chosen(capsys, model, fed, images):
    """All of it, in a batch whose images leave at different exits."""
    loaded = MiniGPTv2ForConditionalGeneration.from_pretrained(model).eval()
    order = sorted(images.rglob("*.png"))
    sure, texts = [], []
    for path in order:
        row = fed.batchers["val"].prompts([int(path.stem)])
        written = []
        for exit in (1, 2):
            tokens: list[int] = []
            for _ in range(3):
                more = torch.tensor([tokens], dtype=torch.long)
                ids = torch.cat([row["input_ids"], more], 1)
                with torch.no_grad():
                    inputs = {**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
                    logits = loaded(**inputs, exit=exit).logits[0, -1]
                if not written and not tokens:
                    sure.append(float(logits.softmax(-1).max()))
                tokens.append(int(logits.argmax()))
            written.append(fed.processor.decode_answer(tokens))
        texts.append(written)
    assert any(one != two for one, two in texts)
    threshold = sorted(sure)[len(sure) // 2] - 1e-6
    typed = ("--open", "--max_new_tokens", "3", "--exit_threshold", threshold)
    found = predict(capsys, model, images, *typed)
    assert [record["exit"] for record in found] == [1 if s >= threshold else 2 for s in sure]
    assert [record["answer"] for record in found] == [
        t[r["exit"] - 1] for t, r in zip(texts, found, strict=True)
    ]
    assert len({record["exit"] for record in found}) == 2


@pytest.mark.parametrize("measure", ["margin", "entropy"])
def test_a_threshold_of_another_measure(capsys, model, fed, images, measure):
    _, all_mba = expected_of(model, fed, images)
    sure = confidence(all_mba[0], measure)
    threshold = float(sure.median()) - 1e-6
    found = predict(capsys, model, images, "--exit_threshold", threshold, "--measure", measure)
    assert [record["exit"] for record in found] == [1 if s >= threshold else 2 for s in sure]
    assert {record["exit"] for record in found} == {1, 2}


def test_a_calibration_is_of_its_question(capsys, model, images):
    """Asked another one, images are answered by the deepest exit."""
    write_calibration(model, Calibration(measure="margin", thresholds=(0.0,), temperatures=(1.0, 1.0)))
    try:
        assert {record["exit"] for record in predict(capsys, model, images)} == {1}
        other = predict(capsys, model, images, "--question", "Is it broken?")
        assert {record["exit"] for record in other} == {2}
    finally:
        (model / "calibration.json").unlink()


def test_images_are_found_by_file_folder_and_pattern_once(capsys, model, images):
    found = predict(capsys, model, images / "1.png", f"{images}/[12].png", images / "more")
    named = [record["image"].removeprefix(f"{images}/") for record in found]
    assert named == ["1.png", "2.png", "more/0.png"]


def test_a_table_and_a_file(capsys, tmp_path, model, images):
    assert main(["predict", "--model", str(model), str(images), "--csv", str(tmp_path / "a.csv")]) == 0
    shown = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    records = predict(capsys, model, images)
    assert all(row["image"].removeprefix(f"{images}/") in shown for row in rows)
    for row, record in zip(rows, records, strict=True):
        assert row.keys() == record.keys()
        del row["milliseconds"], record["milliseconds"]
        assert row == {name: str(value) for name, value in record.items()}


def test_paths_may_be_relative_and_absolute(capsys, monkeypatch, model, images):
    monkeypatch.chdir(images)
    assert main(["predict", "--model", str(model), "1.png", str(images / "2.png")]) == 0
    shown = capsys.readouterr().out
    assert str(images) in shown and "1.png" in shown and "2.png" in shown


def test_a_terminal_sees_progress(tmp_path, model, images):
    """And a file does not."""
    command = [sys.executable, "-m", "scalefl", "predict", "--model", str(model), str(images)]
    ours, theirs = pty.openpty()
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=theirs, env=environment(TERM="xterm"))
        assert process.wait(timeout=120) == 0
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux says so of a terminal that nobody has open any more
        while part := os.read(ours, 4096):
            seen += part
    os.close(ours)
    assert b"answering" in seen and b"100%" in seen
    assert "answering" not in (tmp_path / "out").read_text()


def test_an_image_that_cannot_be_read_spoils_no_other(capsys, tmp_path, model):
    Image.new("L", (40, 40), 90).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    assert main(["predict", "--model", str(model), str(tmp_path), "--json"]) == 2
    shown, said = capsys.readouterr()
    assert [record["image"] for record in json.loads(shown)] == [str(tmp_path / "good.png")]
    assert said.splitlines() == [
        f"scalefl: {tmp_path}/bad.png: not an image; expected a readable PNG, JPEG, TIFF, BMP image; replace "
        "or remove the file."
    ]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["--max_exit", "3"], "--max_exit: got 3; this model has exits 1 to 2."),
        (["--exit_threshold", "1.5"], "--exit_threshold: got 1.5; expected a number from 0 to 1."),
        (["--measure", "margin"], "--measure: got margin without --exit_threshold; expected both."),
        (["--answers", "one"], "--answers: got one; expected two or more that differ."),
        (["--open", "--answers", "a", "b"], "--answers: --open lets the model write its answer"),
        (["--modle", "x"], "--modle: no option of `scalefl predict`; did you mean --model?"),
    ],
)
def test_bad_input(capsys, model, images, typed, line):
    assert main(["predict", str(images), "--model", str(model), *typed]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"scalefl: {line}")


def test_a_checkpoint_is_no_model_folder(capsys, tmp_path, images):
    run = start(tmp_path, tuning="lora", num_rounds=1)
    checkpoint = run / "checkpoints" / "round-0001"
    capsys.readouterr()
    assert main(["predict", str(images), "--model", str(checkpoint)]) == 2
    assert f"`scalefl export --checkpoint {checkpoint}` makes one of this" in capsys.readouterr().err
    assert main(["predict", str(images), "--model", str(run)]) == 2
    assert f"`scalefl export --checkpoint {checkpoint}` makes one of this" in capsys.readouterr().err
    assert main(["predict", str(images), "--model", "nowhere"]) == 2
    line = "--model nowhere: no model there (config.json is missing); expected a folder such as `scalefl "
    assert line in capsys.readouterr().err


def test_a_model_must_be_whole(capsys, tmp_path, model, images):
    """A tensor that is missing would start anew, at random."""
    broken = shutil.copytree(model, tmp_path / "broken")
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    file = broken / index["weight_map"].pop("projector.weight")
    tensors = load_file(file)
    del tensors["projector.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["predict", str(images), "--model", str(broken)]) == 2
    line = f"scalefl: {broken}: missing: projector.weight; expected the weights of its config.json.\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("task.json", "{", "task.json: damaged (JSONDecodeError: "),
        ("task.json", "{}", "task.json: damaged (KeyError: 'answers'); remove it, and give --question"),
        ("config.json", "[", "config.json: cannot be read ("),
        ("tokenizer.json", None, ": its processor cannot be read ("),
        ("processor_config.json", None, ": its processor cannot be read ("),
    ],
)
def test_a_damaged_folder_is_one_line(capsys, tmp_path, model, images, file, content, line):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / file).unlink() if content is None else (broken / file).write_text(content)
    assert main(["predict", str(images), "--model", str(broken)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"scalefl: {broken}") and line in said


def test_answers_are_not_lost_to_a_file(capsys, tmp_path, model, images):
    typed = ["predict", str(images), "--model", str(model), "--csv"]
    assert main([*typed, str(tmp_path / "nowhere" / "a.csv")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "a.csv: its folder is not there; expected one to write into." in said.err
    assert main([*typed, str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "1.png" in said.out and f"--csv {tmp_path}: Is a directory; give another path." in said.err


def test_a_switch_in_front_of_the_images(capsys, model, images):
    assert main(["predict", "--model", str(model), "--json", str(images / "1.png")]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_a_language_model_alone_sees_nothing(capsys, tmp_path, fed, images):
    checkpoint = f"{fed.run.save_path}/checkpoints/round-0001"
    typed = ["--checkpoint", checkpoint, "--part", "language", "--out", str(tmp_path / "out")]
    assert main(["export", *typed]) == 0
    capsys.readouterr()
    assert main(["predict", str(images), "--model", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    out = tmp_path / "out"
    assert line == f"scalefl: {out}: holds a model of type llama; expected minigpt_v2, which sees images."


def test_no_image_there(capsys, tmp_path, model):
    assert main(["predict", str(tmp_path / "*.png"), "--model", str(model)]) == 2
    assert "*.png: no image there; expected a file, a folder with" in capsys.readouterr().err
