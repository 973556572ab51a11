"""Options of `scalefl client` alone: all else is in its tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from scalefl.config.values import coerce
from scalefl.contracts import InputError


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """Which tasks to train, and what this machine has of its own."""

    task: tuple[str, ...] = ()
    """Task files of one level and round, trained in this order."""
    out: str | None = None
    """Where to answer one task: a file .json, beside which the tensors go. Unset: beside the task."""
    data_root: str | None = None
    """Train on all training examples in this folder, the client's own. Unset: the run's, as the task says."""
    init_from: str | None = None
    """Folder of the frozen base on this machine. Unset: where the run has it."""
    save_path: str | None = None
    """Folder for what is made here of base and images. Unset: the run's if it is here, else the task's."""
    use_gpu: bool | None = None
    """Run on a GPU, or not. Unset: as the run says."""


CLIENT_KINDS: Mapping[str, Any] = get_type_hints(ClientOptions)
"""Option -> its type."""


def read_client_options(raw: Mapping[str, Any]) -> ClientOptions:
    """The options as typed. Raises InputError with one line per problem."""
    values, problems = {}, []
    for name, value in raw.items():
        try:
            values[name] = coerce(value, CLIENT_KINDS[name], f"--{name}")
        except InputError as error:
            problems.append(str(error))
    options = ClientOptions(**values)
    if not options.task and not problems:
        problems.append("--task: nothing given; expected the task files of a run with --executor jobs.")
    if options.out is not None and (len(options.task) != 1 or not options.out.endswith(".json")):
        problems.append(
            f"--out: got {options.out} for {len(options.task)} task(s); expected a file .json, and one task."
        )
    if problems:
        raise InputError("\n".join(problems))
    return options
