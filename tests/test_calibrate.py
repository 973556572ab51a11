"""How sure an exit must be: temperatures, calibration errors and thresholds against their definitions."""

import csv
import json
import re

import pytest
import torch
from runs import federation, start

from scalefl.batches import Candidates
from scalefl.cli import main
from scalefl.inference import ExitRule, answer, macs_to_exits
from scalefl.models.minigptv2 import MiniGPTv2ForConditionalGeneration
from scalefl.prediction.calibration import (
    Point,
    best_temperature,
    calibration_error,
    candidate_thresholds,
    choose,
    curve,
)

OPTIONS = {"num_rounds": 1, "num_patients": 60}


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    start(folder, **OPTIONS)
    return federation(folder, **OPTIONS)


@pytest.fixture
def model(fed, tmp_path):
    out = tmp_path / "model"
    checkpoint = f"{fed.run.save_path}/checkpoints/round-0001"
    assert main(["export", "--checkpoint", checkpoint, "--level", "2", "--out", str(out)]) == 0
    return out


def calibrate(model, *typed):
    data = ["--data", "synthetic", "--num_patients", "60"]
    return main(["calibrate", "--model", str(model), *data, *typed])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_labels_drawn_at_it(temperature):
    """Of 20000 labels the likeliest temperature is within 5 %: three grid steps and the noise of the draw."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20000, 5, generator=generator) * 3
    labels = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator).squeeze(1)
    assert best_temperature(scores, labels) == pytest.approx(temperature, rel=0.05)


def test_the_calibration_error_by_hand():
    """Two examples at 0.9, one of them right: a gap of 0.4; two at 0.6, both right: one of 0.4 as well."""
    rows = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    assert calibration_error(rows, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.4, abs=1e-6)
    certain = torch.eye(2)
    assert calibration_error(certain, torch.tensor([0, 1])) == 0.0


def test_a_curve_is_what_leaving_early_comes_to(fed):
    """Every point: the accuracy and the cost of the exits that `answer` lets the rows leave at."""
    model = fed.store.submodel(2, fed.initial_state, own=False).eval()
    batcher, candidates = fed.batchers["val"], Candidates(ids=fed.answer_ids)
    ids = range(len(batcher.examples))
    labels = torch.tensor([example.label for example in batcher.examples])
    with torch.no_grad():
        exits = model(**batcher.scoring(ids, candidates)).exit_logits
    scores = torch.stack([candidates.log_likelihoods(part.unflatten(0, (len(ids), -1))) for part in exits])
    probabilities, costs = scores.softmax(-1), [1, 4]
    thresholds = candidate_thresholds(probabilities, "margin")
    points = curve(probabilities, labels, costs, "margin", thresholds)
    assert len({point.mean_cost for point in points}) == len(ids) + 1
    for point in points:
        rule = ExitRule(thresholds=(point.threshold,), measure="margin")
        with torch.no_grad():
            choices = answer(model, batcher, ids, candidates, rule)
        right = [
            max(range(5), key=c.probabilities.__getitem__) == y for c, y in zip(choices, labels, strict=True)
        ]
        assert point.accuracy == pytest.approx(sum(right) / len(right))
        assert point.mean_cost == pytest.approx(
            sum({1: 0.25, 2: 1.0}[c.exit] for c in choices) / len(choices)
        )


def test_the_cheapest_within_a_drop_and_the_best_within_a_cost():
    points = [
        Point(threshold=0.0, accuracy=0.5, mean_cost=0.3),
        Point(threshold=0.5, accuracy=0.79, mean_cost=0.6),
        Point(threshold=0.7, accuracy=0.82, mean_cost=0.8),
        Point(threshold=2.0, accuracy=0.8, mean_cost=1.0),
    ]
    assert choose(points, 0.02, None).threshold == 0.5
    assert choose(points, 0.0, None).threshold == 0.7
    assert choose(points, 0.9, None).threshold == 0.0
    assert choose(points, None, 0.7).threshold == 0.5
    assert choose(points, None, 1.0).threshold == 0.7
    assert choose(points, None, 0.1).threshold == 0.0


def test_costs_rise_by_the_layers_between_exits(fed):
    """One layer lies between the exits: its projections and attention; and the second exit's head."""
    model = fed.store.submodel(2, fed.initial_state, own=False)
    inputs = fed.batchers["val"].scoring([0], Candidates(ids=fed.answer_ids))
    first, second = macs_to_exits(model, inputs)
    text, length, at = model.config.text_config, inputs["input_ids"].shape[1], len(inputs["predict_at"])
    hidden, ffn = text.hidden_size, text.intermediate_size
    projections = length * (4 * hidden * hidden + 3 * hidden * ffn)
    attention = 2 * length * length * hidden
    assert second - first == projections + attention + at * hidden * text.vocab_size


