"""What becomes of an uploaded file."""

from __future__ import annotations

from pathlib import Path

from scalefl.contracts import InputError
from scalefl.data.images import read_image
from scalefl.prediction.asked import Asked
from scalefl.serving.explain import explain
from scalefl.serving.report import problem, report


def told(asked: Asked, path: Path) -> str:
    """HTML about an uploaded image, or why it cannot be used; the file is removed, its name never told."""
    try:
        image = read_image(path, called="the uploaded file")
    except InputError as error:
        return problem(str(error))
    finally:
        path.unlink(missing_ok=True)  # the same file dropped twice is one upload
    return report(explain(asked, image), image)
