"""A script as several processes on this machine, a GPU each: what `--gpus N` does, and `make train GPUS=N`.

    python train_upt.py --gpus 4 …

is `accelerate launch --multi_gpu --num_processes 4 train_upt.py …`, but that it speaks in one voice: if a process is
killed, the others are ended and one line says so; what one fails of is said once; and a signal to stop is handed on,
and waited for however far away a safe point is.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache

from upt.errors import SettingError, UserError

GRACE = 10  # seconds that processes have to end by themselves when another one has
PAUSE = 0.1  # seconds between two looks at them
# Exit statuses of a process that was started here, of which it is another one's turn to say why:
LOST = 3  # a connection to another one is closed, and nothing else is known
TOLD = 4  # another one has failed and said so to this one; the first process has passed it on
STARTED = "UPT_STARTED"  # in the environment of processes that were started here
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def size() -> int:
    """How many processes this script has, whoever started them."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def is_started() -> bool:
    """Whether this is one of several."""
    return size() > 1


def rank() -> int:
    """Which of them this is."""
    return int(os.environ["RANK"]) if is_started() else 0


@cache
def is_ours() -> bool:
    """Whether this one was started by `run`, which may have ended since.

    The mark is taken out of the environment, so that what this one starts is not taken for another.
    """
    return os.environ.pop(STARTED, None) is not None


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(gpus: int) -> int:
    """How many processes a script has that was given --gpus. Raises SettingError if they are others than that says."""
    if not is_started():
        if gpus > 1:
            raise SettingError(f"--gpus {gpus} is for the command line; from a notebook, run the script")
        return 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    if here != size():
        raise SettingError(
            f"{size()} processes were started on several nodes, {here} of them on this one, and a run takes the GPUs "
            "of one: start as many as that has; more nodes: examples/trl_multinode"
        )
    if gpus not in (1, size()):
        raise SettingError(f"--gpus {gpus}, and {size()} processes were started: leave it out, or start {gpus}")
    return size()


def environments(size: int, port: int) -> list[dict[str, str]]:
    """The environment of each of `size` processes, in the names that torch and accelerate read."""
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {STARTED: 1}
    if "OMP_NUM_THREADS" not in os.environ:  # each would take all cores
        shared["OMP_NUM_THREADS"] = max(1, cores() // size)
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
    return [os.environ | {name: str(value) for name, value in of.items()} for of in ranks]


def run(size: int, command: Sequence[str]) -> int:
    """Run `command` as so many processes; the exit status, which is theirs. Signals are handed on to all of them, but
    those that were to be ignored, as by nohup.

    Raises UserError for one that was killed.
    """
    # A session of their own: Ctrl-C in a terminal comes to them once, from here. They end when their input does. What
    # the others have to say is kept until it is known whether the first one says it, too.
    kept = [None, *(tempfile.TemporaryFile("w+") for _ in range(size - 1))]
    how = {"stdin": subprocess.PIPE, "start_new_session": True}
    running, ended, handed, taken = [], {}, [], Counter()

    def hand_on() -> None:
        """Give each process the last signal, if it has not been given as many as there were."""
        for process in running:
            if taken[process.pid] < len(handed):
                taken[process.pid] = len(handed)  # first: the next one may come meanwhile
                if process.poll() is None:
                    process.send_signal(handed[-1])

    def take(number, frame) -> None:
        handed.append(number)
        hand_on()

    def look() -> bool:
        """Note who has ended since the last look, by rank and status; whether all have."""
        new = {rank: process.poll() for rank, process in enumerate(running) if rank not in ended}
        new = {rank: status for rank, status in new.items() if status is not None}
        ended.update(sorted(new.items(), key=lambda of: of[1] < 0))  # one may abort because another one failed
        return len(ended) == size

    before = {n: signal.signal(n, take) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        with (
            socket.socket() as held
        ):  # as long as it is, nobody else is given its port, and the first process can take it
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
            for of, to in zip(environments(size, held.getsockname()[1]), kept):
                running.append(subprocess.Popen(command, env=of, stderr=to, **how))
                hand_on()  # what came while it was started
            while not look() and not any(ended.values()):
                time.sleep(PAUSE)
        deadline = time.monotonic() + GRACE
        while not look() and time.monotonic() < deadline:
            time.sleep(PAUSE)
    finally:
        for process in running:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return _judged(ended, handed, kept)


def _judged(ended: dict[int, int], handed: list[int], kept: list) -> int:
    """The exit status of all; says what the first process has not said.

    `ended` has their statuses in the order in which they ended, without those that would not; `handed` the signals that
    were handed on.
    """
    if stopped := [number for number in handed if -number in ended.values()]:  # where no safe point is
        print(f"stopped by {signal.Signals(stopped[0]).name}", file=sys.stderr)
        return 128 + stopped[0]
    causes = [(rank, status) for rank, status in ended.items() if status not in (0, LOST, TOLD)]
    if not causes and any(ended.values()):
        raise UserError(
            f"the {len(kept)} processes of this command lost each other, and none of them failed; the same command "
            "goes on, and with --debug each says where it was"
        )
    rank, status = causes[0] if causes else (0, 0)
    if rank and status < 128 and ended.get(0) not in (2, TOLD):
        kept[rank].seek(0)
        print(kept[rank].read(), end="", file=sys.stderr)
    if status < 0:
        by = f"process {rank} of {len(kept)} was ended by {signal.Signals(-status).name}"
        raise UserError(f"{by}, and so the others were; the same command goes on")
    return status


def end_with_parent() -> None:
    """Have this process stop, as by SIGTERM, when the one that started it is gone. Its input comes from there."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # then nothing milder ends it
        os.kill(os.getpid(), signal.SIGKILL if ignored else signal.SIGTERM)

    if is_ours():
        threading.Thread(target=wait, daemon=True).start()