def test_what_is_stored_is_what_predict_does(capsys, tmp_path, model, fed):
    assert calibrate(model, "--mean_cost", "0.9") == 0
    shown = capsys.readouterr().out
    stored = json.loads((model / "calibration.json").read_text())
    assert len(stored["temperatures"]) == 2 and len(stored["thresholds"]) == 1
    assert "calibration error before" in shown and "test: leaving at" in shown
    rows = list(csv.DictReader((model / "calibration.csv").open()))
    assert {row["split"] for row in rows} == {"val", "test"}
    assert (model / "calibration.png").read_bytes().startswith(b"\x89PNG")
    images = tmp_path / "images"
    images.mkdir()
    for number, example in enumerate(fed.data.splits["val"]):
        fed.data.read_image(example).save(images / f"{number:02}.png")
    assert main(["predict", str(images), "--model", str(model), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    chosen = next(
        row for row in rows if row["split"] == "val" and float(row["threshold"]) == stored["thresholds"][0]
    )
    loaded = MiniGPTv2ForConditionalGeneration.from_pretrained(model)
    inputs = fed.batchers["val"].scoring([0], Candidates(ids=fed.answer_ids))
    first, whole = macs_to_exits(loaded, inputs)
    mean = sum({1: first / whole, 2: 1.0}[record["exit"]] for record in told) / len(told)
    assert mean == pytest.approx(float(chosen["mean_cost"]))
    right = [r["answer"] == e.answer for r, e in zip(told, fed.data.splits["val"], strict=True)]
    assert sum(right) / len(right) == pytest.approx(float(chosen["accuracy"]))


def test_temperatures_and_errors_are_those_of_the_exits(capsys, model, fed):
    """As stored and told, against every exit's scores of the two splits."""
    assert calibrate(model) == 0
    shown = capsys.readouterr().out
    stored = json.loads((model / "calibration.json").read_text())
    loaded = MiniGPTv2ForConditionalGeneration.from_pretrained(model)
    candidates = Candidates(ids=fed.answer_ids)
    for split in ("val", "test"):
        batcher = fed.batchers[split]
        ids = range(len(batcher.examples))
        labels = torch.tensor([example.label for example in batcher.examples])
        with torch.no_grad():
            exits = loaded(**batcher.scoring(ids, candidates)).exit_logits
        for exit, logits in enumerate(exits):
            scores = candidates.log_likelihoods(logits.unflatten(0, (len(ids), -1))).float()
            if split == "val":
                assert stored["temperatures"][exit] == pytest.approx(best_temperature(scores, labels))
            temperature = stored["temperatures"][exit]
            errors = [calibration_error((scores / t).softmax(-1), labels) for t in (1.0, temperature)]
            told = [f"{temperature:.2f}", *(f"{error:.3f}" for error in errors)]
            (row,) = re.findall(rf"{split}, .*?^\W*{exit + 1} (.*?)$", shown, re.MULTILINE | re.DOTALL)
            assert re.findall(r"[\d.]+", row)[-3:] == told
    assert 1.0 not in stored["temperatures"]


def test_a_cost_that_no_exit_keeps_to_is_told(caplog, model):
    assert calibrate(model, "--mean_cost", "0.001") == 0
    (line,) = [text for text in caplog.messages if text.startswith("--mean_cost")]
    assert re.fullmatch(r"--mean_cost 0.001: the cheapest is 0\.\d{3} and taken", line)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["--accuracy_drop", "1.5"], "--accuracy_drop: got 1.5; expected a share from 0 to below 1."),
        (["--accuracy_drop", "0.1", "--mean_cost", "0.5"], "--mean_cost: --accuracy_drop is given as well"),
        (["--mean_cost", "0"], "--mean_cost: got 0.0; expected a share above 0 and at most 1."),
        (["--model", "nowhere"], "--model nowhere: no model there (config.json is missing); expected a"),
        (["--mesure", "margin"], "--mesure: unknown option; "),
    ],
)
def test_bad_input(capsys, model, typed, line):
    capsys.readouterr()
    assert calibrate(model, *typed) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"scalefl: {line}")
    assert not (model / "calibration.json").exists()


def test_a_calibration_of_another_model_is_refused(capsys, tmp_path, model, fed):
    (model / "calibration.json").write_text(
        json.dumps({"measure": "margin", "thresholds": [0.5, 0.5], "temperatures": [1, 1, 1]})
    )
    fed.data.read_image(fed.data.splits["val"][0]).save(tmp_path / "one.png")
    assert main(["predict", str(tmp_path / "one.png"), "--model", str(model)]) == 2
    assert "is of a model with 3 exits, this one has 2." in capsys.readouterr().err
