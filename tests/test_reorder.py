"""`scalefl reorder`: the same function in another order, which is that of what was measured."""

import dataclasses
import json
import shutil

import pytest
import torch
from builders import batcher
from reordered import SYNTHETIC, refused, reorder, same_order, saved, tensors

from scalefl.batches import Batcher
from scalefl.config.resolve import resolve
from scalefl.models.files import TensorFiles, saved_order
from scalefl.models.minigptv2 import FAMILY, MiniGPTv2ForConditionalGeneration
from scalefl.registry import resolve as resolve_name
from scalefl.reordering.importance import importance, readers_of
from scalefl.seeding import numpy_rng
from scalefl.slicing.layout import match_layouts
from scalefl.slicing.order import permute, unit_places

ROUNDING = 1e-10
"""Of float64: sums of at most 64 terms of about 10, in another order, in 8 sums after each other: some 1e-12.
A unit in a wrong place shows at about 1."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model folder and its reordered copy."""
    folder = tmp_path_factory.mktemp("pair")
    base = saved(folder / "base")
    return base, reorder(base, folder / "reordered")


def logits(folder):
    """Of every exit, in float64."""
    model = MiniGPTv2ForConditionalGeneration.from_pretrained(folder).double().eval()
    model.config._attn_implementation = "sdpa"
    inputs = dict(batcher().training([0, 1, 2]).inputs)
    with torch.no_grad():
        return model(**{**inputs, "pixel_values": inputs["pixel_values"].double()}).exit_logits


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("adapters", [True, False])
def test_every_exit_says_the_same(tmp_path, kv_heads, adapters):
    base = saved(tmp_path / "base", kv_heads=kv_heads, adapters=adapters)
    new = reorder(base, tmp_path / "new")
    for before, after in zip(logits(base), logits(new), strict=True):
        assert float((before - after).abs().max()) <= ROUNDING
    one, other = tensors(base), tensors(new)
    moved = {name for name in one if not torch.equal(one[name], other[name])}
    parts = {name.split(".", 4)[-1] for name in moved if name.startswith("language_model.")}
    # Of some layer: where there are two groups, they may be in order.
    assert {f"self_attn.{n}_proj.weight" for n in "qkvo"} <= parts
    assert {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")} <= parts
    if adapters:
        learned = {name.partition("mlp.")[2] for name in moved if "mlp." in name and "lora_" in name}
        assert learned == {"up_proj.lora_B.weight", "down_proj.lora_A.weight"}  # the others know no unit
    assert {name for name in moved if "embed" in name or "norm" in name or "projector" in name} == set()


def reference(model, ids, readers, heads_per_group):
    """|d loss / d gate| by scaling columns of weights, one example at a time, all in float64."""
    weights = dict(model.named_parameters())
    totals = {}
    for i in ids:
        batch, gated, gates = batcher().training([i]), {}, {}
        for name, place in readers.items():
            key, axis = place.key, place.key.rpartition("/")[2]
            width = {"kv_heads": 8 * heads_per_group, "vision_heads": 8}.get(axis, 1)
            reading = (f"{name}.weight", f"{name}.base_layer.weight", f"{name}.lora_A.default.weight")
            for weight in weights.keys() & set(reading):
                columns = torch.arange(weights[weight].shape[1])
                if key not in gates:
                    gates[key] = torch.ones(len(columns) // width, dtype=torch.float64, requires_grad=True)
                gated[weight] = weights[weight] * gates[key][columns // width]
        inputs = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"].double()}
        exits = torch.func.functional_call(model, gated, kwargs=inputs).exit_logits
        nats = [torch.nn.functional.cross_entropy(e, batch.targets, reduction="sum") for e in exits]
        loss = sum(number * n for number, n in enumerate(nats, start=1)) / 6
        for key, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            totals[key] = totals.get(key, 0) + gradient.abs() / len(ids)
    return totals


@pytest.mark.parametrize(("kv_heads", "adapters"), [(4, False), (2, False), (2, True)])
def test_the_measure_is_the_gradient_of_a_gate(tmp_path, kv_heads, adapters):
    """Rounding: the measure takes its loss and its gates in fp32."""
    folder = saved(tmp_path / "base", kv_heads=kv_heads, adapters=adapters)
    model = FAMILY.load_model(str(folder)).double().eval().requires_grad_(False)
    layouts = match_layouts(TensorFiles(folder), FAMILY.layouts(model.config))
    readers = readers_of(unit_places(layouts, FAMILY.axes(model.config, cut_vision=True)))
    assert len(readers) == 2 * 3 + 2 * 2  # attention and feed-forward of 3 text and 2 vision layers
    got = importance(model, batcher(), range(5), readers, 2)
    expected = reference(model, range(5), readers, 4 // kv_heads)
    assert got.keys() == expected.keys()
    for key, score in expected.items():
        assert torch.allclose(got[key].double(), score, rtol=1e-4, atol=1e-6 * float(score.max())), key


def test_the_order_is_that_of_what_was_measured(tmp_path):
    """On the examples that the seed draws, asked what the model was trained on, most important first."""
    folder = saved(tmp_path / "base")
    answers = ["none", "doubtful", "minimal", "moderate", "worst"]
    task = {"arch": "MiniGPTv2", "question": "How bad is it?", "answers": answers}
    (folder / "task.json").write_text(json.dumps(task))
    out = reorder(folder, tmp_path / "out", "--seed", "5")
    run, _ = resolve({"data": "synthetic", "num_patients": "24", "seed": "5"})
    asked = dataclasses.replace(run, question=task["question"], answers=tuple(answers))
    data = resolve_name("data", "synthetic")(asked)
    drawn = numpy_rng(5, "reorder").permutation(len(data.splits["train"]))[:4]
    shown = [data.splits["train"][number] for number in sorted(drawn)]
    assert {example.question for example in shown} == {task["question"]}
    model = FAMILY.load_model(str(folder)).eval().requires_grad_(False)
    processor = FAMILY.load_processor(str(folder))
    pixels = {example.image_key: processor.resize(data.read_image(example)) for example in shown}
    layouts = match_layouts(TensorFiles(folder), FAMILY.layouts(model.config))
    readers = readers_of(unit_places(layouts, FAMILY.axes(model.config, cut_vision=True)))
    scores = importance(
        model, Batcher(processor, shown, pixels, torch.device("cpu")), range(4), readers, run.batch_size
    )
    expected = {key: score.argsort(descending=True, stable=True) for key, score in scores.items()}
    assert same_order(saved_order(out), expected)
    assert any(not order.equal(order.sort().values) for order in expected.values())


def test_what_no_unit_contributes_to_is_told(tmp_path, capsys):
    """A model that is blind to its image: nothing of the tower matters, and its order stays."""
    folder = saved(tmp_path / "base", adapters=False)
    model = FAMILY.load_model(str(folder))
    model.projector.weight.data.zero_()
    model.save_pretrained(folder)
    out = reorder(folder, tmp_path / "out")
    assert "importance in the first half: none at all" in capsys.readouterr().out
    order = saved_order(out)
    assert all(o.equal(o.sort().values) for key, o in order.items() if key.startswith("vision_model."))


def test_twice_is_one_order(tmp_path, pair):
    base, once = pair
    twice = reorder(once, tmp_path / "twice", "--seed", "7", "--examples", "1", "--precision", "bf16")
    assert not same_order(saved_order(once), saved_order(twice))
    order, one, other = saved_order(twice), TensorFiles(base), TensorFiles(twice)
    config = FAMILY.load_config(str(base))
    places = unit_places(match_layouts(one, FAMILY.layouts(config)), FAMILY.axes(config, cut_vision=True))
    assert all(torch.equal(permute(one[n], places[n], order), other[n]) for n in one)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--model nowhere", "--model nowhere: no model there (config.json is missing); expected a folder"),
        ("--out BASE", "is there already; expected a new folder."),
        ("--examples 0", "--examples: got 0; expected a number at least 1."),
        ("--split tset", "--split: got 'tset'; did you mean 'test'? expected one of train, val, test."),
        (
            "--exmples 3",
            "--exmples: unknown option; did you mean --examples? `scalefl reorder --help` lists them.",
        ),
        ("--data kneexray --data_root nowhere", "--data-root: 'nowhere' is not a folder;"),
        ("--data synthetic --num_patients 0", "--num_patients: got 0; expected"),
    ],
)
def test_bad_input(tmp_path, capsys, pair, typed, line):
    base, _ = pair
    given = ["reorder", "--model", base, "--out", tmp_path / "out", *SYNTHETIC]
    assert line in refused(capsys, *given, *typed.replace("BASE", str(base)).split())
    assert list(tmp_path.iterdir()) == []


def test_an_order_that_cannot_be_read(tmp_path, capsys, pair):
    broken = tmp_path / "broken"
    shutil.copytree(pair[1], broken)
    (broken / "order.safetensors").write_bytes(b"no order")
    line = refused(capsys, "reorder", "--model", broken, "--out", tmp_path / "out", *SYNTHETIC)
    assert line.startswith(f"{broken}/order.safetensors: cannot be read (")
    assert not (tmp_path / "out").exists()
