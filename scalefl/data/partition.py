"""Patients -> splits and clients. The unit is the patient: both knees always stay together."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalefl.contracts import SPLITS, Example, InputError
from scalefl.seeding import derive, numpy_rng

PARTITIONERS = ("dirichlet", "iid", "pathological", "natural", "size_skewed")
NEEDS_LABELS = ("dirichlet", "pathological")
NEEDS_ALPHA = ("dirichlet", "size_skewed")
MAX_ALPHA = 1e6
"""Beyond, a Dirichlet draw is even to six digits and its arithmetic overflows in the end."""

Clients = tuple[tuple[int, ...], ...]
"""Per client, the sorted indices of its examples."""


@dataclass(frozen=True, kw_only=True)
class _Patient:
    """One row for the partitioners."""

    examples: tuple[int, ...]
    label: int | None
    """The highest of the patient's labels; None where the answers are open."""
    site: str | None


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What `partition` was asked for."""

    num_clients: int
    partitioner: str
    alpha: float
    classes_per_client: int
    min_patients: int
    seed: int
    client_names: Sequence[str]

    @property
    def remedy(self) -> str:
        specific = {"dirichlet": ", a larger --alpha", "pathological": ", another --classes_per_client"}
        return "try fewer --num_clients, another --seed" + specific.get(self.partitioner, "")


@dataclass(frozen=True, kw_only=True)
class ClientCounts:
    """What one client holds."""

    client: int
    patients: int
    examples: int
    by_label: tuple[int, ...]
    """Examples per answer, in the order of the labels; empty where the answers are open."""


def split_patients(patients: Sequence[str], seed: int) -> dict[str, str]:
    """Patient -> split, about 70/15/15, the same for any order of `patients`.

    Validation and test get one patient at least, so that three patients fill all splits.
    """
    names = sorted(set(patients))
    num_held_out = max(1, round(0.15 * len(names)))
    sizes = (max(0, len(names) - 2 * num_held_out), num_held_out, num_held_out)
    of_position = [split for split, size in zip(SPLITS, sizes, strict=True) for _ in range(size)]
    order = numpy_rng(seed, "split").permutation(len(names))
    return {names[i]: split for i, split in zip(order, of_position, strict=False)}


def partition(
    train: Sequence[Example],
    *,
    num_clients: int,
    partitioner: str,
    alpha: float,
    classes_per_client: int,
    min_patients: int,
    seed: int,
    client_names: Sequence[str] = (),
) -> Clients:
    """Deal the training patients to clients, disjointly and completely, `min_patients` or more to each.

    dirichlet: label proportions drawn per client with concentration `alpha`.
    pathological: client i holds `classes_per_client` neighbouring labels, beginning with label i.
    size_skewed: after `min_patients` each, the rest in shares drawn from Dirichlet(alpha), labels at random.
    natural: by site; client i is the site `client_names[i]`. Without names it is drawn from the seed, as is
    which sites go together on one client.
    Raises InputError where the request and the data do not fit.
    """
    request = _Request(
        num_clients=num_clients,
        partitioner=partitioner,
        alpha=alpha,
        classes_per_client=classes_per_client,
        min_patients=min_patients,
        seed=seed,
        client_names=client_names,
    )
    patients = _patients(train)
    _check_request(request, patients)
    # The partitioners cut runs of rows: an unshuffled table would be dealt out by name.
    numpy_rng(seed, "partition/order").shuffle(patients)
    if partitioner == "natural":
        column = _group_sites(patients, request)
    else:
        column = [patient.label or 0 for patient in patients]
    rows_per_client = _deal_rows(request, column)
    _check_dealt(request, rows_per_client, len(patients))
    return tuple(_examples_of(patients[row] for row in rows) for rows in rows_per_client)


def partition_held_out(
    held_out: Sequence[Example],
    train: Sequence[Example],
    clients: Clients,
    *,
    partitioner: str,
    seed: int,
    purpose: str,
) -> Clients:
    """Give each client held-out patients by the rule that dealt the training patients; some may get none.

    natural: the site's client. Otherwise, and for a site not seen in training: the held-out patients of one
    label are dealt out in the proportions in which the clients hold that label's training patients (largest
    remainder, ties drawn), or in those of all training patients where none has the label.
    """
    rng = numpy_rng(seed, f"partition/{purpose}")
    held_per_client = [_patients(train, indices) for indices in clients]
    client_of_site = {p.site: client for client, held in enumerate(held_per_client) for p in held}
    dealt: list[list[_Patient]] = [[] for _ in clients]
    by_label: dict[int | None, list[_Patient]] = defaultdict(list)
    for patient in _patients(held_out):
        if partitioner == "natural" and patient.site in client_of_site:
            dealt[client_of_site[patient.site]].append(patient)
        else:
            by_label[patient.label].append(patient)
    for label, group in by_label.items():
        weights = [sum(p.label == label for p in held) for held in held_per_client]
        if not any(weights):
            weights = [len(held) for held in held_per_client]
        rng.shuffle(group)
        bounds = np.cumsum(_largest_remainder(len(group), weights, rng))
        for client, stop in enumerate(bounds):
            dealt[client] += group[bounds[client - 1] if client else 0 : stop]
    return tuple(_examples_of(held) for held in dealt)


def describe(
    examples: Sequence[Example], clients: Clients, answers: Sequence[str] | None
) -> tuple[ClientCounts, ...]:
    """Count what each client holds, for the table at the start of a run."""

    def count(client: int, indices: tuple[int, ...]) -> ClientCounts:
        labels = Counter(examples[i].label for i in indices)
        return ClientCounts(
            client=client,
            patients=len({examples[i].patient for i in indices}),
            examples=len(indices),
            by_label=tuple(labels[label] for label in range(len(answers or ()))),
        )

    return tuple(count(client, indices) for client, indices in enumerate(clients))


def _patients(examples: Sequence[Example], indices: Sequence[int] | None = None) -> list[_Patient]:
    """One row per patient, in order of first appearance. A patient seen at two sites counts at the first."""
    examples_of: dict[str, list[int]] = defaultdict(list)
    for index in range(len(examples)) if indices is None else indices:
        examples_of[examples[index].patient].append(index)
    return [
        _Patient(
            examples=tuple(own),
            label=max((label for i in own if (label := examples[i].label) is not None), default=None),
            site=examples[own[0]].site,
        )
        for own in examples_of.values()
    ]


def _examples_of(patients: Any) -> tuple[int, ...]:
    return tuple(sorted(index for patient in patients for index in patient.examples))


def _check_request(request: _Request, patients: list[_Patient]) -> None:
    if request.partitioner not in PARTITIONERS:
        raise InputError(
            f"--partitioner: unknown name '{request.partitioner}'; expected one of {', '.join(PARTITIONERS)}."
        )
    for name in ("num_clients", "min_patients"):
        if getattr(request, name) < 1:
            raise InputError(f"--{name}: got {getattr(request, name)}; expected 1 or more.")
    if request.num_clients * request.min_patients > len(patients):
        raise InputError(
            f"--num_clients: {request.num_clients} of {request.min_patients} or more (--min_patients) "
            f"need {request.num_clients * request.min_patients} training patients, got {len(patients)}; "
            f"ask for at most {len(patients) // request.min_patients} clients."
        )
    if request.partitioner in NEEDS_ALPHA and not 0 < request.alpha <= MAX_ALPHA:
        raise InputError(
            f"--alpha: got {request.alpha}; expected a number above 0, at most {MAX_ALPHA:g}; try 0.5."
        )
    if request.partitioner in NEEDS_LABELS and any(patient.label is None for patient in patients):
        raise InputError(
            f"--partitioner {request.partitioner}: deals by label, but the answers are open; "
            f"use iid, natural or size_skewed."
        )


def _group_sites(patients: list[_Patient], request: _Request) -> list[int]:
    """The client of each patient: every site whole, about equally many sites per client."""
    without_site = sum(patient.site is None for patient in patients)
    if without_site:
        raise InputError(
            f"--partitioner natural: {without_site} of {len(patients)} training patients have no site; "
            f"supply a 'site' for every image or use another partitioner."
        )
    sites = sorted({patient.site for patient in patients if patient.site is not None})
    if request.client_names:
        _check_names(sites, request.client_names)
        client_of_site = {site: client for client, site in enumerate(request.client_names)}
    elif request.num_clients > len(sites):
        raise InputError(
            f"--partitioner natural: {request.num_clients} clients but {len(sites)} sites in the training "
            f"data; ask for at most {len(sites)} clients."
        )
    else:
        numpy_rng(request.seed, "partition/sites").shuffle(sites)
        groups = np.array_split(np.arange(len(sites)), request.num_clients)
        client_of_site = {sites[i]: client for client, group in enumerate(groups) for i in group}
    return [client_of_site[patient.site] for patient in patients if patient.site is not None]


def _check_names(sites: Sequence[str], names: Sequence[str]) -> None:
    """Raise InputError unless the names are those of the sites."""
    problems = [
        f"{kind} {', '.join(sorted(found))}"
        for kind, found in (
            ("no training data of", set(names) - set(sites)),
            ("no client for", set(sites) - set(names)),
        )
        if found
    ]
    if problems:
        raise InputError(
            f"--client_names: {'; '.join(problems)}; under --partitioner natural expected each site of the "
            f"training data once: {', '.join(sites)}."
        )


def _skewed_sizes(request: _Request, num_patients: int) -> list[int]:
    rng = numpy_rng(request.seed, "partition/sizes")
    shares = rng.dirichlet([request.alpha] * request.num_clients)
    rest = num_patients - request.num_clients * request.min_patients
    return [request.min_patients + extra for extra in _largest_remainder(rest, shares, rng)]


def _largest_remainder(
    total: int, weights: Sequence[float] | np.ndarray, rng: np.random.Generator
) -> list[int]:
    """Whole numbers that sum to `total`, as near as can be to proportional; equal remainders are drawn."""
    quotas = np.asarray(weights, dtype=np.float64) * total / np.sum(weights)
    counts = np.floor(quotas + 1e-9).astype(int)
    tie_breakers = rng.permutation(len(counts))
    by_remainder = np.lexsort((tie_breakers, np.round(counts - quotas, 9)))
    counts[by_remainder[: total - counts.sum()]] += 1
    return [int(count) for count in counts]


def _flwr_partitioner(request: _Request, num_patients: int) -> Any:
    import flwr_datasets.partitioner as flwr  # takes 1.7 s: only runs that partition pay for it

    num_clients, flwr_seed = request.num_clients, derive(request.seed, "partition") % 2**32
    build: dict[str, Callable[[], Any]] = {
        "iid": lambda: flwr.IidPartitioner(num_clients),
        "size_skewed": lambda: flwr.SizePartitioner(_skewed_sizes(request, num_patients)),
        # NaturalIdPartitioner does what a group size of 1 does, behind a progress bar.
        "natural": lambda: flwr.GroupedNaturalIdPartitioner("column", group_size=1, sort_unique_ids=True),
        "dirichlet": lambda: flwr.DirichletPartitioner(
            num_clients,
            "column",
            alpha=float(request.alpha),
            min_partition_size=request.min_patients,
            seed=flwr_seed,
        ),
        # The random modes may leave out a label, and with it its patients.
        "pathological": lambda: flwr.PathologicalPartitioner(
            num_clients,
            "column",
            num_classes_per_partition=request.classes_per_client,
            class_assignment_mode="deterministic",
            seed=flwr_seed,
        ),
    }
    return build[request.partitioner]()


def _deal_rows(request: _Request, column: list[int]) -> list[list[int]]:
    """Rows per client. `column` is what decides: the label, or the client of the patient's site."""
    from datasets import Dataset  # slow to import, as flwr_datasets is

    dealer = _flwr_partitioner(request, len(column))
    dealer.dataset = Dataset.from_dict({"row": range(len(column)), "column": column})
    try:
        with warnings.catch_warnings():
            # A paragraph for each failed draw; whatever stays unmet is raised below.
            warnings.filterwarnings("ignore", message="The specified min_partition_size")
            warnings.filterwarnings("ignore", message="Classes: .* will NOT be used")
            return [list(dealer.load_partition(client)["row"]) for client in range(request.num_clients)]
    except ValueError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"--partitioner {request.partitioner}: cannot deal {len(column)} patients to "
            f"{request.num_clients} clients of {request.min_patients} or more ({reason}); {request.remedy}."
        ) from error


def _check_dealt(request: _Request, rows_per_client: list[list[int]], num_patients: int) -> None:
    where = f"--partitioner {request.partitioner}"
    num_left = num_patients - sum(map(len, rows_per_client))
    if num_left:
        raise InputError(
            f"{where}: {num_left} of {num_patients} patients have a label that none of "
            f"{request.num_clients} clients takes; "
            f"raise --num_clients or --classes_per_client {request.classes_per_client}."
        )
    fewest, client = min((len(rows), client) for client, rows in enumerate(rows_per_client))
    if fewest < request.min_patients:
        raise InputError(
            f"{where}: client {client} gets {fewest} patients; expected {request.min_patients} or more "
            f"(--min_patients); {request.remedy}."
        )
