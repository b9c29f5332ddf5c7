"""What training on self-written questions gains on `shapes`, beside training on the set's own, as many steps of each.

For each seed the base writes questions to all training pictures, in both modes, and is trained without labels on

    original                 the questions of shapes
    in-context               its own, written with the original one in sight
    direct                   its own, from the picture alone
    original+in-context      both as one set
    in-context-unfiltered    all that it wrote in context, with --unfiltered

Prints as Markdown the held-out gain of each and its difference from `original`, paired by seed (mean ± half of the 95 %
t-interval over seeds, per cent), accuracy by kind of question, the filters' counts, and what the generator says of the
questions. The same command again goes on.

    python -m bench.questions --out runs/bench-questions
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import synthesize
import train_upt
from eval import synthetic
from upt.files import check_folder
from upt.groups.stats import average, markdown, t_interval
from upt.ranges import Count, Name, Seed
from upt.run import cli
from upt.run.typed import Typed

METRICS = ("mean", "greedy", "maj", "pass")
MODES = ("in-context", "direct")


@dataclass
class Config(Typed):
    model: Name = "models/tiny"
    """the base"""
    seeds: Annotated[tuple[Seed, ...], "one or more"] = (0, 1, 2)
    """seeds; each varies pictures, questions, sampling and adapter"""
    steps: Count | None = None
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


def gains(runs: dict[str, list[dict]]) -> str:
    """A table of what each training gains, and of how much less or more its mean gains than that of `original`."""
    gain = {
        name: {m: [s["after"][m]["value"] - s["before"][m]["value"] for s in found] for m in METRICS}
        for name, found in runs.items()
    }
    rows = [("trained on", "seeds", *METRICS, "mean, less original's")]
    for name, of in gain.items():
        paired = [own - other for own, other in zip(of["mean"], gain["original"]["mean"], strict=True)]
        rows.append((name, str(len(paired)), *(interval(of[m]) for m in METRICS), interval(paired)))
    return markdown(rows)


def by_kind(runs: dict[str, list[dict]]) -> str:
    """A table of the mean accuracy before and after each training by kind of question, means over seeds."""
    kinds = list(runs["original"][0]["after"]["kinds"])
    states = {"base": [s["before"] for s in runs["original"]]}
    states |= {name: [s["after"] for s in found] for name, found in runs.items()}
    rows = [("trained on", *kinds)]
    for name, scores in states.items():
        means = (average([s["kinds"][kind]["mean"]["value"] for s in scores]) for kind in kinds)
        rows.append((name, *(f"{100 * mean:.1f}" for mean in means)))
    return markdown(rows)


def main(config: Config) -> None:
    check_folder(config.out)
    runs: dict[str, list[dict]] = {}
    for seed in config.seeds:
        own = {mode: str(written(config, mode, seed)) for mode in MODES}
        sets = {"original": "shapes"} | own | {"original+in-context": f"shapes,{own['in-context']}"}
        if config.unfiltered:
            sets["in-context-unfiltered"] = str(written(config, "in-context", seed, "none"))
        for name, data in sets.items():
            runs.setdefault(name, []).append(trained(config, name, data, seed))
    print(f"\nGain over the base, held-out questions of shapes\n\n{gains(runs)}\n\nMean by kind\n\n{by_kind(runs)}")
    for mode in MODES:
        folders = [config.out / f"{mode}-all-{seed}" for seed in config.seeds]
        counts = [json.loads((folder / "summary.json").read_text()) for folder in folders]
        kept, candidates = (sum(c[name] for c in counts) for name in ("kept", "candidates"))
        filters = {
            name: {of: sum(c["filters"][name][of] for c in counts) for of in ("seen", "failed")}
            for name in counts[0]["filters"]
        }
        print(f"\n{mode}: {kept} of {candidates} kept\n\n{synthesize.table({'filters': filters})}\n")
        for folder in folders:
            print(folder)
            synthetic.main(synthetic.Config(questions=folder))


if __name__ == "__main__":
    cli.launch(main, Config)
