"""Early exits: who is sure leaves, with the answer of that exit, and is computed no further."""

import math

import pytest
import torch
from runs import MODEL, federation

from scalefl.batches import Candidates
from scalefl.inference import ExitRule, answer, confidence

ROUNDING = 1e-5
"""Of probabilities: fp32 sums of fewer rows at once."""
SECTIONS = {"text": {**MODEL["text"], "num_hidden_layers": 3}}
OPTIONS = {
    "ee_locs": [1, 2],
    "vertical_scale_ratios": [1.0],
    "horizontal_scale_ratios": [3],
    "client_split_ratios": [1.0],
}


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    return federation(tmp_path_factory.mktemp("fed"), SECTIONS, **OPTIONS)


@pytest.fixture(scope="module")
def model(fed):
    return fed.store.submodel(1, fed.initial_state, own=False).eval()


@pytest.fixture(scope="module")
def candidates(fed):
    return Candidates(ids=fed.answer_ids)


IDS = [0, 1, 2, 3]


def at_every_exit(model, fed, candidates, temperature=1.0):
    """(M, B, A) probabilities of one pass through all layers, as evaluation makes it."""
    with torch.no_grad():
        logits = model(**fed.batchers["val"].scoring(IDS, candidates)).exit_logits
    scores = [candidates.log_likelihoods(part.unflatten(0, (len(IDS), -1))) for part in logits]
    return torch.stack([(score / temperature).softmax(-1) for score in scores])


def answers(model, fed, candidates, **rule):
    with torch.no_grad():
        return answer(model, fed.batchers["val"], IDS, candidates, ExitRule(**rule))


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("quantile", [0.0, 0.4, 0.7, 1.1])
def test_every_row_leaves_at_the_first_exit_that_is_sure(model, fed, candidates, measure, quantile):
    """Its probabilities are those of a pass through all layers; thresholds from none leaves to all leave."""
    all_mba = at_every_exit(model, fed, candidates, temperature=2.0)
    sure_mb = torch.stack([confidence(part, measure) for part in all_mba])
    thresholds = [float(row.quantile(min(quantile, 1.0))) + (quantile > 1) - 1e-7 for row in sure_mb[:2]]
    found = answers(
        model, fed, candidates, thresholds=tuple(thresholds), measure=measure, temperatures=(2.0, 2.0, 2.0)
    )
    for row, choice in enumerate(found):
        sure = [bool(sure_mb[m, row] >= thresholds[m]) for m in range(2)] + [True]
        assert choice.exit == sure.index(True) + 1
        expected = all_mba[choice.exit - 1, row]
        assert float((torch.tensor(choice.probabilities) - expected).abs().max()) <= ROUNDING
    exits = {choice.exit for choice in found}
    assert {0.0: exits == {1}, 1.1: exits == {3}}.get(quantile, len(exits) > 1)


def test_layers_beyond_a_rows_exit_are_not_computed(model, fed, candidates):
    all_mba = at_every_exit(model, fed, candidates)
    middle = float(all_mba[0].max(-1).values.median())
    rows = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        for layer in model.language_model.model.layers
    ]
    found = answers(model, fed, candidates, thresholds=(middle + 1e-6, 0.0))
    for hook in hooks:
        hook.remove()
    gone = sum(choice.exit == 1 for choice in found)
    assert 0 < gone < 4
    assert rows == [4, 4 - gone]
    assert {choice.exit for choice in found} == {1, 2}


@pytest.mark.parametrize("max_exit", [1, 2, 3, 9])
def test_a_budget_of_exits(model, fed, candidates, max_exit):
    found = answers(model, fed, candidates, thresholds=(2.0, 2.0), max_exit=max_exit)
    assert {choice.exit for choice in found} == {min(max_exit, 3)}


def test_an_open_answer_set_leaves_by_its_first_token(model, fed):
    with torch.no_grad():
        prompts = fed.batchers["val"].prompts(IDS)
        first = [model(**prompts, exit=exit, logits_to_keep=1).logits[:, 0] for exit in (1, 2, 3)]
    sure_mb = torch.stack([logits.softmax(-1).max(-1).values for logits in first])
    middle = float(sure_mb[0].median()) + 1e-6
    found = answers(model, fed, None, thresholds=(middle, 0.0))
    assert [choice.exit for choice in found] == [1 if sure >= middle else 2 for sure in sure_mb[0]]
    assert all(choice.probabilities == () for choice in found)


def test_confidence_by_hand():
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.3, 0.2, 0.0]])
    assert confidence(rows, "probability").tolist() == pytest.approx([1.0, 0.25, 0.5])
    assert confidence(rows, "margin").tolist() == pytest.approx([1.0, 0.0, 0.2])
    entropy = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    assert confidence(rows, "entropy").tolist() == pytest.approx([1.0, 0.0, 1 - entropy / math.log(4)])
