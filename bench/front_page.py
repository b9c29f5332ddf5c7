"""The pictures of the README, from finished runs: one question as the model voted on it, and the curves of training.

    example.png     a held-out question, the base's samples with their votes and rewards, and the greedy answer before
                    and after training
    training.png    accuracy and majority share of each step's own samples, with the held-out mean before and after;
                    entropy of the samples

The question is the first held-out one for which: the greedy answer is wrong before training and right after it, and
the base's samples agree by majority on the right answer. How many satisfy this is printed and written in the picture,
beside how many went the other way. No training happens on it: the votes and rewards are what a training question would
have got.

    python train_upt.py --seed 0 --out runs/train
    python -m bench.front_page --run runs/train --out docs
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import Annotated

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, TransformedBbox
from PIL import Image

from eval import heldout
from upt import answers
from upt.data.questions import Question
from upt.errors import SettingError, suggest_path
from upt.files import check_folder, write_whole
from upt.groups.shards import open_image
from upt.groups.votes import counts, majority_key
from upt.run import cli
from upt.run.typed import Typed

NEEDED = ("summary.json", "metrics.jsonl", "before.json", "after.json", "adapter")
WIDTH, HEIGHT = 1600, 840  # pixels of example.png; GitHub shows about half of it
INK, QUIET, GREY, LINE, PALE, TINT = "#1f2328", "#59636e", "#afb8c1", "#d1d9e0", "#f6f8fa", "#e8f2fd"
BLUE, ORANGE, GREEN, RED = "#0969da", "#bc4c00", "#1a7f37", "#cf222e"
COLOURS = (BLUE, ORANGE, "#8250df", GREEN, RED, QUIET)
BOLD = {"size": 22, "weight": "bold", "color": INK}
PIXELS = 72  # dots per inch at which a point, matplotlib's unit of text and lines, is a pixel


@dataclass
class Config(Typed):
    run: Annotated[tuple[Path, ...], "one or more"] = (Path("runs/train"),)
    """folders of finished runs; the example is from the first, training.png has a line for each"""
    out: Path = Path("docs")
    """folder for example.png and training.png"""


@dataclass
class Example:
    """One held-out question and what the model answered."""

    question: Question
    samples: list[str]  # of the base, G texts
    before: str  # greedy, of the base
    after: str  # greedy, after training
    steps: int
    looked_at: int  # questions
    satisfy: int  # of them satisfy the rule
    better: int  # greedy answers that went from wrong to right
    worse: int  # and from right to wrong

    def right(self, text: str) -> bool:
        return answers.is_correct(text, self.question.gold, self.question.choices)

    def key(self, text: str) -> str | None:
        return answers.vote_key(text, self.question.choices)


# ------------------------------------------------------------------------------------------------- what is to be shown


def satisfying(before: Sequence[dict], after: Sequence[dict]) -> list[str]:
    """Uids, in order, of the questions that the rule picks from, by the rows of heldout.evaluate before and after."""
    later = {row["uid"]: row for row in after}
    return [
        row["uid"]
        for row in before
        if row.get("greedy") == 0 and row["maj"] == 1 and later.get(row["uid"], {}).get("greedy") == 1
    ]


def example(folder: Path) -> Example:
    """The first question of a finished run that satisfies the rule.

    Raises SettingError if there is none, or if the run's reward is another.
    """
    summary = json.loads((folder / "summary.json").read_text())
    if (reward := summary["config"]["reward"]) != "majority":
        raise SettingError(f"--run {folder}: the example shows the reward 'majority', and this run has {reward!r}")
    before, after = (json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("before", "after"))
    found = satisfying(before, after)
    if not found:
        raise SettingError(f"none of the {len(before)} held-out questions of {folder} satisfies the rule")
    later = {row["uid"]: row for row in after}
    pairs = [(row, later[row["uid"]]) for row in before if "greedy" in row and row["uid"] in later]
    moves = [new["greedy"] - old["greedy"] for old, new in pairs]
    (old, new) = next((old, new) for old, new in pairs if old["uid"] == found[0])
    picture = None if new["image"] is None else open_image(folder / heldout.FOLDER, new["image"])
    question = Question(old["uid"], old["question"], old["choices"], picture, old["gold"])
    first, *samples = (response["text"] for response in old["responses"])
    last, steps = new["responses"][0]["text"], summary["end"]["adapter_step"]
    return Example(
        question, samples, first, last, steps, len(pairs), len(found), better=moves.count(1), worse=moves.count(-1)
    )


def shown(text: str, width: int) -> str:
    """Model text as it can be drawn: on one line, what is not printable ASCII escaped, the middle cut out beyond
    `width` characters, since what is decided stands at the end."""
    text = "".join(c if " " <= c <= "~" else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def rule(found: Example) -> str:
    return (
        f"Picked by rule: the first held-out question (of {found.looked_at}; {found.satisfy} qualify) whose greedy "
        "answer is wrong before and right after, and whose vote is right."
    )


def overall(found: Example) -> str:
    return (
        f"Training voted on other questions in this way. Of all {found.looked_at} greedy answers, {found.better} went "
        f"from wrong to right, {found.worse} from right to wrong."
    )


# -------------------------------------------------------------------------------------------------------- example.png


class Page:
    """A white page on which everything is placed in pixels from the upper left corner."""

    def __init__(self, width: int, height: int):
        self.figure = Figure(figsize=(width / PIXELS, height / PIXELS), dpi=PIXELS, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: int = 22, colour: str = INK, mono: bool = False, **more):
        """Text on the baseline y. Dollar signs are dollar signs, not mathematics."""
        family = "DejaVu Sans Mono" if mono else "DejaVu Sans"
        more = {"va": "baseline", "parse_math": False, "family": family} | more
        return self.axes.text(x, y, text, size=size, color=colour, **more)

    def heading(self, x: float, y: float, title: str, note: str) -> None:
        self.text(x, y, title, 26, weight="bold")
        self.text(x, y + 34, note, 20, QUIET)

    def box(self, x: float, y: float, width: float, height: float, fill: str, edge: str = "none") -> None:
        style = "round,pad=0,rounding_size=6"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=fill, ec=edge, lw=1.5))

    def picture(self, picture: Image.Image, x: int, y: int, side: int) -> int:
        """Place a picture within a square, enlarged a whole number of times where it is smaller; its height."""
        scale = side / max(picture.size)
        scale = int(scale) if scale > 1 else scale
        width, height = (max(1, round(scale * length)) for length in picture.size)
        picture = picture.convert("RGB").resize((width, height), Image.NEAREST if scale >= 1 else Image.LANCZOS)
        self.axes.imshow(picture, extent=(x, x + width, y + height, y), interpolation="none", aspect="auto")
        return height


def example_page(found: Example) -> Figure:
    """One question, its samples, the vote, and the greedy answer before and after."""
    page = Page(WIDTH, HEIGHT)
    keys = [found.key(text) for text in found.samples]
    asked(page, found, 44)
    voters(page, found.samples, keys, 430)
    votes(page, keys, 1252)
    page.axes.plot((44, WIDTH - 44), (582, 582), color=LINE, lw=2)
    outcome(page, found, 44)
    for i, line in enumerate((rule(found), overall(found))):
        page.text(44, HEIGHT - 56 + 30 * i, line, 19, QUIET)
    return page.figure


def asked(page: Page, found: Example, x: int) -> None:
    page.heading(x, 56, "A question", "shown without its label")
    height = 0 if found.question.image is None else page.picture(found.question.image, x, 112, 336)
    column = TransformedBbox(Bbox.from_extents(x, 0, x + 360, HEIGHT), page.axes.transData)
    for i, line in enumerate(wrap(shown(found.question.question, 72), 26)[:3]):
        page.text(x, 112 + height + 42 + 34 * i, line, 24).set(clip_box=column, clip_on=True)


def voters(page: Page, samples: Sequence[str], keys: Sequence[str | None], x: int, room: int = 8) -> None:
    """Each sample with its answer and reward."""
    some = f", the first {room} shown" if len(samples) > room else ""
    page.heading(x, 56, f"{len(samples)} samples of the base model{some}", "as the model wrote them")
    for name, right in (("answer", 682), ("reward", 768)):
        page.text(x + right, 90, name, 20, QUIET, ha="right")
    winner = majority_key(keys)
    for i, (text, key) in enumerate(zip(samples[:room], keys)):
        top, won = 112 + 55 * i, key is not None and key == winner
        style = {"colour": BLUE, "weight": "bold", "ha": "right"} if won else {"colour": QUIET, "ha": "right"}
        page.box(x, top, 784, 46, TINT if won else PALE)
        page.text(x + 16, top + 30, shown(text, 46), 20, INK if won else QUIET, mono=True)
        page.text(x + 682, top + 31, "none" if key is None else shown(key, 5), **style)
        page.text(x + 768, top + 31, "1" if won else "0", **style)


def votes(page: Page, keys: Sequence[str | None], x: int, room: int = 5) -> None:
    """The answers by how often they were given."""
    page.heading(x, 56, "The vote", "answer, and votes for it")
    counted, winner = sorted(counts(keys).items(), key=lambda pair: -pair[1]), majority_key(keys)
    for i, (key, count) in enumerate(counted[:room]):
        top, won, length = 112 + 55 * i, key == winner, 180 * count / counted[0][1]
        style = {"colour": BLUE, "weight": "bold"} if won else {"colour": QUIET}
        page.text(x + 50, top + 31, shown(key, 4), ha="right", **style)
        page.box(x + 66, top + 6, length, 34, BLUE if won else GREY)
        page.text(x + 66 + length + 14, top + 31, str(count), **style)
    more = [f"and {len(counted) - room} more"] if len(counted) > room else []
    more += [f"no answer: {keys.count(None)}"] if None in keys else []
    y = 112 + 55 * min(len(counted), room) + 24
    page.text(x, y, ", ".join(more), 20, QUIET)
    said = ["Reward 1 for the most", "frequent answer, 0 for", "the rest, without labels."]
    for i, line in enumerate(said if winner is not None else ["A tie: all earn 0."]):
        page.text(x, 469 + 32 * i, line, 22)


def outcome(page: Page, found: Example, x: int) -> None:
    """The greedy answers before and after, beside gold."""
    page.heading(x, 640, "The greedy answer", f"gold: {shown(found.question.gold, 16)}")
    page.text(x, 704, "never shown to the model", 20, QUIET)
    for i, (name, text) in enumerate((("before training", found.before), (f"after {found.steps} steps", found.after))):
        right, top = found.right(text), 612 + 60 * i
        page.text(x + 386, top + 32, name)
        page.box(x + 586, top, 650, 48, "white", LINE)
        page.text(x + 604, top + 31, shown(text, 50), 20, mono=True)
        said, colour = ("✓ right", GREEN) if right else ("✗ wrong", RED)
        page.text(x + 1262, top + 33, said, 24, colour, weight="bold")


# ------------------------------------------------------------------------------------------------------- training.png


def training_page(runs: dict[str, tuple[list[dict], dict]]) -> Figure:
    """Curves of {label: (rows of metrics.jsonl, summary)}: a colour for each run, or for each curve of a single one.

    Step s is sampled after s updates, so the base is at 0.
    """
    page = Figure(figsize=(WIDTH / PIXELS, 560 / PIXELS), dpi=PIXELS, facecolor="white")
    left, right = page.subplots(1, 2, sharex=True, gridspec_kw={"width_ratios": (3, 2)})
    page.subplots_adjust(left=0.055, right=0.975, top=0.87, bottom=0.15, wspace=0.16)
    alone = len(runs) == 1
    for (label, (rows, summary)), colour in zip(runs.items(), cycle(COLOURS)):
        steps = [row["step"] for row in rows]
        style = {"color": ORANGE} if alone else {"color": colour, "ls": ":"}
        left.plot(steps, [100 * row["majority_share"] for row in rows], lw=3, **style)
        if all("accuracy" in row for row in rows):
            left.plot(steps, [100 * row["accuracy"] for row in rows], lw=3, color=colour)
        right.plot(steps, [row["entropy"] for row in rows], lw=3, color=colour, label=shown(label, 40))
        for when, step in (("before", 0), ("after", summary["end"]["adapter_step"])):
            if "mean" in summary[when]:
                value = 100 * summary[when]["mean"]["value"]
                left.plot(step, value, "o", mfc="white", mec=INK if alone else colour, mew=3, ms=14, zorder=3)
                if alone:
                    place = {"xytext": (-6, -40), "ha": "left"} if step == 0 else {"xytext": (10, -46), "ha": "right"}
                    left.annotate(f"{value:.1f} {when}", (step, value), textcoords="offset points", **place, **BOLD)
    panel(left, "Right answers and agreement, per cent of samples", "{:.0f}", top=100)
    panel(right, "Entropy of the samples, nats", "{:.2f}")
    right_style, share_style = ({"c": BLUE}, {"c": ORANGE}) if alone else ({"c": QUIET}, {"c": QUIET, "ls": ":"})
    mark = {"ls": "", "marker": "o", "mfc": "white", "mec": INK if alone else QUIET, "mew": 3, "ms": 14}
    lines = [
        Line2D([], [], lw=3, label="right answers among a step's samples", **right_style),
        Line2D([], [], lw=3, label="share of the most frequent answer", **share_style),
        Line2D([], [], label="right answers to held-out questions (mean of 8)", **mark),
    ]
    box = {"facecolor": "white", "edgecolor": "none", "framealpha": 1, "fontsize": 20, "labelcolor": INK}
    left.legend(handles=lines, loc="lower right", **box)
    if not alone:
        right.legend(loc="lower left", **box)
    return page


def panel(axes, title: str, numbers: str, top: float | None = None) -> None:
    """The look of both panels, from zero."""
    axes.set_title(title, loc="left", size=24, weight="bold", color=INK, pad=18)
    axes.set_xlabel("step", size=20, color=QUIET)
    axes.set_ylim(0, top)
    axes.tick_params(labelsize=20, labelcolor=QUIET, length=0, pad=8)
    axes.yaxis.set_major_formatter(numbers.format)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", color=LINE, lw=1)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


# --------------------------------------------------------------------------------------------------------------- main


def check_runs(folders: Sequence[Path]) -> None:
    """Raise SettingError for the first folder that does not hold a finished run with held-out scores."""
    for folder in folders:
        if missing := [name for name in NEEDED if not (folder / name).exists()]:
            raise SettingError(
                f"--run {folder}: no finished run with held-out scores there ({', '.join(missing)} missing)"
                f"{suggest_path(folder)}"
            )


def curves(folder: Path) -> tuple[list[dict], dict]:
    """The metrics of a run's steps, and its summary."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["groups"]]  # of steps that were not left out
    return rows, json.loads((folder / "summary.json").read_text())


def write(figure: Figure, path: Path) -> None:
    """The figure as a PNG of few colours: flat areas and text need no more, and a page loads it sooner."""
    whole = BytesIO()
    figure.savefig(whole, format="png")
    small = BytesIO()
    Image.open(whole).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    write_whole(path, [small.getvalue()])


def main(config: Config) -> Example:
    """Write both pictures, print the rule and its counts, and return what the example shows."""
    folders = config.run
    check_folder(config.out)
    check_runs(folders)
    found = example(folders[0])
    write(example_page(found), config.out / "example.png")
    write(training_page({str(folder): curves(folder) for folder in folders}), config.out / "training.png")
    print(f"{found.question.uid}\n{rule(found)}\n{overall(found)}")
    print(f"pictures in {config.out / 'example.png'} and {config.out / 'training.png'}")
    return found


if __name__ == "__main__":
    cli.launch(main, Config)
