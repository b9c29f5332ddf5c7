"""Compares reward variants: offline on rollouts that are there, without a model, or online by training with each.

Offline, on groups of G responses with their vote keys:
    r, A          of each variant and response, as training would compute them (rewards.py)
    signal        share of groups that the variant does not skip and whose rewards differ
    correlation   Pearson, between variants: of r, and of A less its mean in the group
    diagnostics   where gold is there: how r and A separate right responses from wrong ones
upt/compare/offline.py defines each figure. A response is right if its key is that of gold. Nothing here reaches
training.

Online (upt/compare/sweep.py): train_upt.py for each reward and seed, a table of held-out gains and the training curves.

    python ablate.py --rollouts runs/train/rollouts                 # every variant that these shards can serve
    python ablate.py --rollouts runs/judged --rewards "frequency judged judged(t_h=.9)@energy-centred" --out runs/off
    python ablate.py --data shapes --rewards "majority frequency random supervised" --seeds 3 --learning-rate 2e-4
    python ablate.py --model "runs/base-{seed}" --rewards "majority random"     # seed s starts from runs/base-s

A setting that ablate.py does not know goes to train_upt.py.
"""

import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import rewards
from eval.report import page
from upt import compare, model
from upt.errors import SettingError
from upt.files import known_json
from upt.groups import manifests, shards
from upt.groups.variants import split_variants
from upt.ranges import Count, Name, Share
from upt.run import cli
from upt.run.locking import alone
from upt.run.typed import Typed

ONLINE = "majority frequency random"
ONLINE_ONLY = ("data", "model", "steps", "seeds", "jobs", "threads", "train")


@dataclass
class Config(Typed):
    rollouts: Path | None = None
    """folder of rollout shards to compare on, offline; None: compare by training"""
    rewards: Name | None = None
    """variants, parted by commas or blanks: majority judged(t_h=.9)@energy-centred, where @ names an advantage of its
    own; None: offline all that the shards can serve, online majority, frequency and random"""
    advantage: Name | None = None
    """advantage estimator of the variants that name none; None: group-norm offline, train_upt.py's default online"""
    out: Path = Path("runs/ablate")
    """folder for the tables, the figure and, online, the runs"""
    confident: Share = 0.5
    """offline: a majority of at least this share that is wrong counts as spurious"""
    data: Name = "shapes"
    """online: as in train_upt.py; {seed} in it is the run's seed"""
    model: Name | None = None
    """online: as in train_upt.py; {seed} in it is the run's seed: runs/base-{seed}"""
    steps: Count | None = None
    """online: steps of each run; None: train_upt.py's default"""
    seeds: Count = 3
    """online: runs of each variant, with the seeds 0, 1, …"""
    jobs: Count | None = None
    """online: runs at a time, sharing the cores; None: one for each core, or 1 on a machine with a GPU"""
    threads: Count | None = None
    """online: threads of each run; None: an equal share of the cores"""
    train: str = ""
    """online: further settings of train_upt.py in one string; in a shell just add them to the command"""

    def __post_init__(self):
        if isinstance(self.rewards, list | tuple):  # as one writes it in a notebook
            self.rewards = " ".join(self.rewards)
        super().__post_init__()


@dataclass(frozen=True)
class Variant:
    """A reward and, if it is not the default, an advantage estimator; `label` is how the user wrote the two."""

    label: str
    reward: str
    advantage: str | None


def parse(text: str, advantage: str | None) -> list[Variant]:
    """ "majority judged(t_h=.9)@energy" -> variants, whose names and settings are checked here."""
    variants = []
    for label in split_variants(text):
        reward, at, own = label.partition("@")
        variant = Variant(label, reward, own if at else advantage)
        rewards.bind_reward(variant.reward), rewards.bind_advantage(variant.advantage or "group-norm")
        if variant in variants:
            raise SettingError(f"{label} is there twice in {text!r}")
        variants.append(variant)
    if not variants:
        raise SettingError("--rewards names no variant; e.g. --rewards 'majority frequency'")
    return variants


