"""The processes of a run: one, or several on a node that share its work out among them (`--gpus N`).

Each process has the whole model on a GPU of its own (on a CPU: some of its cores). Whole groups go to processes, and
every process learns what the others found, so that all of them know all groups and take the same decisions:

    team = assemble(config.device)
    rows = team.spread(answer, questions)      # answer(own questions) -> a row each; the rows of all, in order
    team.once(write, rows)                     # one process writes, and the others wait for it
    team.add(gradients)                        # summed over processes, in place

Every method but `even` is a meeting: all processes have to come to it, in the same order. What decides on where they go
next, such as whether a file is there, has to come out of a meeting too; processes that come to different ones are told
so. An error in one process is an error in all of them, and so is a signal to stop. The first process alone speaks and
writes.
"""

import atexit
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from upt.errors import Broken, Elsewhere, Lost, SettingError, Stopped, UserError
from upt.run import processes

if TYPE_CHECKING:
    import torch

Item, Found = TypeVar("Item"), TypeVar("Found")
WAIT = timedelta(days=7)  # for the slowest; that a process has ended is noticed by other means
CLOSED = re.compile(r"(?i)connection (was )?(likely )?(closed|reset)|broken pipe|got 0 bytes")  # gloo, torch
# The process group in which objects are exchanged, where it is not that of the tensors. Nothing holds it besides, so
# that no thread of it is left after `leave`.
MEETING: list = []


