"""Laws of the loss: design.md's formula, a teacher without gradient, logits adjusted by a client's prior."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from builders import ANSWERS, processor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scalefl.objective import UNSEEN, answer_prior_adjustment, exit_losses

RTOL = 1e-5
"""The loss computes in fp32: some tens of roundings of 6e-8 each, against a reference in float64."""


def reference(
    exits: Sequence[Tensor], targets: Tensor, gamma: float, T: float, adjustment: Any = 0.0
) -> Tensor:
    """sum_i i * [CE_i + gamma T^2 KL(softmax(z_m / T) || softmax(z_i / T))] / (m (m+1) / 2), summed."""
    m, total = len(exits), torch.zeros((), dtype=torch.float64)
    p_teacher = (exits[-1] / T).exp() / (exits[-1] / T).exp().sum(-1, keepdim=True)
    for i, z in enumerate(exits, start=1):
        q = (z + adjustment).exp() / (z + adjustment).exp().sum(-1, keepdim=True)
        term = -q[torch.arange(len(targets)), targets].log().sum()
        if i < m:
            p_student = (z / T).exp() / (z / T).exp().sum(-1, keepdim=True)
            fixed = p_teacher.detach()
            term = term + gamma * T**2 * (fixed * (fixed / p_student).log()).sum()
        total = total + i * term
    return total / (m * (m + 1) / 2)


def random_exits(
    num_exits: int, tokens: int = 5, vocab: int = 7, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_exits, tokens, vocab, generator=generator, dtype=torch.float64) * 2
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return [one.requires_grad_() for one in logits.clone().unbind()], targets


@pytest.mark.parametrize("num_exits", [1, 2, 4])
@pytest.mark.parametrize(("gamma", "T"), [(0.0, 1.0), (1.0, 3.0), (0.3, 0.7)])
@pytest.mark.parametrize("adjusted", [False, True])
def test_loss_and_gradients_equal_a_float64_reference(
    num_exits: int, gamma: float, T: float, adjusted: bool
) -> None:
    exits, targets = random_exits(num_exits)
    adjustment = torch.randn(5, 7, generator=torch.Generator().manual_seed(9)) if adjusted else None
    loss, _ = exit_losses(exits, targets, distill_weight=gamma, temperature=T, adjustment_nv=adjustment)
    expected = reference(exits, targets, gamma, T, 0.0 if adjustment is None else adjustment.double())
    torch.testing.assert_close(loss.double(), expected, rtol=RTOL, atol=0)
    ours = torch.autograd.grad(loss, exits)
    theirs = torch.autograd.grad(expected, exits)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=RTOL, atol=RTOL)


def test_cross_entropies_are_sums_of_each_exit_apart() -> None:
    """Reference defect 8: every exit reported the same figure."""
    exits, targets = random_exits(3)
    _, cross_entropies = exit_losses(exits, targets, distill_weight=1.0, temperature=2.0)
    expected = torch.stack([-z.log_softmax(-1)[range(5), targets].sum() for z in exits])
    torch.testing.assert_close(cross_entropies.double(), expected.detach(), rtol=RTOL, atol=0)
    assert not cross_entropies.requires_grad and len(set(cross_entropies.tolist())) == 3


def test_the_teacher_gets_no_gradient_from_distillation() -> None:
    """Reference defect 4: bit for bit, the deepest exit does not notice gamma; the shallower ones do."""
    gradients = []
    for gamma in (0.0, 5.0):
        exits, targets = random_exits(3)
        loss, _ = exit_losses(exits, targets, distill_weight=gamma, temperature=2.0)
        gradients.append(torch.autograd.grad(loss, exits))
    off, on = gradients
    assert torch.equal(off[-1], on[-1])
    assert not torch.equal(off[0], on[0]) and not torch.equal(off[1], on[1])


def test_distillation_ends_where_the_student_equals_the_teacher() -> None:
    exits, targets = random_exits(1)
    same = [exits[0], exits[0].detach().clone(), exits[0]]
    with_it, _ = exit_losses(same, targets, distill_weight=5.0, temperature=2.0)
    without, _ = exit_losses(same, targets, distill_weight=0.0, temperature=2.0)
    torch.testing.assert_close(with_it, without, rtol=RTOL, atol=0)


def test_distillation_sees_the_logits_as_they_are() -> None:
    """An adjustment moves the loss by what it does to the cross-entropies, whatever gamma is."""
    exits, targets = random_exits(3)
    adjustment = torch.randn(5, 7, generator=torch.Generator().manual_seed(9))
    moved = []
    for gamma in (0.0, 4.0):
        plain, _ = exit_losses(exits, targets, distill_weight=gamma, temperature=2.0)
        adjusted, _ = exit_losses(
            exits, targets, distill_weight=gamma, temperature=2.0, adjustment_nv=adjustment
        )
        moved.append(float((adjusted - plain).detach()))
    assert moved[0] == pytest.approx(moved[1], rel=1e-3)  # a difference of two fp32 sums near 100


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_is_positive(temperature: float) -> None:
    exits, targets = random_exits(2)
    with pytest.raises(ValueError, match=f"distillation temperature: got {temperature}"):
        exit_losses(exits, targets, distill_weight=0.0, temperature=temperature)


def test_no_answer_token_gives_zero_loss_and_zero_gradient() -> None:
    exits, targets = random_exits(2, tokens=0)
    loss, _ = exit_losses(exits, targets, distill_weight=1.0, temperature=2.0)
    loss.backward()
    assert float(loss.detach()) == 0.0 and all(z.grad is not None and z.grad.numel() == 0 for z in exits)


CASES = (
    ((5, 6, 2), (5, 7, 2), (8, 2)),  # two answers begin alike
    ((5, 6, 2), (5, 6, 6, 2), (5, 2), (9, 5, 2)),  # one goes on where another ends
    ((3,), (4,)),
)
COUNTS = st.lists(st.integers(0, 30), min_size=4, max_size=4)


@pytest.mark.parametrize("answers", CASES)
@given(counts=COUNTS)
def test_adjustment_is_the_log_ratio_of_priors_by_enumeration(
    answers: tuple[tuple[int, ...], ...], counts: list[int]
) -> None:
    """P(token | prefix) by weighing whole answers: P(answers that go on so) / P(answers with this prefix)."""
    vocab, counts = 10, counts[: len(answers)]
    table = answer_prior_adjustment(counts, answers, vocab)
    assert table.shape == (len(answers), max(map(len, answers)), vocab)

    def prior(weights: Sequence[float], prefix: tuple[int, ...]) -> float:
        return math.fsum(w for w, ids in zip(weights, answers, strict=True) if ids[: len(prefix)] == prefix)

    client, uniform = [count + UNSEEN for count in counts], [1.0] * len(answers)
    for a, ids in enumerate(answers):
        for step in range(len(ids)):
            prefix, expected = ids[:step], torch.zeros(vocab)
            for token in range(vocab):
                if prior(uniform, (*prefix, token)) > 0:
                    p_client = prior(client, (*prefix, token)) / prior(client, prefix)
                    p_uniform = prior(uniform, (*prefix, token)) / prior(uniform, prefix)
                    expected[token] = math.log(p_client / p_uniform)
            # one fp32 rounding of a ratio of up to 31 * 4 before the log
            torch.testing.assert_close(table[a, step], expected, rtol=1e-6, atol=1e-6)


def test_adjustment_over_an_answer_sums_to_the_log_ratio_of_label_priors() -> None:
    """However an answer is split, its tokens together carry log(P_client(label) / P_uniform(label))."""
    counts = [40, 3, 0, 7, 1]
    ids = [tuple(processor().encode_answer(answer)) for answer in ANSWERS]
    table = answer_prior_adjustment(counts, ids, vocab=280)
    smoothed = [count + UNSEEN for count in counts]
    for a, answer in enumerate(ids):
        total = sum(float(table[a, step, token]) for step, token in enumerate(answer))
        assert total == pytest.approx(math.log(smoothed[a] / sum(smoothed) * len(ids)), abs=1e-5)


@pytest.mark.parametrize("count", [0, 12])
def test_a_uniform_client_adjusts_nothing(count: int) -> None:
    ids = [tuple(processor().encode_answer(answer)) for answer in ANSWERS]
    assert not answer_prior_adjustment([count] * len(ids), ids, vocab=280).any()


def test_only_tokens_that_continue_an_answer_are_adjusted() -> None:
    table = answer_prior_adjustment([9, 0, 3], ((5, 6, 2), (5, 7, 2), (8, 2)), vocab=10)
    assert table[0, 0].nonzero().flatten().tolist() == [5, 8]
    assert table[0, 1].nonzero().flatten().tolist() == [6, 7]
    assert torch.equal(table[0, 1], table[1, 1]) and not table[:, 2].any()
    assert not table[2, 1:].any()
