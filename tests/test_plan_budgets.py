"""`scalefl plan --client_budgets`: what a file may say, which level a client gets, what `train` takes."""

import json

import pytest
import yaml
from runs import arguments, budgets_file, forget_launch, records, start

from scalefl.config.flags import parse
from scalefl.config.resolve import resolve
from scalefl.contracts import InputError, LevelSpec
from scalefl.federation.setup import build
from scalefl.models.cost import LevelCost
from scalefl.planning.assign import best_fit, search
from scalefl.planning.budgets import Budget, read_budgets
from scalefl.planning.estimate import MemoryEstimate
from scalefl.planning.predict import LevelPlan


def sub_model(width, depth, *, total, parameters=None, macs=None):
    memory = MemoryEstimate(weights=total, gradients=0, optimizer=0, activations=0, logits=0, host=0)
    size = round(1000 * width * depth)
    return LevelPlan(
        spec=LevelSpec(level=1, width_ratio=width, depth=depth),
        cost=LevelCost(
            parameters=parameters or size, trainable=size, macs=macs or size, bytes_each_way=4 * size
        ),
        round=memory,
        own=memory,
        evaluation=memory,
        need=round(1.05 * total),
    )


def budget(memory, client="a"):
    return Budget(client=client, memory=memory, flops=None, bandwidth=None)


def test_best_fit_is_the_level_of_most_macs_that_fits():
    levels = [
        sub_model(0.5, 1, total=100),
        sub_model(1.0, 1, total=300, macs=2000),
        sub_model(0.5, 2, total=200, macs=2000),
        sub_model(1.0, 2, total=400, macs=4000),
    ]
    fitted = best_fit([budget(m) for m in (105, 209, 210, 315, 419, 420)], levels)
    assert fitted.client_levels == (1, 1, 3, 3, 3, 4)  # 5 % to spare; of equal macs the deeper one


class Grid:
    """Every width and depth; needs grow with both, unevenly."""

    num_exits, width_units = 4, 16

    def __init__(self):
        self.asked = set()

    def submodel(self, width, depth):
        self.asked.add((width, depth))
        units = round(width * self.width_units)
        return sub_model(width, depth, total=1000 + 37 * units * depth + 11 * units**2 + 300 * depth)


def test_search_finds_what_trying_everything_finds():
    grid = Grid()
    every = [grid.submodel(u / 16, d) for u in range(1, 17) for d in range(1, 5)]
    for memory in range(1400, 9000, 71):
        fitting = [p for p in every if p.need <= memory]
        if fitting:
            found = search([budget(memory)], Grid())
            assert found.levels[0].size == max(p.size for p in fitting)


def test_search_asks_for_few_plans():
    """For each depth the ends, and for each budget three guesses between."""
    grid = Grid()
    search([budget(memory) for memory in (2000, 3000, 5000)], grid)
    assert len(grid.asked) <= 4 * (2 + 3 * 3)


def test_searched_levels_are_distinct_and_weakest_first():
    found = search([budget(memory, str(memory)) for memory in (5000, 2000, 5000, 9000)], Grid())
    assert found.client_levels == (2, 1, 2, 3)
    sizes = [level.size for level in found.levels]
    assert sizes == sorted(set(sizes))
    assert found.options()["client_split_ratios"] == [0.25, 0.5, 0.25]


def test_search_on_a_real_model_against_trying_everything(plan, tmp_path):
    """Two widths and two depths of the tiny model, whose needs lie between 0.1 and 1 MB."""
    every = {}
    for width in (0.5, 1.0):
        for depth in (1, 2):
            options = {"vertical_scale_ratios": [width], "horizontal_scale_ratios": [depth]}
            (level,) = plan(client_split_ratios=[1.0], **options)["levels"]
            every[width, depth] = level
    needs = sorted(level["needs"] for level in every.values())
    memories = [needs[0], needs[1] + 100, needs[2] + 100, 10 * needs[3]]
    path = budgets_file(tmp_path, [{"client": f"c{m}", "memory": f"{m}B"} for m in memories])
    found = plan("--client_budgets", path, "--search")
    for client in found["clients"]:
        chosen = found["levels"][client["level"] - 1]
        fitting = [e for e in every.values() if e["needs"] <= client["memory"]]
        best = max(fitting, key=lambda e: (e["parameters"], e["macs"]))
        assert (chosen["width_ratio"], chosen["depth"]) == (best["width_ratio"], best["depth"])


