"""Names on the command line -> code. A new family, data set or rule is one new file and one line here."""

import difflib
import importlib
from typing import Any

from scalefl.contracts import InputError

REGISTRY: dict[str, dict[str, str]] = {
    "arch": {"MiniGPTv2": "scalefl.models.minigptv2:FAMILY"},
    "data": {"kneexray": "scalefl.data.kneexray:load", "synthetic": "scalefl.data.synthetic:load"},
    "aggregation": {"coverage_mean": "scalefl.aggregation.coverage_mean:CoverageMean"},
    "executor": {
        "sequential": "scalefl.federation.sequential:Sequential",
        "parallel": "scalefl.federation.parallel:Parallel",
        "jobs": "scalefl.federation.jobs:Jobs",
    },
    "job_launcher": {
        "local": "scalefl.federation.local:Local",
        "slurm": "scalefl.federation.slurm:Slurm",
        "manual": "scalefl.federation.manual:Manual",
    },
}


def resolve(kind: str, name: str) -> Any:
    """The object behind a registered name, or behind `package.module:Name`.

    Raises InputError naming the nearest registered name if there is no such thing.
    """
    known = REGISTRY[kind]
    target = known.get(name, name if ":" in name else None)
    if target is None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise InputError(
            f"--{kind}: unknown name '{name}'; {hint}known: {', '.join(known)}, "
            "or package.module:Name for your own."
        )
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise InputError(
            f"--{kind}: cannot load '{name}' ({error}); expected package.module:Name."
        ) from error
