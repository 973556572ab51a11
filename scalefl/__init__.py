"""ScaleFL: clients whose machines differ fine-tune one vision-language model together."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

STARTED_BY = os.getppid()
"""Read before torch is imported, which takes seconds: a launcher may be gone by then."""

_CLASSES = {
    "MiniGPTv2ForConditionalGeneration": "scalefl.models.minigptv2",
    "MiniGPTv2Processor": "scalefl.models.minigptv2",
}
"""To be imported from here, when they are asked for."""


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
