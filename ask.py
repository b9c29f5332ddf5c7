"""Ask a model questions about a picture: the answers of the base and of the trained model side by side.

    python ask.py --run runs/train --image x.png "How many red shapes are there?"
    python ask.py --run runs/train --image x.png --choice 3 --choice 4 --choice 5 "How many?"
    python ask.py --run runs/train --image pictures/ "What is shown?"        # every picture of a folder
    python ask.py --run runs/train --image x.png                             # on the console, until an empty line
    python ask.py --run runs/train --image x.png < questions.txt             # a question a line
    python ask.py --model Qwen/Qwen2.5-VL-3B-Instruct --image x.png "…"      # a model alone, or an export

Of each model the greedy answer, then how often each answer was given by the samples. On the console `/image y.png`
takes another picture, and an empty line, Ctrl-D or Ctrl-C ends. What is no picture in a folder is said and left out.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import combining, east_asian_width

import tyro

from eval.heldout import FROM_RUN
from upt import prompts, stages
from upt.answers import vote_key
from upt.data.images import decode
from upt.data.questions import BadRow, Question
from upt.errors import DataError, SettingError, suggest_path, trouble
from upt.ranges import Few, Name
from upt.run import cli, trained
from upt.run.settings import Rollout, hidden
from upt.show import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from upt.model import Policy

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LAST = (None, "/quit", "/exit")  # what ends the console, or a pipe
OTHER = "give another picture"


@dataclass
class Config(Rollout):
    question: tyro.conf.Positional[str | None] = None
    """what to ask; None: on the console"""
    run: Path | None = None
    """a training run, or a checkpoint of one: its base and its adapter are asked, with the run's settings"""
    image: Path | None = None
    """a picture, or a folder of pictures"""
    choice: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """an option to choose from; once for each"""
    samples: Few = 8
    """samples of each model, beside its greedy answer"""
    data: Name = hidden("shapes")
    split: Name = hidden("train")
    limit: int | None = hidden(None)
    preset: None = hidden(None)
    steps: int | None = hidden(None)
    questions_per_step: int | None = hidden(None)
    group_size: int | None = hidden(None)
    view: None = hidden(None)

    def resolve(self) -> "Config":
        if self.run is not None:
            settings = trained.taken_from_run(self).settings
            trained.take(self, settings, {name: name for name in FROM_RUN if hasattr(self, name)})
        if len(self.choice) == 1:
            raise SettingError("--choice is given once: give it for each option, or leave it out")
        return super().resolve()


@dataclass
class Answered:
    """What a model says to a question: greedily, and in samples."""

    greedy: str
    samples: list[str]
    votes: list[tuple[str | None, int]]
    """the samples' vote keys with how often each was given, the most frequent first; None: no answer"""


def files(path: Path | None) -> list[Path | None]:
    """The pictures that a path means, of which one at least can be read; [None] for no path. Raises DataError."""
    if path is None:
        return [None]
    if not path.exists():
        raise DataError(f"{path}: no such file; give a picture or a folder of pictures{suggest_path(path)}")
    folder = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES) if path.is_dir() else None
    if folder == []:
        raise DataError(f"{path}: no pictures in this folder ({', '.join(PICTURES)})")
    wrong = []
    for file in folder or [path]:
        try:
            opened(file)
            return folder or [path]
        except DataError as error:
            wrong.append(error)
    raise DataError(f"{f'{path}: none of {len(wrong)} pictures can be read: ' if folder else ''}{wrong[0]}; {OTHER}")


def opened(path: Path | None) -> "Image | None":
    """A picture of `files`. Raises DataError for what is none."""
    try:
        return None if path is None else decode(path.name, path.read_bytes())
    except (BadRow, OSError) as error:
        raise DataError(f"{path}: {error.reason if isinstance(error, BadRow) else trouble(error)}") from None


def ask(policy: "Policy", question: str, picture: "Image | None", config: Config) -> dict[str, Answered]:
    """The answers to one question by who gives them: `base` and `trained` of a run, else `model`."""
    for text in (question, *config.choice):
        try:
            text.encode()
        except UnicodeEncodeError:  # what was no UTF-8 is in it, as Python keeps that
            raise DataError(f"{ascii(text)} is not UTF-8: convert it, as by iconv -f latin1 -t utf-8") from None
    asked = Question("asked", question, [*config.choice] or None, picture, None)
    encoded, too_long = policy.encode([asked], prompts.template(config.prompt), config.max_prompt_tokens)
    if too_long:
        raise DataError(
            f"the prompt has {too_long['asked']} tokens, over --max-prompt-tokens {config.max_prompt_tokens}"
        )

    def texts(**settings) -> list[str]:
        (group,) = stages.sampling.sample_groups(policy, encoded, -1, replace(config, **settings))
        return policy.tokenizer.batch_decode([r.ids for r in group], skip_special_tokens=True)

    modes = {"base": policy.reference, "trained": nullcontext} if config.run else {"model": nullcontext}
    found = {}
    for name, mode in modes.items():
        with mode():
            (greedy,), samples = texts(temperature=0.0, group_size=1), texts(group_size=config.samples)
        votes = Counter(vote_key(text, asked.choices) for text in samples)
        found[name] = Answered(greedy, samples, votes.most_common())
    return found


