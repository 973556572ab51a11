"""Laws of levels: what a ratio keeps, where exits sit, and which client is of which level."""

import math
from collections import Counter
from fractions import Fraction

import pytest
from builders import build_store, model_file, processor
from hypothesis import given
from hypothesis import strategies as st

from scalefl.contracts import Axis, InputError, LevelSpec
from scalefl.levels import assign_levels, exit_layers, level_specs
from scalefl.models.minigptv2 import FAMILY


def specs(axes: dict[str, Axis], *ratios: float, width_axes: str = "all") -> tuple[LevelSpec, ...]:
    return level_specs(axes, ratios, [1] * len(ratios), width_axes, num_exits=1)


def test_kept_units_round_down_but_not_by_a_hair() -> None:
    """0.55 * 20 is 11.000000000000002 and 0.29 * 100 is 28.999999999999996 in binary."""
    axes = {"ffn": Axis(size=20, cut_by="inner"), "embed": Axis(size=100, cut_by="all")}
    (spec,) = specs(axes, 0.55)
    assert spec.kept == {"ffn": 11, "embed": 55}
    assert specs(axes, 0.29)[0].kept == {"ffn": 5, "embed": 29}


@given(st.integers(1, 100), st.integers(1, 400))
def test_kept_is_the_exact_floor_of_a_decimal_ratio(percent: int, size: int) -> None:
    exact = math.floor(Fraction(percent, 100) * size)
    axes = {"ffn": Axis(size=size, cut_by="inner", seen_in="mlp")}
    if exact:
        assert specs(axes, percent / 100)[0].kept == {"ffn": exact}
    else:
        with pytest.raises(InputError, match=f"keeps 0 of {size} ffn in mlp"):
            specs(axes, percent / 100)


def test_width_axes_choose_what_is_cut() -> None:
    axes = FAMILY.axes(FAMILY.config(model_file(), processor()), cut_vision=True)
    inner, everything = (set(specs(axes, 0.5, width_axes=choice)[0].kept) for choice in ("inner", "all"))
    assert inner == {"heads", "kv_heads", "ffn", "vision_ffn"}
    assert everything == inner | {"embed", "vision_heads", "vision_embed"}
    frozen = FAMILY.axes(FAMILY.config(model_file(), processor()), cut_vision=False)
    assert set(specs(frozen, 0.5)[0].kept) == {"heads", "kv_heads", "ffn", "embed"}


@pytest.mark.parametrize(
    ("ratio", "kv_heads", "heads"), [(0.5, 1, 2), (0.75, 1, 2), (0.99, 1, 2), (1.0, 2, 4)]
)
def test_groups_of_heads_stay_whole(ratio: float, kv_heads: int, heads: int) -> None:
    axes = FAMILY.axes(FAMILY.config(model_file(kv_heads=2), processor()), cut_vision=True)
    kept = specs(axes, ratio, width_axes="inner")[0].kept
    assert (kept["kv_heads"], kept["heads"]) == (kv_heads, heads)


def test_a_ratio_that_keeps_no_head_names_the_parameter_and_one_that_fits() -> None:
    axes = FAMILY.axes(FAMILY.config(model_file(), processor()), cut_vision=True)
    with pytest.raises(InputError) as caught:
        level_specs(axes, (0.5, 0.1), (1, 1), "inner", num_exits=1)
    assert str(caught.value) == (
        "level 2: width ratio 0.1 keeps 0 of 4 kv_heads in language_model.model.layers.0.self_attn.k_proj; "
        "the smallest ratio that keeps one is 0.25."
    )
    build_store(vertical_scale_ratios=(0.25, 0.5, 1.0))


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_the_ratio_an_error_gives_works(heads: int, ffn: int) -> None:
    """It is the smallest of 4 decimals for every axis at once: following it once is enough."""
    axes = {
        "heads": Axis(size=heads, cut_by="inner", seen_in="q_proj"),
        "ffn": Axis(size=ffn, cut_by="inner", seen_in="mlp"),
    }
    ratio = 1e-5
    with pytest.raises(InputError) as caught:
        specs(axes, ratio)
    ratio = float(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    assert min(specs(axes, ratio)[0].kept.values()) >= 1
    with pytest.raises(InputError):
        specs(axes, ratio - 1e-4)


@pytest.mark.parametrize("depth", [0, 4])
def test_a_depth_without_an_exit_is_refused(depth: int) -> None:
    with pytest.raises(InputError, match=rf"level 1: --horizontal_scale_ratios asks for {depth} .*1 to 3"):
        level_specs({}, (1.0,), (depth,), "inner", num_exits=3)


def test_the_last_layer_is_always_an_exit() -> None:
    assert exit_layers((), 4) == (4,)
    assert exit_layers((1, 3), 4) == (1, 3, 4)


@pytest.mark.parametrize("ee_locs", [(2, 1), (1, 1), (0,), (4,), (1, 5), (-1,)])
def test_exits_rise_and_end_before_the_last_layer(ee_locs: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected rising layer numbers from 1 to 3"):
        exit_layers(ee_locs, 4)


SHARES = st.lists(st.integers(0, 10), min_size=1, max_size=5).filter(any)


@given(st.integers(1, 60), SHARES, st.integers(0, 9))
def test_every_client_has_exactly_one_level_by_largest_remainder(
    clients: int, shares: list[int], seed: int
) -> None:
    """Reference defect 2: no client is left over. Exact arithmetic; ties go to the weaker level."""
    levels = assign_levels(clients, [share / sum(shares) for share in shares], seed)
    assert len(levels) == clients
    quotas = [Fraction(clients * share, sum(shares)) for share in shares]
    counts = [math.floor(quota) for quota in quotas]
    left = clients - sum(counts)
    received = Counter(levels)
    assert set(received) <= set(range(1, len(shares) + 1))
    assert all(received[i + 1] - counts[i] in (0, 1) for i in range(len(shares)))
    got = [quotas[i] - counts[i] for i in range(len(shares)) if received[i + 1] > counts[i]]
    missed = [quotas[i] - counts[i] for i in range(len(shares)) if received[i + 1] == counts[i]]
    assert len(got) == left
    assert not got or not missed or min(got) >= max(missed)


def test_the_assignment_is_seeded_and_shuffled() -> None:
    shares = (0.25, 0.25, 0.25, 0.25)
    assert assign_levels(40, shares, 3) == assign_levels(40, shares, 3)
    assert assign_levels(40, shares, 3) != assign_levels(40, shares, 4)
    assert assign_levels(40, shares, 3) != tuple(sorted(assign_levels(40, shares, 3)))


def test_a_level_may_be_without_clients() -> None:
    assert Counter(assign_levels(6, (0.5, 0.0, 0.5), 0)) == {1: 3, 3: 3}
    assert set(assign_levels(2, (0.1, 0.1, 0.8), 0)) == {3}
