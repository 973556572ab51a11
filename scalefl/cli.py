"""The `scalefl` command: parse, build, run, and turn what a user can mend into one line and an exit code."""

import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from scalefl.config.commands import ONE_PROCESS
from scalefl.config.flags import Command, parse
from scalefl.config.modelfile import ModelFile
from scalefl.config.options import RunConfig
from scalefl.config.resolve import resolve
from scalefl.contracts import InputError, Interrupted, Unfinished
from scalefl.federation.job import JOB_ENDS

EXIT_BAD_INPUT = 2
EXIT_SIGNAL = 128
"""Plus the number of the signal."""
EXIT_CTRL_C = 130

COMMANDS_OF_THEIR_OWN = {
    "client": "scalefl.federation.worker:work",
    "convert": "scalefl.conversion.command:convert",
    "export": "scalefl.export.command:export",
    "predict": "scalefl.prediction.command:predict",
    "serve": "scalefl.serving.command:serve",
}
"""Command without a run -> the function that takes its options. Imported late: torch takes seconds."""

COMMANDS_ON_DATA = {
    "calibrate": "scalefl.prediction.calibrate:calibrate",
    "reorder": "scalefl.reordering.command:reorder",
}
"""Command with a model and a run's data -> the function that takes the run's options and its own."""

NEXT_STEPS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or write into another folder."),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "mend the permissions, or write into another folder."
    ),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST), "give another path."
    ),
}
"""Errors of the operating system that a user can mend -> how."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 128 + signal for a stop."""
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        _log_to_stderr()
        _check_processes(command.name)
        if command.name in COMMANDS_OF_THEIR_OWN:
            return _stoppable(
                lambda: _do_alone(command),
                JOB_ENDS if command.name == "client" else "start again",
            )
        run, model_file = resolve(command.flags, *command.config_files, command=command.name)
        return _stoppable(
            lambda: _do(command, run, model_file), f"go on with `scalefl train --resume {run.save_path}`"
        )
    except InputError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno not in NEXT_STEPS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{place}{error.strerror}; {NEXT_STEPS[error.errno]}")
    except KeyboardInterrupt:
        return EXIT_CTRL_C


def _check_processes(command: str) -> None:
    if command in ONE_PROCESS and (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise InputError(
            f"{command}: got {processes} processes; it runs as one: start it without a launcher."
        )


def _do_alone(command: Command) -> None:
    """What needs no run; `client` and `serve` meet signals themselves."""
    with contextlib.nullcontext() if command.name in ("client", "serve") else _ended_by_a_signal():
        _function(COMMANDS_OF_THEIR_OWN[command.name])(command.own)


def _do(command: Command, run: RunConfig, model_file: ModelFile) -> None:
    """Imported late: torch and transformers take seconds, and a typing error should not wait for them."""
    if command.name == "plan":
        from scalefl.planning.command import plan

        if _speaks():  # once under `accelerate launch`
            plan(run, model_file, command)
    elif command.name in COMMANDS_ON_DATA:
        with _ended_by_a_signal():
            _function(COMMANDS_ON_DATA[command.name])(run, command.own)
    else:
        from scalefl.federation.run import train

        with _ended_by_a_signal():
            train(run, model_file)


def _function(place: str) -> Callable[..., None]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _stoppable(work: Callable[[], None], next_step: str) -> int:
    """The exit code of work that may stop before its end, and says then what to do."""
    try:
        work()
    except Interrupted as stop:
        if _speaks():
            print(f"scalefl: {stop}; {next_step}.", file=sys.stderr)
        return EXIT_SIGNAL + stop.signum
    except Unfinished as stop:
        from scalefl.engine.watchdog import EXIT_UNFINISHED, speaks_of, unfinished

        if speaks_of(stop):
            print(unfinished(str(stop), next_step), file=sys.stderr)
        return EXIT_UNFINISHED
    return 0


@contextlib.contextmanager
def _ended_by_a_signal() -> Iterator[None]:
    """A signal outside of training ends the command and says so; a round loop stops at a step itself."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        if _speaks():
            print("scalefl: stopped outside of training; nothing is lost, start again.", file=sys.stderr)
        sys.exit(EXIT_SIGNAL + signum)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _speaks() -> bool:
    """Only the first process of a launch does."""
    return os.environ.get("RANK", "0") == "0"


def _log_to_stderr() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that a CPU lacks
    logger = logging.getLogger("scalefl")
    level = logging.DEBUG if os.environ.get("SCALEFL_DEBUG") else logging.INFO
    logger.setLevel(level if _speaks() else logging.ERROR)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())


def _refuse(problems: str) -> int:
    if _speaks():
        for line in problems.splitlines():
            print(f"scalefl: {line}", file=sys.stderr)
    return EXIT_BAD_INPUT
