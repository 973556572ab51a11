"""Fixtures shared by the tests of the data sets, and by those of `scalefl plan`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

LONGEST_FIRST = (
    "test_matrix",
    "test_jobs",
    "test_slurm",
    "test_parallel",
    "test_benchmarks",
    "test_plan_memory",
)
"""Files that take minutes: started last, one core would work at them alone."""

GRADES = ("none", "doubtful", "minimal", "moderate", "severe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def knee_run() -> Callable[..., Any]:
    """A function from changed options to the part of a run's config that the loaders of data sets read."""

    def make(**changes: Any) -> SimpleNamespace:
        defaults = {
            "data_root": None,
            "annotations": None,
            "skip_bad_images": False,
            "question": "What is the grade?",
            "answers": GRADES,
            "workers": 2,
            "seed": 0,
            "num_patients": 40,
            "evaluate_from": None,
            "data_here": "all",
        }
        return SimpleNamespace(**{**defaults, **{name: _plain(value) for name, value in changes.items()}})

    return make


@pytest.fixture(scope="session")
def kneexray_root() -> Path:
    """The folder of real radiographs, below SCALEFL_TEST_DATA or in ../shared/data beside the repository."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("SCALEFL_TEST_DATA", shared)) / "kneexray"
    if not root.is_dir():
        reason = f"no real radiographs at {root}; set SCALEFL_TEST_DATA to the folder that holds kneexray/"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return root


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A function from options of the command and the model to what `scalefl plan --json` says of them."""
    from runs import arguments  # imported late: it changes the process that it is imported into

    from scalefl.cli import main

    def run_it(*typed: str, model: Any = None, **train: Any) -> Any:
        capsys.readouterr()
        command = arguments(tmp_path, *typed, "--json", model=model, **train)[1:]
        assert main(["plan", *command]) == 0
        return json.loads(capsys.readouterr().out)

    return run_it


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """As `plan`, of options that are refused: the lines of the refusal."""
    from runs import arguments

    from scalefl.cli import main

    def run_it(*typed: str, model: Any = None, **train: Any) -> list[str]:
        capsys.readouterr()
        assert main(["plan", *arguments(tmp_path, *typed, model=model, **train)[1:]]) == 2
        return [line.removeprefix("scalefl: ") for line in capsys.readouterr().err.splitlines()]

    return run_it


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
