"""Every random draw comes from a generator seeded by (seed, purpose, round, client)."""

import hashlib

import numpy as np


def derive(seed: int, purpose: str, *, round: int = 0, client: int = 0) -> int:
    """A 63-bit seed for one purpose, independent of the order in which purposes are drawn."""
    text = f"{seed}/{purpose}/{round}/{client}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def numpy_rng(seed: int, purpose: str, *, round: int = 0, client: int = 0) -> np.random.Generator:
    return np.random.default_rng(derive(seed, purpose, round=round, client=client))