def test_train_takes_the_assignment(plan, tmp_path):
    """Together with a file of the user's own; a run then trains each client at its level."""
    small, large = (level["needs"] for level in plan()["levels"])
    has = [large, small, large, small]
    path = budgets_file(tmp_path, [{"client": n, "memory": f"{m:.0f}B"} for n, m in enumerate(has)])
    out = tmp_path / "assignment.yaml"
    plan("--client_budgets", path, "--out", str(out))
    mine = tmp_path / "mine.yaml"
    mine.write_text("num_clients: 7\nnum_rounds: 1\n")
    typed = arguments(tmp_path, "--config", str(mine), str(out))
    command = parse(typed)
    run, _ = resolve(command.flags, *command.config_files)
    assert (run.client_levels, run.num_clients, run.num_rounds) == ((2, 1, 2, 1), 4, 1)
    assert run.client_split_ratios == (0.5, 0.5)
    (record,) = records(start(tmp_path, "--config", str(mine), str(out)))
    assert [client["level"] for client in record["clients"]] == [1, 1, 2, 2]
    assert {client["client"] for client in record["clients"] if client["level"] == 2} == {0, 2}


def test_train_takes_what_a_search_found(plan, tmp_path):
    large = plan()["levels"][1]["needs"]
    path = budgets_file(tmp_path, [{"client": n, "memory": f"{large}B"} for n in "ab"])
    out = tmp_path / "assignment.yaml"
    plan("--client_budgets", path, "--search", "--out", str(out))
    command = parse(arguments(tmp_path, "--config", str(out)))
    run, _ = resolve(command.flags, *command.config_files)
    assert run.client_levels == (1, 1) and run.vertical_scale_ratios == (1.0,)
    assert run.client_names == ("a", "b")
    assert "partitioner" not in yaml.safe_load(out.read_text())  # these are no sites


def test_seconds_per_round(plan, tmp_path):
    """Two passes more than the forward one, 50 examples; and the slice down and up."""
    row = {"client": "a", "memory": "1GB", "flops": "1e9", "bandwidth": "10kB/s"}
    path = budgets_file(tmp_path, [row])
    found = plan("--client_budgets", path, "--client_examples", "50")
    level = found["levels"][1]
    expected = 2 * level["macs"] * 3 * 50 / 1e9 + 2 * level["bytes_each_way"] / 10e3
    assert found["clients"][0]["seconds_per_round"] == pytest.approx(expected)


def test_seconds_count_what_a_level_computes_again(plan, tmp_path):
    """Of --checkpointing_levels alone: one pass more there, none elsewhere."""
    small, large = (level["needs"] for level in plan()["levels"])
    rows = [
        {"client": n, "memory": f"{m}B", "flops": 1e9, "bandwidth": 1e4}
        for n, m in (("a", small), ("b", large))
    ]
    typed = ("--client_budgets", budgets_file(tmp_path, rows), "--client_examples", "50")
    found = plan(*typed, gradient_checkpointing=True, checkpointing_levels=[2])
    for client, level, passes in zip(found["clients"], found["levels"], (3, 4), strict=True):
        assert client["level"] == level["level"]
        computing = client["seconds_per_round"] - 2 * level["bytes_each_way"] / 1e4
        assert computing == pytest.approx(2 * level["macs"] * passes * 50 / 1e9)


def test_amounts_and_units(tmp_path):
    rows = [
        {"client": 1, "memory": 8},
        {"client": 0, "memory": "8GiB", "flops": "2 TFLOP/s", "bandwidth": "1.5MB/s"},
        {"client": 2, "memory": "0.5 GB", "flops": 1e12, "bandwidth": 3},
    ]
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(rows))
    found = read_budgets(str(path))
    assert [b.client for b in found] == ["0", "1", "2"]
    assert [b.memory for b in found] == [2**33, 8 * 10**9, 5 * 10**8]
    assert [b.flops for b in found] == [2e12, None, 1e12]
    assert [b.bandwidth for b in found] == [1.5e6, None, 3]


