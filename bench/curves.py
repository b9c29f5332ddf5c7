"""Figures of studies: held-out scores by step, the mean over seeds as a line and their range as a band."""

from collections.abc import Callable, Sequence
from itertools import cycle

from matplotlib.figure import Figure

from bench.alarms import series
from bench.front_page import COLOURS, INK, PIXELS, WIDTH, panel
from upt.compare.sweep import look, over_seeds

PANELS = {  # score: its title, and by how much it is multiplied
    "mean": ("Right samples, per cent", 100),
    "pass": ("pass@8, per cent", 100),
    "entropy": ("Entropy, nats", 1),
}


def by_step(labels: Sequence[str]) -> Callable:
    """A panel each for accuracy, pass@8 and entropy, a line for each of those rewards that have runs."""

    def figure(record: dict) -> Figure:
        page = Figure(figsize=(WIDTH / PIXELS, 560 / PIXELS), dpi=PIXELS, facecolor="white")
        axes = page.subplots(1, len(PANELS), sharex=True)
        page.subplots_adjust(left=0.045, right=0.985, top=0.87, bottom=0.26, wspace=0.2)
        for axis, (name, (title, factor)) in zip(axes, PANELS.items(), strict=True):
            for i, (label, colour) in enumerate(zip(labels, cycle(COLOURS))):
                runs = [series(run, name) for run in record["runs"] if run["label"] == label]
                steps, values = over_seeds(runs)
                mean, low, high = factor * values
                if runs:
                    axis.plot(steps, mean, color=colour, label=label.strip("`"), **look(i, len(labels)))
                    axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            limits = axis.get_ylim()
            panel(axis, title, "{:.0f}" if factor == 100 else "{:.2f}")
            if factor == 100:  # from zero their differences could not be seen
                axis.set_ylim(limits)
            axis.xaxis.get_major_locator().set_params(integer=True)
        page.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(labels), fontsize=20,
                    labelcolor=INK, edgecolor="none")  # fmt: skip
        return page

    return figure
