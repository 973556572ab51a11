"""What a level costs, against sums written out by hand for the tiny model of `runs`."""

import pytest
import torch
from runs import federation, start

from scalefl.models.cost import level_cost

EMBED, HEAD_DIM, PATCHES, VOCAB = 16, 8, 16, 280
IMAGE_TOKENS, PATCH_PIXELS = 4, 3 * 7 * 7
KEPT = {1: {"ffn": 12, "heads": 1, "layers": 1}, 2: {"ffn": 24, "heads": 2, "layers": 2}}
"""Of 24 channels, 2 heads and 2 layers with an exit each; the vision tower keeps both heads and 1 layer."""


def linear(rows, inputs, outputs):
    """Multiply-accumulates of a linear layer on `rows` vectors."""
    return rows * inputs * outputs


def attention(length, heads):
    """Of every position with every other: scores, and the mean of values that they weigh."""
    return 2 * heads * length * length * HEAD_DIM


def macs(level, length, predicted):
    """One example's prompt and answer of `length` positions, `predicted` of them at every exit."""
    kept, tokens = KEPT[level], PATCHES + 1  # the tower has a class token besides its patches
    inner = kept["heads"] * HEAD_DIM
    vision = PATCHES * PATCH_PIXELS * EMBED  # the convolution: a linear layer on each patch
    vision += linear(tokens, EMBED, 3 * EMBED) + attention(tokens, 2) + linear(tokens, EMBED, EMBED)
    vision += linear(tokens, EMBED, kept["ffn"]) + linear(tokens, kept["ffn"], EMBED)
    projector = linear(IMAGE_TOKENS, 4 * EMBED, EMBED)
    layer = 4 * linear(length, EMBED, inner) + attention(length, kept["heads"])  # q, k, v and o
    layer += 3 * linear(length, EMBED, kept["ffn"])  # gate, up and down
    head = linear(predicted, EMBED, VOCAB)
    return vision + projector + kept["layers"] * (layer + head)


def parameters(level):
    kept = KEPT[level]
    ffn, inner = kept["ffn"], kept["heads"] * HEAD_DIM
    embeddings = EMBED + (PATCHES + 1) * EMBED + PATCH_PIXELS * EMBED + EMBED  # class, positions, patches
    vision_layer = (EMBED + 1) * 3 * EMBED + (EMBED + 1) * EMBED + (EMBED + 1) * ffn + (ffn + 1) * EMBED
    vision = embeddings + vision_layer + 3 * 2 * EMBED  # and three layer norms
    projector = (4 * EMBED + 1) * EMBED
    layer = 4 * EMBED * inner + 3 * EMBED * ffn + 2 * EMBED  # without biases; two norms
    return vision + projector + 2 * VOCAB * EMBED + kept["layers"] * (layer + EMBED)  # and a norm per exit


def example(length, predicted):
    """A batch of one row: its positions decide the cost, not what stands there."""
    return {
        "input_ids": torch.full((1, length), 9),
        "pixel_values": torch.zeros(1, 3, 28, 28),
        "predict_at": torch.arange(predicted),
    }


@pytest.mark.parametrize(("length", "predicted"), [(65, 4), (40, 1)])
def test_costs_are_those_of_the_sums_by_hand(tmp_path, length, predicted):
    store = federation(tmp_path).store
    for level in (1, 2):
        cost = level_cost(store.models, level, example(length, predicted))
        assert cost.macs == macs(level, length, predicted)
        assert cost.parameters == cost.trainable == parameters(level)
        assert cost.bytes_each_way == 4 * parameters(level)


def test_under_lora_only_adapters_projector_and_the_earlier_exits_norm_train(tmp_path):
    """Rank 4 on q and v, whose inputs are whole. Level 1's one norm is that exit's."""
    store = federation(tmp_path, tuning="lora", feature_cache="off").store
    for level, heads, layers in ((1, 1, 1), (2, 2, 2)):
        adapters = layers * 2 * 4 * (EMBED + heads * HEAD_DIM)
        cost = level_cost(store.models, level, example(65, 4))
        assert cost.trainable == adapters + (4 * EMBED + 1) * EMBED + EMBED
        assert cost.bytes_each_way == 4 * cost.trainable
        whole_tower = (2 * EMBED + 1) * (24 - KEPT[level]["ffn"])  # frozen, it is not cut
        assert cost.parameters == parameters(level) + adapters + whole_tower


def test_longer_prompts_and_larger_levels_cost_more(tmp_path):
    store = federation(tmp_path).store
    by_length = [level_cost(store.models, 2, example(length, 4)).macs for length in (30, 31, 62, 120)]
    assert by_length == sorted(set(by_length))
    small, large = (level_cost(store.models, level, example(65, 4)) for level in (1, 2))
    for name in ("macs", "parameters", "trainable", "bytes_each_way"):
        assert getattr(small, name) < getattr(large, name)


def test_the_table_of_levels_opens_a_run(tmp_path, capsys):
    start(tmp_path, num_rounds=1)
    shown = capsys.readouterr().out
    before = shown.partition("round 1/1")[0]
    rows = [line.split() for line in before.splitlines() if line.split()[:1] == ["level"]]
    rows = {int(row[1]): row for row in rows if row[1].isdecimal()}
    assert rows.keys() == {1, 2}
    example = federation(tmp_path).batchers["train"].training([0]).inputs
    length, predicted = example["input_ids"].shape[1], len(example["predict_at"])
    for level, row in rows.items():
        count = f"{parameters(level):,}"
        millions = f"{macs(level, length, predicted) / 1e6:,.1f}"
        megabytes = f"{4 * parameters(level) / 1e6:.2f}"
        kept = KEPT[level]
        assert row[2:10] == [f"{level / 2:g}", str(level), count, count, millions, "M", megabytes, "MB"]
        assert {f"ffn={kept['ffn']}", f"heads={kept['heads']}"} <= set(row)
        assert row[-1] == "2"  # clients
