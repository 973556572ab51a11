"""The launch a run finds itself in: its processes, their devices, and what they tell each other."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn

from scalefl.config.derived import trains_here, uses_gpu
from scalefl.config.options import RunConfig
from scalefl.contracts import InputError, Interrupted, State, Unfinished
from scalefl.engine.board import Board
from scalefl.engine.checks import asks_for_deepspeed, check_environment, check_launch, check_trackers
from scalefl.engine.optimizers import check_optimizer
from scalefl.engine.session import OneProcess, Session, hide_frozen
from scalefl.engine.watchdog import Watchdog, to_resume

KIB = 1024

MEETING_SECONDS = 10.0
"""From a signal that ends the launch to the end of the wait for ranks that do not come."""

LOOK_SECONDS = 0.25
"""Between two looks at what other ranks say, of a rank that trains a client of its own."""

PROCESS_TIMEOUT = timedelta(days=7)
"""How long a process waits for the others in a collective: longer than any round. The watchdog sees sooner
that rank 0 is gone, and a launcher that a process of its machine is.
"""

OF_A_LOST_RANK = ("onnection closed by peer", "onnection reset by peer", "remote process exited")
"""In errors of gloo and NCCL."""

PATIENCE_SECONDS = 30.0
"""From one rank's failed client to the other ranks' word on it: if they hang, they wait for that rank."""


class Engine:
    """One process, or one of several under DDP or DeepSpeed's ZeRO."""

    def __init__(self, run: RunConfig, next_step: str | None = None) -> None:
        """`next_step` is what to do when the process has to be ended; unset: resume the run."""
        use_gpu = uses_gpu(run, torch.cuda.is_available())
        if use_gpu and not torch.cuda.is_available():
            raise InputError(
                "--use_gpu: no CUDA GPU was found; leave the flag out (or --use_gpu 0) to run on the CPU, "
                "or check the driver and that torch was installed with CUDA."
            )
        check_environment()
        check_trackers(run.report_to)
        if Engine._watchdog is not None:
            Engine._watchdog.stop()
        # Before others are waited for: their launcher may be gone by then.
        self.watchdog = Engine._watchdog = Watchdog(run.client_timeout, next_step or to_resume(run.save_path))
        self._zero = _deepspeed(use_gpu)
        arguments: dict[str, Any] = {
            "cpu": not use_gpu,
            "mixed_precision": "bf16" if run.precision == "bf16" else "no",
            "kwargs_handlers": [InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        }
        if self._zero is not None:
            arguments = self._zero.accelerator_arguments(run, use_gpu, PROCESS_TIMEOUT)
        self._accelerator = Accelerator(
            **arguments, log_with=list(run.report_to) or None, project_dir=run.save_path
        )
        check_launch(self._accelerator, self._zero is not None, arguments["mixed_precision"], run.precision)
        if trains_here(run):
            offloaded = self._zero is not None and self._zero.offloads(self._accelerator, "optimizer")
            check_optimizer(run, self.device, offloaded=offloaded)
        if self.num_processes > 1 and not use_gpu and "OMP_NUM_THREADS" not in os.environ:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.num_processes))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
        on_gpus = self.num_processes > 1 and self.device.type == "cuda"
        self._host_group = (
            torch.distributed.new_group(backend="gloo", timeout=PROCESS_TIMEOUT) if on_gpus else None
        )
        self._autocast_dtype = torch.bfloat16 if run.precision == "bf16" else None
        self.board = self._open_board()
        if self.board is not None:
            self.watchdog.listen(self.board)

    _board: ClassVar[Board | None] = None
    _watchdog: ClassVar[Watchdog | None] = None
    """A process has one of each: the board stays open for other ranks when another engine follows."""

    def _open_board(self) -> Board | None:
        if self.num_processes == 1:
            return None
        if Engine._board is None:
            board = Board(0, self.num_processes) if self.is_main else None
            ports = gather_object([board.port if board is not None else 0])
            Engine._board = board or Board(self.rank, self.num_processes, ports[0])
        return Engine._board

    @property
    def launch(self) -> str:
        """How clients are trained, in words."""
        if self._zero is not None:
            return self._zero.in_words(self._accelerator)
        return "DDP" if self.num_processes > 1 else "plain PyTorch"

    def peak_memory(self) -> int:
        """Most bytes so far: of tensors on the GPU, or of this process on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _peak_of_this_process()

    @property
    def shards_weights(self) -> bool:
        """Whether weights are spread over the processes (ZeRO-3)."""
        return self._zero is not None and self._zero.stage(self._accelerator) == 3

    def place(self, parameter: nn.Parameter) -> None:
        """What becomes of a parameter as soon as it is read: ZeRO-3 spreads it over the ranks."""
        if self.shards_weights:
            self._zero.shard(self._accelerator, parameter)

    def session(self, model: nn.Module, run: RunConfig) -> Session:
        if not self.shards_weights:
            hide_frozen(model)
        return (Session if self._zero is None else self._zero.ZeroSession)(self._accelerator, model, run)

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Within, a sub-model without an optimizer can run; under ZeRO-3 all ranks run it equally often."""
        if self.shards_weights:
            self._accelerator.prepare(model)
        try:
            yield
        finally:
            if self.shards_weights:
                self._zero.release(self._accelerator)

    def sweep(self) -> None:
        """Free a model that was evaluated and let go of: ZeRO-3 leaves its share in reference cycles."""
        if self.shards_weights:
            gc.collect()

    def autocast(self) -> Any:
        """The run's precision, for what is computed outside sessions."""
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast_dtype)

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def num_processes(self) -> int:
        return self._accelerator.num_processes

    @property
    def rank(self) -> int:
        return self._accelerator.process_index

    @property
    def is_main(self) -> bool:
        return self._accelerator.is_main_process

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._accelerator.wait_for_everyone()

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """This rank's part of a list; the parts of all ranks in rank order are the list."""
        per_rank = self.largest_share(len(items))
        return items[self.rank * per_rank : (self.rank + 1) * per_rank]

    def largest_share(self, count: int) -> int:
        """Items of the rank that has most of `count`."""
        return -(-count // self.num_processes)

    def gather(self, rows: list[Any]) -> list[Any]:
        """All ranks' rows in rank order, on every rank."""
        return gather_object(rows) if self.num_processes > 1 else rows

    def gather_tensor(self, mine: Tensor) -> list[Tensor]:
        """Every rank's tensor in rank order, on every rank's CPU; shapes and types agree beforehand."""
        if self.num_processes == 1:
            return [mine.cpu()]
        on_device = mine.contiguous().view(torch.uint8).to(self.device)  # gloo does not know every type
        parts = [torch.empty_like(on_device) for _ in range(self.num_processes)]
        torch.distributed.all_gather(parts, on_device)
        return [part.cpu().view(mine.dtype) for part in parts]

    def broadcast_state(self, state: State) -> State:
        """Rank 0's tensors, on every rank, in place; shapes and names agree beforehand."""
        if self.num_processes > 1:
            for name in sorted(state):
                on_device = state[name].to(self.device)  # nccl takes no CPU tensors
                torch.distributed.broadcast(on_device, src=0)
                state[name].copy_(on_device)
        return state

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, on every rank; the device goes on computing meanwhile."""
        if self.num_processes == 1:
            return value
        values = torch.tensor(value)
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=self._host_group)
        return int(values.item())

    def sum_to_main(self, sums: dict[str, State]) -> dict[str, State]:
        """The sums of all ranks, on rank 0; empty on the others. What a rank lacks is zero there.

        One tensor at a time, in place; the ranks' own sums are gone afterwards.
        """
        if self.num_processes == 1:
            return sums
        mine = {(kind, name): tensor for kind, part in sums.items() for name, tensor in part.items()}
        found = gather_object([(key, tuple(tensor.shape), tensor.dtype) for key, tensor in mine.items()])
        total: dict[str, State] = {}
        for (kind, name), shape, dtype in sorted(set(found), key=lambda each: each[0]):
            tensor = mine.pop((kind, name), None)
            tensor = torch.zeros(shape, dtype=dtype) if tensor is None else tensor
            torch.distributed.reduce(tensor, dst=0, group=self._host_group)
            if self.is_main:
                total.setdefault(kind, {})[name] = tensor
            elif kind in sums:
                sums[kind].pop(name, None)  # it holds parts of others' sums by now
        return total

    def agree(self, problem: str | None) -> str | None:
        """What went wrong with the client that all ranks train, on any of them; the first by rank.

        Raises Unfinished when the others cannot say, since they wait for this rank in a collective.
        """
        if self.board is None:
            return problem
        patience = None if problem is None else PATIENCE_SECONDS
        try:
            words = self.board.meet(problem, lambda: None, patience)
        except Unfinished:
            if problem is None:
                raise
            self.board.give_up(problem)  # unless another rank did before, whose end this one saw
            raise Unfinished(self.board.given_up() or problem) from None
        return next((word for word in words if word is not None), None)

    def meet(self, signum: int, received: Callable[[], int]) -> int:
        """The largest of all ranks' signals (0: none), once every rank is here, not in a collective.

        A signal that is `received` meanwhile is passed on to those who train. Where they do not come although
        the launcher asks to end, Unfinished is raised after `MEETING_SECONDS`.
        """
        if self.board is None:
            return signum
        board, asked_at = self.board, 0.0

        def poll() -> None:
            nonlocal asked_at
            if not (late := received()):
                return
            if not asked_at:
                asked_at = time.monotonic()
                board.ask_to_stop(late)
            if late != signal.SIGUSR1 and time.monotonic() - asked_at > MEETING_SECONDS:
                board.give_up(f"stopped by signal {late}")

        return max(board.meet(signum, poll))

    def leave(self) -> None:
        """Wait until every rank has saved what it has: launchers kill the others once the first has ended."""
        if self.board is not None:
            self.board.leave()

    def alone(self) -> Alone:
        """This rank as an engine of its own, for clients that no other rank trains."""
        if self._zero is not None:
            raise InputError(
                "--executor: got parallel under DeepSpeed, whose ranks train each client together; expected "
                "--executor sequential, or a launch without DeepSpeed, such as accelerate_configs/ddp.yaml."
            )
        return Alone(self)

    def start_trackers(self, config: Mapping[str, Any]) -> None:
        """Trackers named by `--report-to`; a tracker that is not installed is an InputError."""
        try:
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
            self._accelerator.init_trackers("scalefl", config=plain)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"--report-to: {error}; expected an installed tracker such as tensorboard."
            ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._accelerator.log(dict(values), step=step)

    def finish(self) -> None:
        self.barrier()  # until rank 0 is done as well, it must hear of the others
        self.watchdog.stop()
        self.barrier()  # rank 0, and the board with it, goes when no rank looks at it any more
        self._accelerator.end_training()


@contextlib.contextmanager
def telling_others() -> Iterator[None]:
    """Of an error that ends this rank the others hear, which would wait for it, and rank 0 says it."""
    try:
        yield
    except (Interrupted, Unfinished):
        raise
    except Exception as error:
        if (board := Engine._board) is not None:
            if not isinstance(error, InputError | OSError):
                if (cause := board.given_up()) is not None:  # what happens to this one is but its echo
                    raise Unfinished(cause) from error
                if any(words in str(error) for words in OF_A_LOST_RANK):
                    raise Unfinished(f"another rank is gone: {_in_one_line(error)}") from error
            with contextlib.suppress(Unfinished):
                board.give_up(_in_one_line(error))
        raise


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


class Alone:
    """One rank of a launch as an engine of one process: what it does, the other ranks do not see."""

    num_processes, rank, is_main = 1, 0, True

    def __init__(self, engine: Engine) -> None:
        self._engine, self.device, self.watchdog = engine, engine.device, engine.watchdog
        self._looked = 0.0

    def place(self, parameter: nn.Parameter) -> None:
        """Parameters stay as they are read."""

    def session(self, model: nn.Module, run: RunConfig) -> Session:
        return Session(OneProcess(self._engine.autocast), model, run)

    def agree(self, problem: str | None) -> str | None:
        return problem

    def largest(self, value: int) -> int:
        """The signal that this rank got, or another one some time ago; raises Unfinished if one gave up."""
        board, now = self._engine.board, time.monotonic()
        if board is None or not (value or now - self._looked > LOOK_SECONDS):
            return value
        self._looked = now
        if (cause := board.given_up()) is not None:  # a launcher then sends a signal, too
            raise Unfinished(cause)
        if value:
            board.ask_to_stop(value)
        return value or board.stop_asked()


def _peak_of_this_process() -> int:
    """Most bytes in memory; `getrusage` would begin with those of the process that forked this one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * KIB


def _deepspeed(use_gpu: bool) -> Any:
    """The module that knows DeepSpeed, whose import takes seconds, where the launch asks for it."""
    if not asks_for_deepspeed():
        return None
    if not use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no other one
    from scalefl.engine import zero

    return zero
