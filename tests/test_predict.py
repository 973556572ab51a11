"""`scalefl predict`: what it says is what the model says, of whatever images it is given."""

import csv
import json

import pytest
import torch
from PIL import Image
from runs import federation, start

from scalefl.batches import Candidates
from scalefl.cli import main

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
    from scalefl.models.minigptv2 import MiniGPTv2ForConditionalGeneration

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


def test_images_are_found_by_file_folder_and_pattern_once(capsys, model, images):
    found = predict(capsys, model, images / "1.png", f"{images}/[12].png", images / "more")
    named = [record["image"].removeprefix(f"{images}/") for record in found]
    assert named == ["1.png", "2.png", "more/0.png"]


def test_a_table_and_a_file(capsys, tmp_path, model, images):
    assert main(["predict", "--model", str(model), str(images), "--csv", str(tmp_path / "a.csv")]) == 0
    shown = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(rows) == len(list(images.rglob("*.png")))
    assert all(str(row["image"]).removeprefix(f"{images}/") in shown for row in rows)


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


def test_no_image_there(capsys, tmp_path, model):
    assert main(["predict", str(tmp_path / "*.png"), "--model", str(model)]) == 2
    assert "*.png: no image there; expected a file, a folder with" in capsys.readouterr().err
