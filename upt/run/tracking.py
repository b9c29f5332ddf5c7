"""A run in the trackers that people use, by accelerate's: `--track tensorboard,wandb,trackio,mlflow`.

Every step's metrics go there, the scores before and after, and every so many steps a few groups: a table with pictures
in wandb, text and pictures in TensorBoard; the others take numbers alone. A tracker that fails is said once and left
out from then on: it never stops a run. A run that goes on does so in its trackers, too, by what it was called there,
which is kept in its folder; one that fails is marked as failed where a tracker has a mark for it.
"""

import json
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from upt.errors import SettingError, in_words, suggest
from upt.files import known_json, write_whole
from upt.groups.shards import open_image
from upt.groups.votes import majority_key, majority_share
from upt.run import progress

NAMES = ("tensorboard", "wandb", "trackio", "mlflow")
FOLDER = "tracking"  # of a run, for those that write files
IDS = "ids.json"  # in it: by which each of them knows the run
PROJECT = "upt"
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
            raise SettingError(f"--track {name} is not installed: {sys.executable} -m pip install {name}")
    return found


class Listeners:
    """Who is told of a run's steps: its trackers, and a function of the caller's, `on_step(row, groups)`.

    `config` is a train_upt.Config; `first`: this process speaks for the run.
    """

    def __init__(self, config, on_step: Callable[[dict, list[dict]], None] | None, first: bool):
        self.on_step, self.every = on_step, config.track_groups_every
        self.pictures = config.from_shards or config.out / "rollouts"
        self.handled = sys.exception()  # where the run is called, if it is from an `except`
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
        """The run has ended, or stops: inside of an exception, by that."""
        if self.trackers:
            error = sys.exception()
            self.trackers.finish(None if error is self.handled else error)


class Trackers:
    """The trackers of a run, by name; each call goes to all that have not failed yet."""

    def __init__(self, names: Sequence[str], out: Path, settings: dict):
        self.out, self.trackers = out, dict.fromkeys(names)
        self.starts = dict.fromkeys(names, 0)  # steps from before are there, in a tracker that the run goes on in
        self._all(lambda name, _: self._start(name, settings))

    def _start(self, name: str, settings: dict) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        from upt.run.checkpoints import checkpoints, step_of  # which bring torch

        PartialState()  # which the trackers ask for their logging
        where = self.out / FOLDER
        where.mkdir(parents=True, exist_ok=True)
        ids = known_json(where / IDS) or {}
        known, called = ids.get(name), name_of(self.out)
        given, project = uuid.uuid4().hex[:12], PROJECT
        if known and (saved := checkpoints(self.out / "checkpoints")):
            self.starts[name] = step_of(saved[-1])
        if name == "tensorboard":
            project = name  # it calls a run by its folder
            arguments = {"logging_dir": str(where), "purge_step": self.starts[name] if known else None}
        elif name == "wandb":
            arguments = {"name": called, "id": known or given, "resume": "allow", "dir": str(where)}
        elif name == "trackio":
            given = f"{called} {given[:4]}"  # of another run of that name it would go on, too
            arguments = {"name": known or given, "resume": "allow"}
        else:
            arguments = {"run_name": called, "run_id": known}
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **arguments)
        getattr(tracker, "start", lambda: None)()  # before accelerate 1.11 it has started by now
        self.trackers[name] = tracker
        if known is None:
            tracker.store_init_configuration(plain(settings))
            ids[name] = tracker.tracker.info.run_id if name == "mlflow" else given
            write_whole(where / IDS, [json.dumps(ids).encode()])

    def _all(self, work: Callable) -> None:
        for name, tracker in [*self.trackers.items()]:
            try:
                work(name, tracker)
            except Exception as error:  # whatever it is, the run is worth more
                del self.trackers[name]
                progress.say(f"--track {name} has failed, and is left out: {in_words(error)}", file=sys.stderr)

    def log(self, values: dict, step: int) -> None:
        """Numbers, nested ones as a/b, at a step."""
        numbers = flat(values)

        def tell(name: str, tracker) -> None:
            if step >= self.starts[name]:
                tracker.log(numbers, step=step)

        self._all(tell)

    def groups(self, groups: Sequence[dict], step: int, folder: Path) -> None:
        """The first few groups of a step, with their pictures, which lie in `folder`."""
        some = groups[:GROUPS]

        def show(name: str, tracker) -> None:
            if name == "wandb":
                import wandb

                pictures = [g["image"] and wandb.Image(open_image(folder, g["image"])) for g in some]
                tracker.log_table("groups", [*COLUMNS], [row_of(*pair) for pair in zip(some, pictures)], step=step)
            elif name == "tensorboard":
                import numpy as np

                for i, g in enumerate(some):
                    tracker.log({f"groups/{i}": text_of(g)}, step=step)
                    if g["image"]:
                        picture = np.asarray(open_image(folder, g["image"]))[None]
                        tracker.log_images({f"groups/{i}": picture}, step=step, dataformats="NHWC")

        self._all(show)

    def finish(self, error: BaseException | None = None) -> None:
        """Close all of them; `error` is what has ended the run, if it has not ended by itself."""

        def end(name: str, tracker) -> None:
            if error is not None and name == "wandb":
                tracker.tracker.finish(exit_code=1)
            elif error is not None and name == "mlflow":
                import mlflow

                mlflow.end_run("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            else:
                tracker.finish()

        self._all(end)


def name_of(out: Path) -> str:
    """What a run is called: the path below `runs`, else its folder's last two parts, since many end in seed-0, or of a
    round, as mine/round-01/run, three."""
    *above, last = Path(os.path.abspath(out)).parts[1:]
    if "runs" in above:
        below = len(above) - above[::-1].index("runs")
    else:
        below = max(len(above) - (2 if last == "run" else 1), 0)
    return "/".join([*above[below:], last])


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