def answer(policy: "Policy", question: str, paths: list[Path | None], config: Config) -> list[dict[str, Answered]]:
    """Ask about each picture and print; what cannot be asked about is said. Raises DataError if nothing can."""
    found = []
    for path in paths:
        try:
            found.append(ask(policy, question, opened(path), config))
        except DataError as error:
            if len(paths) == 1:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        name, width = "no picture" if path is None else path.name, shutil.get_terminal_size((100, 20)).columns
        print(f"{printable(f'{name}: {question}')}\n{shown(found[-1], width)}\n", flush=True)
    if not found:
        raise DataError(f"{paths[0].parent}: the question can be asked about none of {len(paths)} pictures")
    return found


def shown(found: dict[str, Answered], width: int) -> str:
    """The answers in columns beside each other."""
    each = max(20, (width - 3 * (len(found) - 1)) // len(found))
    columns = []
    for name, answered in found.items():
        votes = ", ".join(f"{count} × {'no answer' if key is None else key}" for key, count in answered.votes)
        parts = [name, *answered.greedy.split("\n"), f"{len(answered.samples)} samples: {votes}"]
        columns.append([line for part in parts for line in folded(printable(part).expandtabs(4), each)])
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(cell + " " * (each - width_of(cell)) for cell in row).rstrip() for row in rows)


def folded(text: str, width: int) -> list[str]:
    """A text in lines of at most `width` columns, broken at blanks where a line has some."""
    lines, line = [], ""
    for character in text:
        line += character
        if width_of(line) > width:
            cut = line.rfind(" ") + 1 or len(line) - 1
            lines.append(line[:cut].rstrip())
            line = line[cut:]
    return [*lines, line]


def width_of(text: str) -> int:
    """Columns that a text takes on a terminal: East Asian wide characters take two, marks on others none."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def questions(config: Config, paths: list[Path | None]) -> Iterator[tuple[str, list[Path | None]]]:
    """The question of the command, or those of the console or a pipe, each with the pictures it is about."""
    if config.question is not None:
        yield config.question, paths
        return
    if sys.stdin.isatty():
        which = "a picture" if paths == [None] else "another picture"
        print(f"ask; /image PATH takes {which}; an empty line ends", file=sys.stderr)
        with suppress(ImportError):
            import readline  # noqa: F401 - by which input() knows the arrow keys
    elif sys.stdin.errors == "strict":
        sys.stdin.reconfigure(errors="surrogateescape")  # so that other bytes are a mistake in their line alone
    last = (*LAST, "") if sys.stdin.isatty() else LAST
    while (line := next_line()) not in last:
        if not line:
            continue
        if not line.startswith("/"):
            yield line, paths
            continue
        try:
            if line.split()[0] != "/image":
                raise DataError(f"{line.split()[0]}: no such command; /image PATH takes another picture, /quit ends")
            given = line.removeprefix("/image").strip()
            paths = files(Path(given).expanduser() if given else None)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)


def next_line() -> str | None:
    """What is typed, or the next line of a pipe, which gets no prompt; None at its end, or at Ctrl-C and Ctrl-D."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        return input("? " if terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        print(end="\n" * terminal, file=sys.stderr)
        return None


def main(config: Config) -> list[dict[str, Answered]]:
    """Answer and print; returns the answers to each question about each picture. Raises DataError if a question cannot
    be answered, of those of a pipe if none can be, and goes on after a mistake on the console."""
    config = replace(config).resolve()
    given = files(config.image)  # a mistake is said before a model is loaded
    policy = trained.load_policy(config, questions_per_step=1, group_size=config.samples)
    found = []
    for question, paths in questions(config, given):
        try:
            found += answer(policy, question, paths, config)
        except DataError as error:
            if config.question is not None:
                raise
            print(f"error: {error}", file=sys.stderr)
    if not found and not sys.stdin.isatty():
        raise DataError("no question was answered: give one in the command, or a line each in what is piped in")
    return found


if __name__ == "__main__":
    cli.launch(main, Config)
