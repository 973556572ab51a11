"""Evaluation: what is predicted, what it costs, and that it leaves the model alone."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import arguments, federation, forget_launch, largest_difference, nearly, records, start, state

from scalefl.batches import Batcher
from scalefl.cli import main
from scalefl.contracts import DataSplits, Example
from scalefl.evaluate import UNPARSABLE, Evaluator, grade_metrics
from scalefl.report import summary

ANSWERS = ("dark", "in between", "bright")
QUESTIONS = ("Which shade?", "How bright is this picture, all in all?")


def shades(run):
    """A data set for `--data test_evaluate:shades`: evenly dark, middle and bright images."""

    def read(example):
        number = int(example.image_key.partition("-")[2])
        noise = np.random.default_rng(number).integers(-15, 15, (28, 28))
        return Image.fromarray((40 + 85 * example.label + noise).astype(np.uint8))

    def examples(split, first, count):
        return tuple(
            Example(
                image_key=f"{split}-{i}",
                patient=f"p{i}",
                question=QUESTIONS[i % 2],
                answer=run.answers[i % 3],
                label=i % 3,
            )
            for i in range(first, first + count)
        )

    splits = {
        "train": examples("train", 0, 12),
        "val": examples("val", 20, 7),
        "test": examples("test", 40, 7),
    }
    return DataSplits(name="shades", splits=splits, answers=run.answers, read_image=read)


LEARN = {
    "num_clients": 2,
    "num_rounds": 1,
    "num_epoch": 60,
    "batch_size": 6,
    "optimizer": "adamw",
    "lr": 5e-3,
    "momentum": 0.0,
    "client_split_ratios": [0.0, 1.0],
    "partitioner": "iid",
    "data": "test_evaluate:shades",
    "answers": list(ANSWERS),
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that has learned the shades."""
    folder = tmp_path_factory.mktemp("shades")
    run_folder = start(folder, **LEARN)
    return SimpleNamespace(fed=federation(folder, **LEARN), state=state(run_folder, 1), folder=run_folder)


def evaluator(fed, split="test", **changes):
    return Evaluator(
        run=replace(fed.run, **changes),
        engine=fed.engine,
        store=fed.store,
        batcher=fed.batchers[split],
        answers=fed.data.answers,
        processor=fed.processor,
    )


def test_ranking_and_generating_agree_on_a_model_that_has_learned(learned):
    for split in ("train", "test"):
        ids = range(len(learned.fed.data.splits[split]))
        ranked, generated = (
            evaluator(learned.fed, split, scoring=scoring).level(2, learned.state, ids)
            for scoring in ("rank", "generate")
        )
        assert ranked[-1]["accuracy"] == 1.0
        assert generated == ranked
        assert [exit["unparsable"] for exit in generated] == [0, 0]


def test_ranking_is_the_likelihood_of_each_answer_asked_for_by_itself(learned):
    """One row per answer and no packing: the same best answer, and the same loss of the true one."""
    fed = learned.fed
    for at in (fed.initial_state, learned.state):
        model = fed.store.submodel(2, at, own=False).eval()
        nats = torch.zeros(2, 7, 3)
        for label, answer in enumerate(ANSWERS):
            asked = [replace(example, answer=answer, label=label) for example in fed.data.splits["test"]]
            batcher = Batcher(fed.processor, asked, fed.batchers["test"]._pixels, torch.device("cpu"))
            for i in range(7):
                batch = batcher.training([i])
                with torch.no_grad():
                    for exit, logits in enumerate(model(**batch.inputs).exit_logits):
                        nats[exit, i, label] = F.cross_entropy(logits, batch.targets, reduction="sum")
        labels = torch.tensor([example.label for example in fed.data.splits["test"]])
        tokens = sum(len(fed.processor.encode_answer(example.answer)) for example in fed.data.splits["test"])
        for exit, got in enumerate(evaluator(fed).level(2, at, range(7))):
            assert got["accuracy"] == int((nats[exit].argmin(1) == labels).sum()) / 7
            assert got["loss"] == pytest.approx(float(nats[exit, range(7), labels].sum()) / tokens, rel=1e-5)


def test_evaluation_leaves_model_and_generators_alone(learned):
    fed = learned.fed
    before = {name: tensor.clone() for name, tensor in {**fed.store.base, **learned.state}.items()}
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    first, second = (evaluator(fed).level(2, learned.state, range(7)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), generator)
    assert largest_difference({**fed.store.base, **learned.state}, before) == 0