def test_clients_that_are_sites_are_assigned_by_name(plan, tmp_path):
    """Sites are drawn to client numbers unless they are named."""
    small, large = (level["needs"] for level in plan()["levels"])
    sites = ("site-c", "site-a", "site-d", "site-b")
    has = {"site-c": large, "site-a": small, "site-d": small, "site-b": large}
    path = budgets_file(tmp_path, [{"client": site, "memory": f"{has[site]}B"} for site in sites])
    out = tmp_path / "assignment.yaml"
    plan("--client_budgets", path, "--out", str(out), partitioner="natural")
    command = parse(arguments(tmp_path, "--config", str(out)))  # which says that clients are sites
    forget_launch()
    fed = build(*resolve(command.flags, *command.config_files))
    held = [{fed.data.splits["train"][i].site for i in own} for own in fed.clients]
    assert held == [{site} for site in sites]
    assert fed.client_levels == (2, 1, 1, 2)


def test_levels_of_sites_need_their_names(tmp_path):
    with pytest.raises(InputError, match="--client_levels: under --partitioner natural a client is a site"):
        resolve({"partitioner": "natural", "client_levels": ["1", "2"], "num_clients": "2"})


# Errors


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("{client: 0}", ["--client_budgets FILE: got a dict; expected a list of "]),
        ("[]", ["--client_budgets FILE: got an empty list or file; expected a list of "]),
        ("- [", ["--client_budgets FILE: no valid YAML ("]),
        ("- 3", ["FILE: entry 1: got 3; expected keys and values such as "]),
        (
            "- {client: 0, memori: 8GB}",
            [
                "FILE: entry 1: memori: unknown key; did you mean 'memory'? known: client, memory, ",
                "FILE: entry 1: memory: missing; expected ",
            ],
        ),
        (
            "- {client: a, memory: 0}\n- {client: b, memory: 8 apples}",
            [
                "FILE: entry 1: memory: got 0; expected an amount above 0, such as 8GB, 512MiB or a number",
                "FILE: entry 2: memory: got '8 apples'; expected an amount above 0, such as 8GB",
            ],
        ),
        ("- {client: a, memory: -3}", ["FILE: entry 1: memory: got -3; expected an amount above 0"]),
        ("- {client: true, memory: 1}", ["FILE: entry 1: client: got True; expected a name or a number."]),
        (
            "- {client: a, memory: 1, flops: fast}",
            ["FILE: entry 1: flops: got 'fast'; expected an amount above 0, such as 1e12 or 1TFLOP/s."],
        ),
        (
            "- {client: a, memory: 1, flops: 1}\n- {client: b, memory: 1, bandwidth: 1}",
            [
                "FILE: entry 1: flops: given without bandwidth; expected both, from which seconds a round",
                "FILE: entry 2: bandwidth: given without flops; expected both, from which seconds a round",
            ],
        ),
        (
            "- {client: a, memory: 1}\n- {client: a, memory: 2}",
            ["FILE: client a: given 2 times; expected each client once."],
        ),
        (
            "- {client: 0, memory: 1}\n- {client: 2, memory: 2}",
            ["FILE: clients 0, 2; expected names, or the numbers 0 to 1."],
        ),
    ],
)
def test_bad_budgets(refused, tmp_path, content, lines):
    path = budgets_file(tmp_path, content)
    got = [line.replace(path, "FILE") for line in refused("--client_budgets", path)]
    assert len(got) == len(lines)
    for line, expected in zip(got, lines, strict=True):
        assert line.startswith(expected)


def test_a_missing_file_of_budgets(refused):
    (line,) = refused("--client_budgets", "nowhere")
    assert line.startswith("--client_budgets nowhere: No such file or directory; expected a list of ")


