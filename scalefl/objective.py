"""What a sub-model with early exits minimises: cross-entropy at every exit, distilled from the deepest.

Shapes: N answer tokens, V vocabulary, A answers (labels), S steps (tokens) of the longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

UNSEEN = 1e-3
"""Examples a client is taken to have of every label. Small, so that it learns next to nothing against a label
it never sees: with 1, what only few clients hold learns that other clients' labels do not occur.
"""


def exit_losses(
    exit_logits: Sequence[Tensor],
    targets_n: Tensor,
    *,
    distill_weight: float,
    temperature: float,
    adjustment_nv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss summed over answer tokens (divide by the optimizer step's), and each exit's summed CE.

        L = sum_i i [CE(exit_i) + gamma T^2 KL(softmax(exit_m / T) || softmax(exit_i / T))] / (m (m + 1) / 2)

    without a KL term for i = m; the teacher is detached and its logits are not adjusted.
    Shapes: logits (N, V), shallowest exit first. Source: ScaleFL (CVPR 2023); its reference implementation
    averages the KL over classes and lets gradients reach the teacher.
    """
    if temperature <= 0:
        raise ValueError(f"distillation temperature: got {temperature}; expected a positive number.")
    num_exits = len(exit_logits)
    logits = [exit_nv.float() for exit_nv in exit_logits]
    teacher_nv = F.log_softmax(logits[-1].detach() / temperature, dim=-1)
    total, cross_entropies = logits[0].new_zeros(()), []
    for i, logits_nv in enumerate(logits, start=1):
        adjusted_nv = logits_nv if adjustment_nv is None else logits_nv + adjustment_nv
        cross_entropy = F.cross_entropy(adjusted_nv, targets_n, reduction="sum")
        term = cross_entropy
        if distill_weight > 0 and i < num_exits:
            student_nv = F.log_softmax(logits_nv / temperature, dim=-1)
            divergence = F.kl_div(student_nv, teacher_nv, log_target=True, reduction="sum")
            term = term + distill_weight * temperature**2 * divergence
        total = total + i * term
        cross_entropies.append(cross_entropy.detach())
    return total / (num_exits * (num_exits + 1) / 2), torch.stack(cross_entropies)


def answer_prior_adjustment(
    label_counts: Sequence[int], answer_ids: Sequence[Sequence[int]], vocab: int
) -> Tensor:
    """What logit adjustment adds at step s of answer a: (A, S, V).

    log(P_client(token | answer so far) / P_uniform(token | answer so far)) for tokens that continue a
    candidate answer, 0 elsewhere; the client's label counts are raised by `UNSEEN`. A client whose labels are
    skewed then learns the evidence in an image and not its own label frequencies. Source: Menon et al.,
    "Long-tail learning via logit adjustment" (ICLR 2021), carried over to answers of several tokens.
    """
    counts = [count + UNSEEN for count in label_counts]
    table = torch.zeros(len(answer_ids), max(map(len, answer_ids)), vocab)
    for a, ids in enumerate(answer_ids):
        for step in range(len(ids)):
            prefix = list(ids[:step])
            sharing = [
                k for k, other in enumerate(answer_ids) if list(other[:step]) == prefix and len(other) > step
            ]
            total = sum(counts[k] for k in sharing)
            for token in {answer_ids[k][step] for k in sharing}:
                continuing = [k for k in sharing if answer_ids[k][step] == token]
                client = sum(counts[k] for k in continuing) / total
                table[a, step, token] = torch.tensor(client / (len(continuing) / len(sharing))).log()
    return table
