"""Every benchmark runs in its smallest setting; what it measures there means nothing, and is not judged."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"

ROW = re.compile(r"^\| .* \|$", re.MULTILINE)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / command[0]), *command[1:]],
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, num_rows",
    [
        ("round_memory.py --clients 4 --bases nf4 --threads 1", 2),
        ("step_time.py --steps 1", 3),
        ("step_time.py --steps 1 --quantization nf4 --precision bf16", 3),
        ("switching.py --clients 4 --local-steps 1", 1),
        ("switching.py --clients 4 --local-steps 1 --base-store file --quantization nf4", 1),
        ("executors.py --parts parallel --clients 4 --local-steps 1", 4),
        ("executors.py --parts jobs --local-steps 1", 4),
        ("executors.py --parts merge", 3),
        ("feature_cache.py --epochs 1 --images 2", 2),
        ("plan_accuracy.py --cases lora-nf4 tower --levels 1", 4),
        ("convert_memory.py", 1),
        ("importance_order.py --seeds 0", 8),
        ("full_size.py --device cpu --clients 4 --pixels 224 --bases nf4", 2),
    ],
)
def test_a_benchmark_prints_its_table(command: str, num_rows: int) -> None:
    done = run(*command.split(), "--small")
    assert done.returncode == 0, done.stderr
    header, *rows = ROW.findall(done.stdout)
    assert len(rows) == num_rows
    assert {row.count("|") for row in rows} == {header.count("|")}
    assert "torch" in done.stdout, "figures come with the hardware they were measured on"


@pytest.mark.slow
def test_curves_of_early_exits_are_written(tmp_path: Path) -> None:
    """A point of every threshold, as many rows of the file; the last one computes everything."""
    done = run("early_exit.py", "--small", "--seeds", "0", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(ROW.findall(done.stdout)) == 2
    header, *points = (tmp_path / "early_exit.csv").read_text().splitlines()
    assert header == "seed,threshold,accuracy,mean_cost" and len(points) > 10
    costs = [float(point.rpartition(",")[2]) for point in points]
    assert costs == sorted(costs) and 0 < costs[0] < costs[-1] == 1
    assert (tmp_path / "early_exit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_plain_loop_does_the_same_work() -> None:
    """Weights equal after three steps, but for the order of sums."""
    done = run("step_time.py", "--steps", "1", "--small")
    found = re.search(r"learned differs by (\S+) of (\S+) ", done.stdout)
    assert found is not None, done.stdout + done.stderr
    apart, moved = map(float, found.groups())
    assert apart <= 1e-3 * moved > 0


def test_a_broken_limit_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from measuring import Row, show

    rows = [Row(cells=("held",), ratio=1.0, limit=1.05), Row(cells=("reference",))]
    assert show("Title", ["what"], rows) == 0
    assert show("Title", ["what"], [*rows, Row(cells=("above",), ratio=1.051, limit=1.05)]) == 1
    assert "| above | 1.051 | 1.050 | broken |" in capsys.readouterr().out
    below = Row(cells=("below",), ratio=0.849, limit=1.15, least=0.85)
    assert show("Title", ["what"], [below]) == 1
    assert "| below | 0.849 | 0.850 to 1.150 | broken |" in capsys.readouterr().out


@pytest.mark.slow
def test_full_size_without_a_gpu_says_so_in_one_line() -> None:
    done = run("full_size.py")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [
        "full_size.py: no CUDA GPU was found; expected one, or --device cpu --small."
    ]
