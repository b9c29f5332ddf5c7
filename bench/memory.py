"""Resident memory of a process and of calls in a process of their own, by Linux's count: pages, whoever holds them."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path


class Resident:
    """What this process holds, from now on."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the highest count starts anew
        self.before = self.count("VmRSS")

    def count(self, name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    def above(self) -> int:
        """Bytes held at most since then, above those held then."""
        return self.count("VmHWM") - self.before


def in_own_process(function, *args):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