@pytest.mark.parametrize("typed", [(), ("--search",)])
def test_a_budget_that_nobody_meets_says_what_is_missing(refused, plan, tmp_path, typed):
    wanted = plan()["levels"][0]["needs"]  # the tiny model's first level is its smallest sub-model
    rows = [{"client": "strong", "memory": 1}, {"client": "weak", "memory": f"{wanted - 10_000}B"}]
    out = tmp_path / "out.yaml"
    (line,) = refused("--client_budgets", budgets_file(tmp_path, rows), "--out", str(out), *typed)
    what = "the smallest sub-model" if typed else "the smallest, level 1,"
    has, needs = f"{(wanted - 10_000) / 1e6:.2f} MB", f"{wanted / 1e6:.2f} MB"
    assert line.startswith(
        f"client weak: has {has}, {what} needs {needs} (5% to spare): 10.00 kB missing; give"
    )
    assert not out.exists()


def test_best_fit_names_every_client_that_nothing_fits():
    with pytest.raises(InputError) as refusal:
        best_fit([budget(5, "a"), budget(500, "b"), budget(6, "c")], [sub_model(1.0, 1, total=100)])
    assert [line.split(":")[0] for line in str(refusal.value).splitlines()] == ["client a", "client c"]


def test_search_cannot_number_levels_beforehand(refused, tmp_path):
    path = budgets_file(tmp_path, [{"client": 0, "memory": 1}])
    (line,) = refused(
        "--search", "--client_budgets", path, "--gradient_checkpointing", "--checkpointing_levels", "1"
    )
    assert line.startswith("--search: makes levels of its own")


def test_an_assignment_that_cannot_be_written(refused, tmp_path):
    """Found before anything is planned: what nobody meets would be, too."""
    path, out = budgets_file(tmp_path, [{"client": 0, "memory": "1B"}]), tmp_path / "nowhere" / "out.yaml"
    (line,) = refused("--client_budgets", path, "--out", str(out))
    assert line.startswith(f"--out {out}: No such file or directory; expected a file in a folder that is")


def test_an_assignment_replaces_nothing_that_it_is_made_from(refused, plan, tmp_path):
    """Not even where an earlier plan wrote it."""
    path, out = budgets_file(tmp_path, [{"client": "a", "memory": 1}]), tmp_path / "out.yaml"
    plan("--client_budgets", path, "--out", str(out))
    first = out.read_text()
    (link := tmp_path / "link.yaml").symlink_to(out)
    for config, wanted in ((out, link), (link, out)):
        typed = ("--client_budgets", path, "--config", str(config), "--out", str(wanted))
        (line,) = refused(*typed)
        assert line == f"--out {wanted}: is what --config {config} reads; expected another name."
    (line,) = refused("--client_budgets", path, "--out", path)
    assert line == f"--out {path}: is what --client_budgets {path} reads; expected another name."
    assert out.read_text() == first


@pytest.mark.parametrize("in_file", [True, False])
def test_a_number_of_clients_that_budgets_do_not_have_is_refused(refused, plan, tmp_path, in_file):
    path = budgets_file(tmp_path, [{"client": name, "memory": 1} for name in "abc"])
    (config := tmp_path / "mine.yaml").write_text("num-clients: 7\n")
    typed = ("--config", str(config)) if in_file else ("--num_clients", "7")
    (line,) = refused("--client_budgets", path, *typed)
    where = f"{config}: num_clients" if in_file else "--num_clients"
    assert line == (
        f"{where}: got 7, but --client_budgets {path} names 3 clients; expected the same number; "
        "drop it, or mend the file."
    )
    assert len(plan("--client_budgets", path, *typed, "--num_clients", "3")["clients"]) == 3


def test_an_assignment_replaces_nothing_but_an_assignment(refused, plan, tmp_path):
    path, out = budgets_file(tmp_path, [{"client": 0, "memory": 1}]), tmp_path / "out.yaml"
    plan("--client_budgets", path, "--out", str(out))
    first = out.read_text()
    plan("--client_budgets", path, "--out", str(out), batch_size=2)
    assert first != out.read_text() and not list(tmp_path.glob(".*"))
    (mine := tmp_path / "mine.txt").write_text("mine")
    (line,) = refused("--client_budgets", path, "--out", str(mine))
    assert line == f"--out {mine}: a file that `scalefl plan` did not write; expected another name."
    assert mine.read_text() == "mine"
