"""Imports point down, heavy dependencies have one door each, and the library does not print."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "scalefl"

TIERS = (
    ("contracts",),
    ("seeding", "registry", "config"),
    ("levels",),
    ("slicing",),
    ("objective", "aggregation", "data"),
    ("models",),
    ("batches",),
    ("engine",),
    ("evaluate", "inference", "features", "checkpoint", "report", "console"),
    ("planning", "conversion"),
    ("federation", "prediction"),
    ("export", "reordering", "serving"),
    ("cli",),
    ("__main__",),
)
"""From bottom to top. A module imports from lower tiers, or without cycles from its own package."""

RANK = {room: rank for rank, rooms in enumerate(TIERS) for room in rooms}

DOORS = {
    "accelerate": ("engine/",),
    "deepspeed": ("engine/",),
    "bitsandbytes": ("engine/optimizers.py", "models/quantised.py"),
    "torch.distributed": ("engine/",),
    "peft": ("models/adapters.py",),
    "gradio": ("serving/page.py",),
}
"""Dependency -> the only files, or folders, that import it."""

FILES = sorted(path for path in ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    """`scalefl/data/images.py` -> `data.images`; a package's own file is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Dotted names imported anywhere, in functions and under TYPE_CHECKING too; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, `data.images` for instance."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "scalefl" and len(parts) > 1:
            at = Path(*parts[1:])
            is_module = (ROOT / at).with_suffix(".py").is_file() or (ROOT / at).is_dir()
            found.add(".".join(parts[1:] if is_module else parts[1:-1]))
    return found - {""}  # the package itself, which holds the version and imports nothing


def test_every_module_has_a_tier() -> None:
    rooms = {module_name(path).partition(".")[0] for path in FILES} - {"__init__"}
    assert rooms - set(RANK) == set()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    room = module_name(path).partition(".")[0]
    for imported in own_imports(path):
        other = imported.partition(".")[0]
        assert other == room or RANK[other] < RANK[room], f"{module_name(path)} imports {imported}"


def test_no_cycles_within_a_package() -> None:
    graph = {module_name(path): own_imports(path) for path in FILES}
    while graph:
        leaves = {name for name, needed in graph.items() if not needed & set(graph) - {name}}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in leaves}


@pytest.mark.parametrize("dependency", DOORS)
def test_a_heavy_dependency_has_one_door(dependency: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in FILES
        for name in imports(path)
        if f"{name}.".startswith(f"{dependency}.")
    }
    assert all(user.startswith(DOORS[dependency]) for user in users), users


def test_torch_distributed_is_used_where_collectives_live() -> None:
    """`torch.distributed` needs no import of its own, so attributes count as well."""
    users = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
    }
    assert all(user.startswith(DOORS["torch.distributed"]) for user in users), users


def test_the_library_does_not_print() -> None:
    """Only the command line does, and only to say why it stops."""
    users = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert users <= {"cli.py"}


def test_no_global_randomness() -> None:
    """Randomness is passed: no drawing from, or seeding of, numpy's and Python's global generators."""
    for path in FILES:
        for name in imports(path):
            assert name != "random" and not name.startswith("random."), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("np.random."):
                assert node.attr in ("Generator", "default_rng"), f"{path}: {ast.unparse(node)}"