def test_dropout_is_off(tmp_path):
    results = []
    for dropout in (0.0, 0.9):
        fed = federation(tmp_path, tuning="lora", lora_dropout=dropout)
        generator = torch.Generator().manual_seed(0)
        at = {n: torch.randn(t.shape, generator=generator) * 0.3 for n, t in fed.initial_state.items()}
        results += [evaluator(fed).level(2, at, range(8)) for _ in range(2)]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("scoring", ["rank", "generate"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_batch_size_does_not_matter(learned, size, scoring):
    """Prompts of different length lie in one batch or do not; floats differ by the order of their sums."""
    options = {"scoring": scoring}
    whole, parts = (
        evaluator(learned.fed, eval_batch_size=n, **options).level(2, learned.state, range(7))
        for n in (64, size)
    )
    assert [exit["count"] for exit in whole] == [7, 7]
    assert parts == nearly(whole, rel=1e-5)


def test_text_that_is_no_answer_is_counted_and_wrong_by_the_most(learned):
    """A model that has learned nothing writes nothing sensible."""
    fed = learned.fed
    for exit in evaluator(fed, scoring="generate").level(2, fed.initial_state, range(7)):
        labels = [example.label for example in fed.data.splits["test"]]
        assert (exit["unparsable"], exit["accuracy"]) == (7, 0.0)
        assert exit["mae"] == pytest.approx(sum(max(label, 2 - label) for label in labels) / 7)


def test_grade_metrics_against_their_definitions():
    rng = np.random.default_rng(0)
    true, predicted = rng.choice([0, 1, 2, 4], 60), rng.integers(-1, 5, 60)
    got = grade_metrics(torch.tensor(predicted), torch.tensor(true), 5, 1.5)
    assert UNPARSABLE == -1 and got.unparsable == (predicted == -1).sum()
    farthest = np.where(true < 2, 4, 0)
    predicted = np.where(predicted == -1, farthest, predicted)
    assert got.accuracy == pytest.approx(np.mean(true == predicted))
    recalls = [np.mean(predicted[true == label] == label) for label in (0, 1, 2, 4)]
    assert got.balanced_accuracy == pytest.approx(np.mean(recalls))  # no example has grade 3
    assert got.mae == pytest.approx(np.mean(abs(true - predicted)))
    chance = np.mean((true[:, None] - predicted[None]) ** 2)
    assert got.kappa == pytest.approx(1 - np.mean((true - predicted) ** 2) / chance, abs=1e-6)
    same = grade_metrics(torch.tensor([2, 2]), torch.tensor([2, 2]), 5, 1.5)
    assert (same.kappa, same.accuracy) == (None, 1.0)


def test_the_line_of_a_round_shows_a_level_that_gets_nothing_right():
    assert summary({"1": [{"balanced_accuracy": 0.0, "exact_match": None}]}) == "0.000"


def test_evaluating_a_checkpoint_repeats_the_runs_results(learned, capsys):
    forget_launch()
    capsys.readouterr()
    assert main(["evaluate", str(learned.folder / "checkpoints" / "round-0001")]) == 0
    shown = capsys.readouterr().out
    results = json.loads((learned.folder / "results.json").read_text())
    rows = [line.split() for line in shown.partition("shades test")[2].splitlines() if "level " in line]
    rows = [row for row in rows if row[1].isdecimal()]
    for row in rows:
        exit = results["levels"][row[1]][int(row[2]) - 1]
        kappa = "-" if exit["kappa"] is None else f"{exit['kappa']:.3f}"
        assert row[3:6] == [f"{exit['balanced_accuracy']:.3f}", f"{exit['accuracy']:.3f}", kappa]
    assert len(rows) == 3


@pytest.fixture
def open_answers(tmp_path):
    """Images with questions and free-text answers."""
    (root := tmp_path / "open" / "image").mkdir(parents=True)
    rows = []
    for i in range(12):
        Image.new("L", (28, 28), 20 + 200 * (i % 2)).save(root / f"{i}.png")
        answer = ("it is a dark picture", "a bright one")[i % 2]
        split = ("train", "train", "train", "train", "val", "test")[i // 2]
        row = {"image": f"{i}.png", "question": QUESTIONS[i % 2], "answer": answer, "split": split}
        rows.append(row | {"patient": f"p{i}"})
    (root.parent / "knee_x_ray.json").write_text(json.dumps(rows))
    return root.parent


OPEN = ["--data", "kneexray", "--partitioner", "iid", "--scoring", "generate", "--logit_adjustment", "off"]


def test_open_answers_report_loss_and_exact_match(tmp_path, open_answers):
    options = {key: value for key, value in LEARN.items() if key not in ("data", "answers", "partitioner")}
    run_folder = start(tmp_path, "--data_root", str(open_answers), *OPEN, **options)
    for exit in records(run_folder)[0]["evaluation"]["levels"]["2"]:
        assert exit["exact_match"] == 1.0 and 0 < exit["loss"] < 0.5
        assert [exit[name] for name in ("accuracy", "balanced_accuracy", "kappa", "mae")] == [None] * 4
    fed = federation(
        tmp_path,
        data_root=str(open_answers),
        **{k[2:]: v for k, v in zip(OPEN[::2], OPEN[1::2], strict=True)},
    )
    untrained = evaluator(fed).level(2, fed.initial_state, range(2))
    assert untrained[-1]["exact_match"] == 0.0 and math.isfinite(untrained[-1]["loss"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("--logit_adjustment", "on"), ("--scoring", "rank"), ("--partitioner", "dirichlet")]
    + [("--balanced_sampling", "1"), ("--partitioner", "pathological")],
)
def test_options_that_need_labels_are_refused_for_open_answers(tmp_path, open_answers, capsys, option, value):
    typed = arguments(tmp_path, "--data_root", str(open_answers), *OPEN, option, value)
    forget_launch()
    assert main(typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"scalefl: {option}") and "free-text answers" in line
    assert not (tmp_path / "run").exists()
