"""Named recipes for training levels of different size together."""

from collections.abc import Mapping
from typing import Any

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Every level learns under label skew.
    "scalefl": {"width_axes": "inner", "width_scaler": False, "zero_tails": True, "logit_adjustment": "auto"},
    # ScaleFL, CVPR 2023: the embedding is cut too, and contractions are scaled for the terms they lose.
    "paper": {"width_axes": "all", "width_scaler": True, "zero_tails": False, "logit_adjustment": "off"},
}
