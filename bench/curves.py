"""Figures of studies: held-out scores by step, the mean over seeds as a line and their range as a band."""

from collections.abc import Callable, Sequence
from itertools import cycle

from matplotlib.figure import Figure

from bench.alarms import series
from bench.front_page import COLOURS, INK, PIXELS, WIDTH, panel
from upt.compare.sweep import over_seeds

PANELS = (
    ("mean", "Right of 8 samples, per cent", 100),
    ("pass", "pass@8, per cent", 100),
    ("entropy", "Entropy, nats", 1),
)


def by_step(labels: Sequence[str]) -> Callable:
    """A panel each for accuracy, pass@8 and entropy, a line for each of some rewards."""

    def figure(record: dict) -> Figure:
        page = Figure(figsize=(WIDTH / PIXELS, 560 / PIXELS), dpi=PIXELS, facecolor="white")
        axes = page.subplots(1, len(PANELS), sharex=True)
        page.subplots_adjust(left=0.045, right=0.985, top=0.87, bottom=0.24, wspace=0.2)
        for label, colour in zip(labels, cycle(COLOURS)):
            runs = [run for run in record["runs"] if run["label"] == label]
            if not runs:  # of a study that is not complete
                continue
            for axis, (name, _, factor) in zip(axes, PANELS, strict=True):
                # over_seeds counts a row's step as made, so that what was scored before step s is of step s - 1.
                rows = [[{"step": s - 1, name: factor * v} for s, v in series(run, name).items()] for run in runs]
                steps, (mean, low, high) = over_seeds(rows, name)
                axis.plot(steps, mean, lw=3, color=colour, label=label.strip("`"))
                axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        for axis, (_, title, factor) in zip(axes, PANELS, strict=True):
            panel(axis, title, "{:.0f}" if factor == 100 else "{:.2f}")
            if factor == 100:
                axis.set_ylim(min((line.get_ydata().min() for line in axis.lines), default=5) - 5, 100)
        page.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(labels), fontsize=20,
                    labelcolor=INK, edgecolor="none")  # fmt: skip
        return page

    return figure