def scores_of(variant: Variant, seed: int) -> "compare.offline.Scores":
    """An empty column of scores for a variant; `seed` is the rollouts', for rewards that draw."""
    return compare.offline.Scores(
        variant.label,
        rewards.bind_reward(variant.reward, run_seed=seed),
        rewards.bind_advantage(variant.advantage or "group-norm"),
        rewards.needs_judge(variant.reward),
        rewards.needs_gold(variant.reward),
        rewards.needs_view(variant.reward),
    )


def offline(config: Config) -> dict:
    """Compare on saved rollouts; writes the tables and the figure to config.out and returns the numbers."""
    idle = [name for name in ONLINE_ONLY if getattr(config, name) != getattr(Config, name)]
    if idle:
        given = config.train if idle == ["train"] else ", ".join(f"--{name}" for name in idle)
        raise SettingError(f"{given}: no setting of a comparison on --rollouts, which trains nothing; leave it out")
    advantage, folder = config.advantage or "group-norm", shards.stage_folder(config.rollouts)
    variants = parse(config.rewards or " ".join(rewards.REWARDS), advantage)
    first = next(iter(shards.ShardReader(folder)))
    has_manifest = (folder / "manifest.json").is_file()
    seed = (manifests.read(folder)["seed"] if has_manifest else None) or 0
    if config.rewards is None and first["gold"] is None:
        variants = [v for v in variants if v.reward != "random"]  # a control of the diagnostics alone
    labels = ", ".join(v.label for v in variants)
    print(f"comparing {labels} on {folder}, advantage {advantage}, into {config.out}", file=sys.stderr)
    scores = [scores_of(v, seed) for v in variants]
    votes, scores, seconds = compare.offline.read(folder, scores, config.rewards is not None)
    table, found = compare.offline.write(config.out, votes, scores, config.confident)
    print(table)
    print(f"{found['data']['groups']} groups, {found['data']['without gold']} of them without gold")
    print(f"what the columns mean, and the rest: {config.out / 'variants.md'}")
    print(", ".join(f"{name} {s:.1f} s" for name, s in seconds.items()))
    return found | {"seconds": seconds}


def online(config: Config) -> dict:
    """Compare by training; returns the table."""
    import train_upt

    def settings(flags: list[str]) -> train_upt.Config:
        asked = cli.parse(train_upt.Config, flags)
        made = (known_json(asked.out / "summary.json") or {}).get("config", {}).get("steps")
        if made is not None and asked.steps not in (None, made):
            raise SettingError(
                f"{config.out} holds a comparison of {made} steps, and --steps says {asked.steps}: give another --out"
            )
        found = train_upt.prepare(replace(asked, gpus=1))  # which has no other processes
        found.gpus = asked.gpus
        model.model_config(found.model)  # raises PolicyError for what is no model, before any run begins
        return found

    table = compare.sweep.main(config, parse(config.rewards or ONLINE, config.advantage), settings)
    if page.at_end(config.out):
        print(f"all of its runs, to be opened in a browser: {config.out / page.NAME}")
    return table


@alone
def main(config: Config) -> dict:
    """Compare offline where there are --rollouts, else online."""
    config = replace(config)
    manifests.check_own(config.out, "ablate")
    return offline(config) if config.rollouts else online(config)


def split_words(text: str) -> list[str]:
    """The words of a command line. Raises SettingError for an open quote."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SettingError(f"--train {text}: {error}; close the quote") from error


def sorted_out(arguments: list[str]) -> list[str]:
    """The command line with what ablate.py does not know, and what --train is given, as one --train=…"""
    known = {f"--{field.name}" for field in fields(Config)} | {"--help", "-h", cli.DEBUG}
    mine, others = [], []
    into, words = mine, iter(arguments)
    for word in words:
        if word.split("=")[0] == "--train":
            others += split_words(word.partition("=")[2] if "=" in word else next(words, ""))
        elif word != "--":
            if word.startswith("--"):
                into = mine if word.split("=")[0] in known else others
            into.append(word)
    return mine + ([f"--train={shlex.join(others)}"] if others else [])


if __name__ == "__main__":
    cli.launch(main, Config, sort=sorted_out)
