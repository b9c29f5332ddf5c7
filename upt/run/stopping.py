"""How a run is stopped: where it is safe to, with its state saved, by SIGINT (Ctrl-C) or SIGTERM."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from upt.errors import Stopped


@contextmanager
def stop_on_signal(folder: Path) -> Iterator[Callable]:
    """Inside, SIGINT and SIGTERM ask the run in `folder` to stop; a second one stops it at once.

    One that was to be ignored is. Yields a function that raises `Stopped` once a signal has come; call it where
    stopping is safe. Off the main thread, where Python handles no signals, it never raises.
    """
    asked: list[int] = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("stopping at the next safe point; once more to stop at once", file=sys.stderr)

    def check(*_) -> None:
        if asked:
            raise Stopped(asked[0], signal.Signals(asked[0]).name)

    may = threading.current_thread() is threading.main_thread()
    handled = [n for n in (signal.SIGINT, signal.SIGTERM) if may and signal.getsignal(n) is not signal.SIG_IGN]
    before = [signal.signal(number, ask) for number in handled]
    try:
        yield check
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from {folder}", file=sys.stderr)
        raise
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
