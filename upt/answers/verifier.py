"""math_verify in a process of its own, so that no text can hang or fill the machine.

Its time limits are signals, which need a main thread and can't interrupt a power of huge integers. This file, run as a
script, is that process: it has a main thread, and can be killed.
"""

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress

VERIFY_SECONDS, START_SECONDS = 5.0, 120.0  # importing sympy takes its time on a busy machine
MAX_VERDICTS = 100_000  # remembered


class Verifier:
    """`verifier(gold, answer)` is math_verify's verdict, or None if it did not answer in time; works in any thread.

    Raises ModuleNotFoundError if math_verify is not installed.
    """

    def __init__(self):
        self.lock, self.process = threading.Lock(), None
        self.verdicts: dict[tuple[str, str], bool] = {}  # samples repeat their answers

    def ask(self, line: str, seconds: float) -> str:
        watchdog = threading.Timer(seconds, self.process.kill)
        watchdog.start()
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            return self.process.stdout.readline()
        except OSError:  # it has died
            return ""
        finally:
            watchdog.cancel()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):  # closing writes what a dead process did not take
                    pipe.close()
        self.process = None

    def start(self) -> str:
        """Start the process; what it says once it is ready, "" if it died before."""
        command, pipe = [sys.executable, os.path.abspath(__file__)], subprocess.PIPE
        # In a session of its own: what interrupts a notebook or a terminal is not meant for it.
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        return self.ask("", START_SECONDS)

    def __call__(self, gold: str, answer: str) -> bool | None:
        with self.lock:
            if (gold, answer) in self.verdicts:
                return self.verdicts[gold, answer]
            if importlib.util.find_spec("math_verify") is None:
                raise ModuleNotFoundError("grading needs math_verify, which is not installed: pip install math-verify")
            if self.process is not None and self.process.poll() is not None:
                self.stop()  # somebody ended it; the question is not to blame
            try:
                reply = self.start() if self.process is None else "ready"
                reply = reply and self.ask(json.dumps([gold, answer]) + "\n", VERIFY_SECONDS)
            except BaseException:  # interrupted: the reply to come must not be taken for the next question's
                self.stop()
                raise
            if not reply:
                self.stop()  # the next question gets a fresh process
                return None
            if len(self.verdicts) >= MAX_VERDICTS:
                self.verdicts.clear()
            self.verdicts[gold, answer] = json.loads(reply)
            return self.verdicts[gold, answer]


verifier = Verifier()
atexit.register(verifier.stop)
os.register_at_fork(after_in_child=verifier.__init__)  # lock and pipes belong to the parent


def _serve() -> None:
    """Answer each line [gold, answer] of stdin with math_verify's verdict, until stdin closes."""
    import resource

    from math_verify import parse, verify

    verify(parse(r"\boxed{(x+1)^2}"), parse(r"\boxed{x^2+2x+1}"))  # what the first question imports takes its time
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a power tower is to fail here, not to fill the machine
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        try:
            gold, answer = (parse(rf"\boxed{{{side}}}", parsing_timeout=2) for side in json.loads(line))
            verdict = bool(verify(gold, answer, timeout_seconds=2))
        except Exception:  # noqa: BLE001 - whatever fails on hostile text means no
            verdict = False
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
