"""Laws of a partition: disjoint, complete, patients whole, seeded, and never smaller than asked for."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalefl.contracts import SPLITS, Example, InputError
from scalefl.data.kneexray import load
from scalefl.data.partition import (
    PARTITIONERS,
    Clients,
    _largest_remainder,
    describe,
    partition,
    partition_held_out,
    split_patients,
)

NUM_SITES = 4


def knees(labels: Sequence[int | None], prefix: str = "p") -> list[Example]:
    """Two knees for each label: of that grade, and one lower where there is one. Left knees come first."""
    return [
        Example(
            image_key=f"{prefix}{number}{side}",
            patient=f"{prefix}{number}",
            site=f"site{number % NUM_SITES}",
            question="q",
            answer="a",
            label=None if label is None else max(0, label - (side == "R")),
        )
        for side in "LR"
        for number, label in enumerate(labels)
    ]


def deal(train: Sequence[Example], **changes: Any) -> Clients:
    options = {"num_clients": 4, "partitioner": "iid", "alpha": 1.0, "classes_per_client": 3}
    return partition(train, **{**options, "min_patients": 1, "seed": 0, **changes})


def check_laws(examples: Sequence[Example], clients: Clients) -> None:
    assert sorted(index for own in clients for index in own) == list(range(len(examples)))
    assert all(list(own) == sorted(own) for own in clients)
    client_of = {i: client for client, own in enumerate(clients) for i in own}
    by_patient: dict[str, set[int]] = {}
    for i, example in enumerate(examples):
        by_patient.setdefault(example.patient, set()).add(client_of[i])
    assert all(len(holders) == 1 for holders in by_patient.values())


def num_patients(examples: Sequence[Example], clients: Clients) -> list[int]:
    return [len({examples[i].patient for i in own}) for own in clients]


def refused(train: Sequence[Example], *parts: str, **changes: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError) as caught:
            deal(train, **changes)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    held_out_labels=st.lists(st.integers(0, 4), max_size=30),
    num_clients=st.integers(1, 8),
    partitioner=st.sampled_from(PARTITIONERS),
    alpha=st.floats(1e-3, 1e6),
    min_patients=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_a_partition_keeps_its_laws_or_is_refused(
    labels: list[int],
    held_out_labels: list[int],
    num_clients: int,
    partitioner: str,
    alpha: float,
    min_patients: int,
    seed: int,
) -> None:
    train, held_out = knees(labels), knees(held_out_labels, prefix="h")
    options: dict[str, Any] = {"partitioner": partitioner, "seed": seed}
    try:
        clients = deal(train, num_clients=num_clients, alpha=alpha, min_patients=min_patients, **options)
    except InputError:
        assume(False)
    assert len(clients) == num_clients
    check_laws(train, clients)
    assert min(num_patients(train, clients)) >= min_patients
    held = partition_held_out(held_out, train, clients, purpose="val", **options)
    assert len(held) == num_clients
    check_laws(held_out, held)


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_the_seed_decides(partitioner: str) -> None:
    train = knees([i % 5 for i in range(60)])
    options = {"partitioner": partitioner, "num_clients": 3}
    assert deal(train, seed=1, **options) == deal(train, seed=1, **options)
    assert len({deal(train, seed=seed, **options) for seed in range(5)}) > 1


@pytest.mark.parametrize("partitioner", ["iid", "natural", "size_skewed"])
def test_open_answers_are_dealt_without_labels(partitioner: str) -> None:
    train, held_out = knees([None] * 20), knees([None] * 7, prefix="h")
    clients = deal(train, partitioner=partitioner)
    check_laws(train, clients)
    held = partition_held_out(held_out, train, clients, partitioner=partitioner, seed=0, purpose="val")
    check_laws(held_out, held)


def test_iid_is_even_and_size_skewed_is_not() -> None:
    train = knees([i % 5 for i in range(200)])
    assert num_patients(train, deal(train)) == [50] * 4
    sizes = num_patients(train, deal(train, partitioner="size_skewed", alpha=0.5, min_patients=5))
    assert min(sizes) >= 5
    assert max(sizes) > 2 * min(sizes)


def label_spread(alpha: float) -> float:
    """Mean over clients of the variance of the shares of their labels."""
    train = knees([i % 5 for i in range(400)])
    counts = describe(train, deal(train, partitioner="dirichlet", alpha=alpha), answers="abcde")
    shares = [np.array(own.by_label) / own.examples for own in counts]
    return float(np.mean([share.var() for share in shares]))


def test_a_smaller_alpha_skews_labels_more() -> None:
    assert label_spread(0.1) > label_spread(1.0) > label_spread(100.0)


def test_pathological_clients_hold_so_many_patient_labels() -> None:
    train = knees([i % 5 for i in range(100)])
    clients = deal(train, partitioner="pathological", num_clients=5, classes_per_client=2)
    left_knees = [{train[i].label for i in own if train[i].image_key.endswith("L")} for own in clients]
    assert all(len(labels) == 2 for labels in left_knees)


def test_a_patient_counts_with_the_higher_grade() -> None:
    """Patients of grades (4, 3) and (1, 0) only: labels 4 and 1, so one label each for two clients."""
    train = knees([4, 1] * 10)
    clients = deal(train, partitioner="pathological", num_clients=2, classes_per_client=1)
    held = {frozenset(train[i].label for i in own) for own in clients}
    assert held == {frozenset({4, 3}), frozenset({1, 0})}


@pytest.mark.parametrize(("num_clients", "sites_each"), [(4, [1, 1, 1, 1]), (3, [1, 1, 2]), (1, [4])])
def test_natural_clients_are_whole_sites(num_clients: int, sites_each: list[int]) -> None:
    train, held_out = knees([0] * 20), knees([0] * 8, prefix="h")
    clients = deal(train, partitioner="natural", num_clients=num_clients)
    sites = [{train[i].site for i in own} for own in clients]
    assert sorted(map(len, sites)) == sites_each
    assert sum(map(len, sites)) == NUM_SITES
    held = partition_held_out(held_out, train, clients, partitioner="natural", seed=0, purpose="val")
    assert [{held_out[i].site for i in own} for own in held] == sites


@settings(deadline=None, max_examples=50)
@given(
    total=st.integers(0, 500),
    weights=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_largest_remainder_sums_up_and_stays_within_one_of_proportional(
    total: int, weights: list[int], seed: int
) -> None:
    assume(sum(weights) > 0)
    counts = _largest_remainder(total, weights, np.random.default_rng(seed))
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1
        assert weight or not count


def test_held_out_labels_follow_the_clients_training_labels() -> None:
    """Clients with 30, 10 and 0 patients of label 2 get 6, 2 and 0 of 8; an unseen label goes by size."""
    train = knees([2] * 40 + [0] * 40)
    sizes = (range(30), range(30, 40), range(40, 80))
    clients = tuple(tuple(sorted([*own, *(i + 80 for i in own)])) for own in sizes)
    held_out = knees([2] * 8 + [4] * 8, prefix="h")
    held = partition_held_out(held_out, train, clients, partitioner="dirichlet", seed=0, purpose="val")
    labels = [[held_out[i].label for i in own if held_out[i].image_key.endswith("L")] for own in held]
    assert [own.count(2) for own in labels] == [6, 2, 0]
    assert [own.count(4) for own in labels] == [3, 1, 4]


def test_validation_and_test_are_drawn_apart_and_may_be_empty() -> None:
    train, held_out = knees([i % 5 for i in range(50)]), knees([i % 5 for i in range(40)], prefix="h")
    clients = deal(train)
    val, test = (
        partition_held_out(held_out, train, clients, partitioner="iid", seed=0, purpose=purpose)
        for purpose in ("val", "test")
    )
    assert val != test
    assert partition_held_out([], train, clients, partitioner="iid", seed=0, purpose="val") == ((),) * 4


def test_describe_counts_patients_examples_and_labels() -> None:
    train = knees([2, 0])
    counts = describe(train, ((0, 2), (1, 3)), answers=("a", "b", "c"))
    assert [(own.client, own.patients, own.examples, own.by_label) for own in counts] == [
        (0, 1, 2, (0, 1, 1)),
        (1, 1, 2, (2, 0, 0)),
    ]
    assert describe(train, ((0,),), answers=None)[0].by_label == ()


def test_what_cannot_be_dealt_is_refused_with_numbers() -> None:
    train = knees([i % 5 for i in range(20)])
    refused(train, "need 21", "got 20", "at most 20", num_clients=21)
    refused(train, "of 6 or more", "need 24", "at most 3", min_patients=6)
    refused(train, "--num_clients: got 0", num_clients=0)
    refused(train, "--min_patients: got 0", min_patients=0)
    refused(train, "unknown name 'fair'", "size_skewed", partitioner="fair")
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        for partitioner in ("dirichlet", "size_skewed"):
            refused(train, f"--alpha: got {alpha}", partitioner=partitioner, alpha=alpha)
    refused(
        train,
        "cannot deal 20 patients to 18",
        "a larger --alpha",
        partitioner="dirichlet",
        num_clients=18,
        alpha=0.01,
    )
    refused(
        train,
        "8 of 20 patients",
        "raise --num_clients",
        partitioner="pathological",
        num_clients=2,
        classes_per_client=2,
    )
    refused(
        train, "cannot deal", "another --classes_per_client", partitioner="pathological", classes_per_client=6
    )
    refused(train, "5 clients but 4 sites", partitioner="natural", num_clients=5)
    refused(train, "gets 5 patients", "expected 6", partitioner="natural", num_clients=3, min_patients=6)


def test_partitions_by_label_are_refused_for_open_answers() -> None:
    for partitioner in ("dirichlet", "pathological"):
        refused(knees([None] * 20), "answers", "iid, natural or size_skewed", partitioner=partitioner)


def test_named_clients_are_the_sites_of_their_names() -> None:
    train = knees([n % 5 for n in range(24)])
    names = ["site2", "site0", "site3", "site1"]
    clients = deal(train, partitioner="natural", client_names=names)
    check_laws(train, clients)
    assert [{train[i].site for i in own} for own in clients] == [{name} for name in names]


def test_names_that_are_not_those_of_the_sites() -> None:
    names = ["site2", "site0", "clinic", "site1"]
    refused(
        knees([0] * 8),
        "--client_names: no training data of clinic; no client for site3; ",
        "each site of the training data once: site0, site1, site2, site3.",
        partitioner="natural",
        client_names=names,
    )


def test_natural_needs_a_site_for_every_patient() -> None:
    train = [Example(image_key=str(i), patient=str(i), question="q", answer="a", label=0) for i in range(8)]
    refused(train, "8 of 8 training patients have no site", partitioner="natural")


def test_dirichlet_redraws_in_silence() -> None:
    train = knees([i % 5 for i in range(40)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(5):
            check_laws(train, deal(train, partitioner="dirichlet", alpha=0.5, min_patients=3, seed=seed))


@given(st.sets(st.text(min_size=1, max_size=5), min_size=3, max_size=60), st.integers(0, 100))
def test_every_patient_gets_one_split_and_every_split_a_patient(patients: set[str], seed: int) -> None:
    drawn = split_patients(sorted(patients), seed)
    assert drawn == split_patients(sorted(patients, reverse=True), seed)
    assert set(drawn) == patients
    sizes = [list(drawn.values()).count(split) for split in SPLITS]
    expected = max(1, round(0.15 * len(patients)))
    assert sizes == [len(patients) - 2 * expected, expected, expected]


def test_the_real_radiographs_are_dealt_by_patient(kneexray_root: Any, knee_run: Callable[..., Any]) -> None:
    data = load(knee_run(data_root=kneexray_root))
    train = data.splits["train"]
    clients = deal(train, partitioner="dirichlet", num_clients=8, alpha=0.5, min_patients=5)
    check_laws(train, clients)
    held = partition_held_out(
        data.splits["val"], train, clients, partitioner="dirichlet", seed=0, purpose="val"
    )
    check_laws(data.splits["val"], held)
