"""What training on self-written questions gains on `shapes`, beside training on the set's own, as many steps of each.

For each seed the base writes questions to all training pictures, in both modes, and is trained without labels on

    original                 the questions of shapes
    in-context               its own, written with the original one in sight
    direct                   its own, from the picture alone
    original+in-context      both as one set
    in-context-unfiltered    all that it wrote in context, with --unfiltered

Prints the held-out gain of each (mean ± half of the 95 % t-interval over seeds, per cent), the filters' counts and what
the generator says of the questions, as Markdown. The same command again goes on.

    python -m bench.questions --out runs/bench-questions
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

import synthesize
import train_upt
from eval import synthetic
from stats import average, markdown, t_interval

METRICS = ("mean", "greedy", "maj", "pass")
MODES = ("in-context", "direct")


@dataclass
class Config:
    model: str = "models/tiny"
    """the base"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds; each varies pictures, questions, sampling and adapter"""
    steps: int | None = None
    """steps of each training; None: the default"""
    unfiltered: bool = False
    """train on the questions in context without filters, too"""
    out: Path = Path("runs/bench-questions")
    """folder for all that is made"""


def written(config: Config, mode: str, seed: int, filters: str = "all") -> Path:
    """The folder of a base's questions, made or gone on with."""
    out = config.out / f"{mode}-{filters}-{seed}"
    settings = {"data": "shapes", "model": config.model, "seed": seed, "mode": mode, "filters": filters}
    synthesize.main(synthesize.Config(out=out, **settings))
    return out


def trained(config: Config, name: str, data: str, seed: int) -> dict:
    """The summary of a run on `data`, made or gone on with."""
    settings = {"data": data, "eval_data": "shapes", "model": config.model, "seed": seed, "steps": config.steps}
    return train_upt.main(train_upt.Config(out=config.out / f"train-{name}-{seed}", **settings))


def interval(values: list[float]) -> str:
    mean, half = t_interval([100 * value for value in values])
    return f"{mean:+.1f}" + ("" if half is None else f" ± {half:.1f}")


def main(config: Config) -> None:
    runs: dict[str, list[dict]] = {}
    for seed in config.seeds:
        own = {mode: str(written(config, mode, seed)) for mode in MODES}
        sets = {"original": "shapes"} | own | {"original+in-context": f"shapes,{own['in-context']}"}
        if config.unfiltered:
            sets["in-context-unfiltered"] = str(written(config, "in-context", seed, "none"))
        for name, data in sets.items():
            runs.setdefault(name, []).append(trained(config, name, data, seed))
    rows = [("trained on", "seeds", *METRICS)]
    for name, found in runs.items():
        gains = [[s["after"][m]["value"] - s["before"][m]["value"] for s in found] for m in METRICS]
        rows.append((name, str(len(found)), *map(interval, gains)))
    print("\nGain over the base, held-out questions of shapes\n\n" + markdown(rows))

    for mode in MODES:
        folders = [config.out / f"{mode}-all-{seed}" for seed in config.seeds]
        counts = [json.loads((folder / "summary.json").read_text()) for folder in folders]
        total = {name: sum(c[name] for c in counts) for name in ("candidates", "empty", "kept")}
        rows = [("filter", "seen", "failed")]
        for name in counts[0]["filters"]:
            of = [c["filters"][name] for c in counts]
            rows.append((name, str(sum(f["seen"] for f in of)), str(sum(f["failed"] for f in of))))
        print(f"\n{mode}: {total['kept']} of {total['candidates']} kept\n\n{markdown(rows)}\n")
        for folder in folders:
            print(folder)
            synthetic.main(synthetic.Config(questions=folder))
    own = [run["end"]["steps"] for found in runs.values() for run in found]
    print(f"\n{average(own):.0f} steps each")


if __name__ == "__main__":
    main(tyro.cli(Config))
