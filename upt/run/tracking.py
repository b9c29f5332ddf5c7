"""A run in the trackers that people use, by accelerate's: `--track tensorboard,wandb,trackio,mlflow`.

Every step's metrics go there, the scores before and after, and every so many steps a few groups: a table with pictures
in wandb, text and pictures in TensorBoard; the others take numbers alone. A tracker that fails is said once and left
out from then on: it never stops a run.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from upt.errors import SettingError, in_words, suggest
from upt.groups.shards import open_image
from upt.groups.votes import majority_key, majority_share
from upt.run import progress

NAMES = ("tensorboard", "wandb", "trackio", "mlflow")
FOLDER = "tracking"  # of a run, for those that write files
GROUPS = 4  # of a step that are shown
COLUMNS = ("uid", "picture", "question", "gold", "majority", "share", "responses")


def checked(names: str | None) -> list[str]:
    """The names of `--track`, parted by commas. Raises SettingError for one that is not known or not installed."""
    from importlib.util import find_spec

    found = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in found:
        if name not in NAMES:
            raise SettingError(f"--track {name}: give {', '.join(NAMES)}{suggest(name, NAMES)}")
        if find_spec(name) is None:
            raise SettingError(f"--track {name} is not installed: pip install {name}")
    return found


class Listeners:
    """Who is told of a run's steps: its trackers, and a function of the caller's, `on_step(row, groups)`.

    `config` is a train_upt.Config; `first`: this process speaks for the run.
    """

    def __init__(self, config, on_step: Callable[[dict, list[dict]], None] | None, first: bool):
        self.on_step, self.every = on_step, config.track_groups_every
        self.pictures = config.from_shards or config.out / "rollouts"
        names = checked(config.track) if first else []
        self.trackers = Trackers(names, config.out, vars(config)) if names else None

    def step(self, row: dict, groups: list[dict]) -> None:
        """The line of a step in metrics.jsonl, and its groups."""
        if self.trackers:
            self.trackers.log({name: value for name, value in row.items() if name != "step"}, row["step"])
            if groups and row["step"] % self.every == 0:
                self.trackers.groups(groups, row["step"], self.pictures)
        if self.on_step:
            self.on_step(row, groups)

    def scores(self, scores: dict, step: int) -> None:
        """Held-out scores after so many steps."""
        if self.trackers:
            values = {k: score["value"] for k, score in scores.items() if isinstance(score, dict) and "value" in score}
            self.trackers.log({"held_out": values}, step)

    def close(self) -> None:
        """The run has ended, or stops."""
        if self.trackers:
            self.trackers.finish()


class Trackers:
    """The trackers of a run, by name; each call goes to all that have not failed yet."""

    def __init__(self, names: Sequence[str], out: Path, settings: dict):
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # which the trackers ask for their logging
        self.out, self.trackers = out, {}
        where = out / FOLDER
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            arguments = {"logging_dir": str(where)} if kind.requires_logging_directory else {}
            project = {"wandb": "upt", "trackio": "upt", "mlflow": "upt"}.get(name, out.name)
            if name == "wandb":
                arguments = {"name": out.name, "dir": str(where)}
            elif name in ("trackio", "mlflow"):
                arguments = {"name" if name == "trackio" else "run_name": out.name}
            self.trackers[name] = None
            self._all(lambda _: self._start(name, kind, project, arguments), [name])  # noqa: B023
        self._all(lambda tracker: tracker.store_init_configuration(plain(settings)))

    def _start(self, name: str, kind: type, project: str, arguments: dict) -> None:
        (self.out / FOLDER).mkdir(parents=True, exist_ok=True)
        tracker = kind(project, **arguments)
        getattr(tracker, "start", lambda: None)()  # before accelerate 1.11 it has started by now
        self.trackers[name] = tracker

    def _all(self, work: Callable, names: Sequence[str] | None = None) -> None:
        for name in [*(self.trackers if names is None else names)]:
            try:
                work(self.trackers[name])
            except Exception as error:  # whatever it is, the run is worth more
                del self.trackers[name]
                progress.say(f"--track {name} has failed, and is left out: {in_words(error)}", file=sys.stderr)

    def log(self, values: dict, step: int) -> None:
        """Numbers, nested ones as a/b, at a step."""
        numbers = flat(values)
        self._all(lambda tracker: tracker.log(numbers, step=step))

    def groups(self, groups: Sequence[dict], step: int, folder: Path) -> None:
        """The first few groups of a step, with their pictures, which lie in `folder`."""
        some = groups[:GROUPS]

        def show(tracker) -> None:
            if tracker.name == "wandb":
                import wandb

                pictures = [g["image"] and wandb.Image(open_image(folder, g["image"])) for g in some]
                tracker.log_table("groups", [*COLUMNS], [row_of(*pair) for pair in zip(some, pictures)], step=step)
            elif tracker.name == "tensorboard":
                import numpy as np

                for i, g in enumerate(some):
                    tracker.log({f"groups/{i}": text_of(g)}, step=step)
                    if g["image"]:
                        picture = np.asarray(open_image(folder, g["image"]))[None]
                        tracker.log_images({f"groups/{i}": picture}, step=step, dataformats="NHWC")

        self._all(show)

    def finish(self) -> None:
        """Close all of them."""
        self._all(lambda tracker: tracker.finish())


def plain(settings: dict) -> dict:
    """Settings as trackers take them: numbers, flags and text."""
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items() if v is not None}


def flat(values: dict, before: str = "") -> dict[str, float]:
    """The numbers in nested mappings, by path."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{before}{name}"] = value
    return found


def row_of(group: dict, picture) -> list:
    """What the table says of a group, by COLUMNS."""
    facts = [group["gold"], majority_key(group), majority_share(group)]
    return [group["uid"], picture, group["question"], *facts, said(group)]


def said(group: dict) -> str:
    """The responses of a group, a line each, with what they earned."""
    return "\n".join(f"{r.get('reward', 0):+.3f}  {r['key']}  {r['text']}" for r in group["responses"])


def text_of(group: dict) -> str:
    """A group as Markdown in which its text is text."""
    lines = f"{group['question']}\ngold {group['gold']}, majority {majority_key(group)}\n\n{said(group)}".split("\n")
    return "\n".join(f"    {line}" for line in lines)
