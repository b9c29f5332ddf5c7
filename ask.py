"""Ask a model questions about a picture: the answers of the base and of the trained model side by side.

    python ask.py --run runs/train --image x.png "How many red shapes are there?"
    python ask.py --run runs/train --image x.png --choice 3 --choice 4 --choice 5 "How many?"
    python ask.py --run runs/train --image pictures/ "What is shown?"        # every picture of a folder
    python ask.py --run runs/train --image x.png                             # on the console, until an empty line
    python ask.py --model Qwen/Qwen2.5-VL-3B-Instruct --image x.png "…"      # a model alone

Of each model the greedy answer, then how often each answer was given by the samples. On the console `/image y.png`
takes another picture.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import tyro

from eval.heldout import FROM_RUN
from upt import prompts, stages
from upt.answers import vote_key
from upt.data.images import decode
from upt.data.questions import BadRow, Question
from upt.errors import DataError, SettingError, suggest_path
from upt.ranges import Few, Name
from upt.run import cli, trained
from upt.run.settings import Rollout, hidden
from upt.show import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from upt.model import Policy

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LAST = ("", "/quit", "/exit")  # what ends the console


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


def pictures(path: Path | None) -> list[tuple[str, "Image | None"]]:
    """The pictures that a path means, by name. Raises DataError for what is none."""
    if path is None:
        return [("no picture", None)]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not files:
            raise DataError(f"{path}: no pictures in this folder ({', '.join(PICTURES)})")
        return [picture for file in files for picture in pictures(file)]
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a picture or a folder of pictures{suggest_path(path)}")
    try:
        return [(path.name, decode(path.name, path.read_bytes()))]
    except BadRow as bad:
        raise DataError(f"{path}: {bad.reason}; give another picture") from None


def ask(policy: "Policy", question: str, picture: "Image | None", config: Config) -> dict[str, Answered]:
    """The answers to one question by who gives them: `base` and `trained` of a run, else `model`."""
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


def shown(found: dict[str, Answered], width: int) -> str:
    """The answers in columns beside each other."""
    each = max(20, (width - 3 * (len(found) - 1)) // len(found))
    columns = []
    for name, answered in found.items():
        votes = ", ".join(f"{count} × {'no answer' if key is None else key}" for key, count in answered.votes)
        said = [line for part in answered.greedy.split("\n") for line in wrap(part, each) or [""]]
        cells = [name, *said, *wrap(f"{len(answered.samples)} samples: {votes}", each)]
        columns.append([printable(cell) for cell in cells])
    return "\n".join(
        " | ".join(cell.ljust(each) for cell in row).rstrip() for row in zip_longest(*columns, fillvalue="")
    )


def questions(config: Config) -> Iterator[tuple[str, Path | None]]:
    """The question of the command, or those of the console, each with the picture or folder it is about."""
    if config.question is not None:
        yield config.question, config.image
        return
    picture = config.image
    print("ask, /image PATH takes another picture, an empty line ends", file=sys.stderr)
    while True:
        print("? ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if line in LAST:
            return
        if line.startswith("/image"):
            picture = Path(line.removeprefix("/image").strip())
        else:
            yield line, picture


def main(config: Config) -> list[dict[str, Answered]]:
    """Answer and print; returns the answers to each question about each picture."""
    config = replace(config).resolve()
    if config.question is not None:
        pictures(config.image)  # a mistake is said before a model is loaded
    policy = trained.load_policy(config, questions_per_step=1, group_size=config.samples)
    found = []
    for question, path in questions(config):
        try:
            for name, picture in pictures(path):
                found.append(ask(policy, question, picture, config))
                print(f"{name}: {question}\n{shown(found[-1], shutil.get_terminal_size((100, 20)).columns)}\n")
        except DataError as error:
            if config.question is not None:
                raise
            print(f"error: {error}", file=sys.stderr)
    return found


if __name__ == "__main__":
    cli.launch(main, Config)
