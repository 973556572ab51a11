"""What is told of an image, as HTML that holds its pictures: nothing of it lies in a file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from scalefl.serving.explain import Explained

LONGEST_SIDE = 640
"""Pixels of a picture on the page."""
STRENGTH = 0.7
"""Share of the map's colour at its maximum."""


def report(explained: Explained, image: Image.Image) -> str:
    """Answer, what each exit says, the radiograph, and the map over it."""
    answer = explained.answer
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    small = small.convert("RGB")
    exits = len(explained.probabilities)
    return (
        f'<p id="answer">Answer: <b>{escape(answer.text)}</b>, by exit {answer.exit} of {exits}.</p>'
        + _table(explained.probabilities, answer.exit, written=not answer.probabilities)
        + _picture("radiograph", "The radiograph", small)
        + _picture("saliency", "What spoke for the answer", overlaid(small, explained.saliency_rc))
        + "<p>Bright patches raised the probability of the answer at the exit that gave it. The map is "
        "scaled to its own maximum: it says where, not how much.</p>"
    )


def problem(text: str) -> str:
    return f'<p id="problem" role="alert">{escape(text)}</p>'


def overlaid(image: Image.Image, saliency_rc: Tensor) -> Image.Image:
    """The map in colour over an RGB image, where it is 0 the image itself."""
    scaled = saliency_rc / saliency_rc.max().clamp(min=1e-30)
    heat = np.asarray(Image.fromarray(scaled.numpy()).resize(image.size, Image.Resampling.BILINEAR))
    colour = matplotlib.colormaps["inferno"](heat)[..., :3] * 255
    share = STRENGTH * heat[..., None]
    return Image.fromarray(np.rint(np.asarray(image) * (1 - share) + colour * share).astype(np.uint8))


def _table(probabilities: Sequence[Mapping[str, float]], answering: int, *, written: bool) -> str:
    """A row for each exit; `written` where its only entry is its first token."""
    heads = ["exit", *(["first token", "probability"] if written else probabilities[0]), "answered"]
    rows = []
    for exit, of_exit in enumerate(probabilities, start=1):
        told = [*(of_exit if written else ()), *(f"{value:.4f}" for value in of_exit.values())]
        rows.append([str(exit), *told, "yes" if exit == answering else ""])
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table id="exits"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _picture(name: str, caption: str, image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    shown = f'<img id="{name}" alt="{caption}" src="{source}">'
    return f"<figure><figcaption>{caption}</figcaption>{shown}</figure>"