@dataclass(frozen=True)
class Team:
    """Process `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def together(self, work: Callable[..., Found], *arguments) -> list[Found]:
        """What `work(*arguments)` gives in each process, by rank.

        Raises what it raised here, else Stopped for what it raised in another process, Elsewhere for a ValueError
        there, and Broken for any other error.
        """
        return self._meet(_label(work, *arguments), lambda: work(*arguments))

    def once(self, work: Callable[..., Found], *arguments) -> Found:
        """What `work(*arguments)` gives in the first process, which alone does it, in every process."""
        found: list[Found | None] = [None]

        def alone() -> bool:
            if self.first:
                found[0] = work(*arguments)
            return found[0] is not None

        if self._meet(_label(work, *arguments), alone)[0] and self.size > 1:
            from torch import distributed

            with _connected():
                distributed.broadcast_object_list(found, src=0, group=_meeting())
        return found[0]

    def here(self, work: Callable[..., Found], *arguments) -> Found:
        """What `work(*arguments)` gives in this process: it is done in every one, and not told to the others."""
        found: list[Found] = []
        self._meet(_label(work, *arguments), lambda: found.append(work(*arguments)))
        return found[0]

    def in_turn(self, work: Callable[..., Found], *arguments) -> Found:
        """The same, the first process before the others, who find in caches and files what it has made."""
        found: list[Found] = []
        for first in [True, False][: self.size]:

            def mine(first=first) -> None:
                if self.first is first:
                    found.append(work(*arguments))

            self._meet(_label(work, *arguments), mine)
        return found[0]

    def spread(
        self, work: Callable[[list[Item]], list[Found]], items: Sequence[Item], owners: Sequence[int] | None = None
    ) -> list[Found]:
        """`work(items)` in parts: it gets those of this process and gives a result for each; all of them, in order.

        `owners` has the rank of each item's process; None: they are dealt out in turn.
        """
        owners = [i % self.size for i in range(len(items))] if owners is None else owners
        own = [item for item, rank in zip(items, owners, strict=True) if rank == self.rank]

        def part() -> list[Found]:
            found = work(own)
            if len(found) != len(own):
                raise ValueError(f"{_label(work)} gave {len(found)} results for {len(own)} items")
            return found

        parts = [iter(found) for found in self._meet(_label(work, *owners), part)]
        return [next(parts[rank]) for rank in owners]

    def even(self, costs: Sequence[float], homes: Sequence[int]) -> list[int]:
        """A process for each item, so that all of them get nearly the same sum of `costs`; no meeting.

        The largest are placed first, at home (`homes`, a rank each) if that does not put their process above an even
        share, else where there is least.
        """
        loads, owners = [0.0] * self.size, [0] * len(costs)
        fair = sum(costs) / self.size
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            home = homes[i]
            if loads[home] + costs[i] > fair:
                home = min(range(self.size), key=loads.__getitem__)
            loads[home] += costs[i]
            owners[i] = home
        return owners

    def add(self, tensors: Sequence["torch.Tensor"]) -> None:
        """Sum each tensor over processes, in place."""
        if self.size == 1:
            return
        from torch import distributed

        with _connected():
            for work in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def _meet(self, label: str, work: Callable[[], Found]) -> list[Found]:
        """What `work()` gives in each process, all of which have to bring the same label."""
        if self.size == 1:
            return [work()]
        found, error = None, None
        try:
            found = work()
        except (Exception, Stopped) as raised:  # told to the others first, who wait
            error = raised
        told = self._exchange((label, found, None if error is None else _described(error)))
        failed = {rank: description for rank, (_, _, description) in enumerate(told) if description is not None}
        if failed:
            with suppress(Lost):
                self._exchange(None)  # so that none ends before all have heard
        if error is not None:
            raise error
        if failed:
            raise _error_of(*min(failed.items()))
        if len({label for label, _, _ in told}) > 1:
            where = "; ".join(f"process {rank} at {label[:200]}" for rank, (label, _, _) in enumerate(told))
            raise RuntimeError(f"the processes have parted: {where}. What decides on their way has to be decided once")
        return [result for _, result, _ in told]

    def _exchange(self, mine: Found) -> list[Found]:
        from torch import distributed

        told = [None] * self.size
        with _connected():
            distributed.all_gather_object(told, mine, group=_meeting())
        return told


ALONE = Team()


@lru_cache(maxsize=1)
def assemble(device: str) -> Team:
    """The team that this process was started for, by its environment (processes.py, `accelerate launch`, torchrun).

    `device` is the setting of that name. Raises SettingError for one card that all of them would have to share.
    """
    size = processes.size()
    if size == 1:
        return ALONE
    if device.startswith("cuda:"):
        raise SettingError(f"--device {device}: each of {size} processes has a GPU of its own; leave it out")
    import torch
    import torch.distributed.nn  # noqa: F401 - imported later, its defaults would hold the group for good
    from accelerate import PartialState
    from accelerate.utils import check_cuda_p2p_ib_support
    from torch import distributed

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if not on_cpu and size > (count := torch.cuda.device_count()):
        raise SettingError(f"{size} processes and {count} CUDA devices: give --gpus {count}, or fewer")
    if not on_cpu and not check_cuda_p2p_ib_support():  # RTX 40 with a driver that promises what the cards have not
        os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    atexit.register(leave)
    with _connected():
        state = PartialState(cpu=on_cpu, timeout=WAIT)
        if state.backend != "gloo":
            MEETING.append(distributed.new_group(backend="gloo", timeout=WAIT))
    return Team(state.process_index, state.num_processes)


def leave() -> None:
    """Let go of the other processes: the threads of a group that is left abort the interpreter as it ends."""
    MEETING.clear()
    if "torch.distributed" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def _connected() -> Iterator[None]:
    """Inside, a connection that is closed is a Lost."""
    try:
        yield
    except RuntimeError as error:
        if not CLOSED.search(str(error)):
            raise
        said = "another process of this run has ended without a word; the same command goes on"
        raise Lost(said) from error


def _meeting():
    return MEETING[0] if MEETING else None


def _label(work: Callable, *arguments) -> str:
    """What is done at a meeting, and with what, for the others to compare with theirs."""
    said = [str(argument) for argument in arguments if type(argument) in (str, int) or isinstance(argument, Path)]
    return f"{getattr(work, '__qualname__', type(work).__name__)}({', '.join(said)})"


def _described(error: BaseException) -> tuple:
    if isinstance(error, Stopped):
        return "stopped", error.signal, str(error).removeprefix("stopped by ")
    expected = isinstance(error, UserError | OSError)
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    kind = "elsewhere" if isinstance(error, ValueError) else "broken"
    return kind, said, "".join(traceback.format_exception(error)), expected


def _error_of(rank: int, description: tuple) -> BaseException:
    kind, *told = description
    if kind == "stopped":
        return Stopped(*told)
    said, *rest = told
    return {"elsewhere": Elsewhere, "broken": Broken}[kind](f"{said} (in process {rank})", *rest)
