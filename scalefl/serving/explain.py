"""What every exit of a model says of one image, and which parts of the image spoke for the answer.

Shapes: M exits, A answers (tokens of the vocabulary where the model writes its answer), T image tokens,
F features of one, R rows and C columns of patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from scalefl.batches import Batcher
from scalefl.inference import scores_at_exits
from scalefl.prediction.asked import Asked
from scalefl.prediction.loaded import Answer, Answering


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One image, answered and looked into."""

    answer: Answer
    """What `scalefl predict` says."""
    probabilities: tuple[Mapping[str, float], ...]
    """By exit: of every candidate answer; where the model writes its answer, of its likeliest first token."""
    saliency_rc: Tensor
    """At least 0, fp32 on the CPU: see `explain`."""


def explain(asked: Asked, image: Image.Image) -> Explained:
    """Answer as `scalefl predict` does, and say what each patch of the image added to that answer.

    The saliency of a patch is the gradient of the answer's log-probability, at the exit that answered, with
    respect to what the vision tower's last layer says of the patch, times what it says: summed over channels,
    and where negative 0. Of a written answer it is the first token's. Source: Grad-CAM (Selvaraju et al.,
    ICCV 2017); but gradients are not averaged over the image first, which lights up places that the model did
    not use: so HiResCAM (Draelos and Carin 2020, arXiv 2011.08891).
    """
    model, pixels = asked.model, asked.model.prepare(image)
    (answer,) = asked.answer([pixels])
    features_tf = _features(model, pixels).requires_grad_()
    batcher = Batcher(model.processor, model.asking(["0"]), {}, model.device, features={"0": features_tf})
    scores_ma = scores_at_exits(model.model, batcher, [0], model.candidates)[:, 0]
    temperatures_m = torch.tensor(asked.rule.temperatures or (1.0,) * model.num_exits)
    log_probs_ma = (scores_ma / temperatures_m[:, None]).log_softmax(-1)
    said_a = log_probs_ma[answer.exit - 1]
    chosen = said_a.argmax() if model.answers is None else model.answers.index(answer.text)
    (gradient_tf,) = torch.autograd.grad(said_a[chosen], features_tf)
    added_tf = gradient_tf.float() * features_tf.detach().float()
    return Explained(
        answer=answer,
        probabilities=tuple(_named(model, said_a) for said_a in log_probs_ma.detach().exp()),
        saliency_rc=added_tf.reshape(*model.family.patch_grid(model.model.config), -1).sum(-1).relu().cpu(),
    )


@torch.no_grad()
def _features(model: Answering, pixels: Tensor) -> Tensor:
    """(T, F)."""
    pixel_values = model.processor.normalise(pixels[None]).to(model.device)
    return model.family.encode_images(model.model, pixel_values)[0]


def _named(model: Answering, probabilities_a: Tensor) -> dict[str, float]:
    if model.answers is not None:
        return dict(zip(model.answers, probabilities_a.tolist(), strict=True))
    token = int(probabilities_a.argmax())
    return {model.processor.tokenizer.decode([token]): float(probabilities_a[token])}
