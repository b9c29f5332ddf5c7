r"""How good are self-written questions to embedded pictures? Diagnostics only: nothing here is trained on.

The scene of a picture of `shapes` or `shapes-hard` is known, so a question that a model wrote to it can be understood
and answered by the generator (upt/data/shapes.py). Reported, of all candidates of a folder that synthesize.py wrote and
of those kept:

    valid          share that are questions of `shapes` which their picture answers
    new            share of the valid ones that ask for something else than their source
    accuracy       share of right responses to the valid ones that were answered: the lower, the harder
    label          share of right majority answers among those that have one: the accuracy of the pseudo-labels

by kind, too. The last two need responses, which `--filters none` does not sample.

    python -m eval.synthetic --questions runs/questions
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from upt import data
from upt.answers import answer_key
from upt.data import shapes
from upt.errors import DataError, in_words
from upt.groups import manifests, shards
from upt.groups.stats import average, markdown
from upt.groups.votes import keys_of, majority_key
from upt.run import cli
from upt.run.typed import Typed


@dataclass
class Config(Typed):
    questions: Path = Path("runs/questions")
    """folder that synthesize.py wrote, from --data shapes or shapes-hard"""


def diagnose(candidate: dict, item: shapes.Item, group: dict | None) -> dict:
    """What the scene says of a candidate to `item`'s picture and, where it was answered, of the responses to it.

    {"kept", "valid", "kind", "new", "accuracy", "label"}; the last four are None where there is nothing to say.
    """
    found = {"kept": candidate["kept"], "valid": False, "kind": None, "new": None, "accuracy": None, "label": None}
    if understood := shapes.understand(item.scene, candidate["question"]):
        kind, names, _ = understood
        found |= {"valid": True, "kind": kind, "new": (kind, {*names}) != (item.kind, {*item.names})}
        if group:
            gold, majority = answer_key(str(shapes.worked(*understood)[1])), majority_key(group)
            found["accuracy"] = average([key == gold for key in keys_of(group)])
            found["label"] = None if majority is None else majority == gold
    return found


def row(name: str, found: list[dict]) -> tuple[str, ...]:
    """A line of the table: how many, and the mean of each figure in per cent over those that have it."""
    means = [average([c[key] for c in found if c[key] is not None]) for key in ("valid", "new", "accuracy", "label")]
    return (name, str(len(found)), *("" if mean is None else f"{100 * mean:.1f}" for mean in means))


def main(config: Config) -> list[dict]:
    """Print the table; returns what was found of each candidate."""
    config = replace(config)
    asked = manifests.read(config.questions)["config"]
    name = asked.get("data")
    if name not in shapes.LEVELS:
        sets = " and ".join(shapes.LEVELS)
        raise DataError(f"{config.questions} is about {name}; only the pictures of {sets} have known scenes")
    if not (config.questions / "summary.json").is_file():
        raise DataError(f"{config.questions}: synthesize.py has not finished these questions; give its command again")
    split = data.ALIASES.get(asked["split"], asked["split"])
    items = {item.uid: item for item in shapes.questions(split, asked["seed"], asked["limit"], name)}
    paths = shards.list_shards(config.questions / "answered")
    groups = {group["uid"]: group for path in paths for group in shards.read_shard(path)}
    path = config.questions / "provenance.jsonl"
    try:
        candidates = [json.loads(line) for line in path.read_text().splitlines()]
        found = [diagnose(c, items[c["source"]], groups.get(c["uid"])) for c in candidates]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: a line is no question of these ({in_words(error)}); run synthesize.py again"
        ) from error
    kept = [c for c in found if c["kept"]]
    rows = [row("candidates", found), row("kept", kept)]
    rows += [row(f"kept, {kind}", [c for c in kept if c["kind"] == kind]) for kind in shapes.KINDS]
    print(markdown([("", "questions", "valid", "new", "accuracy", "label"), *rows]))
    print(
        "in per cent; valid: of all; new: of the valid; accuracy and label: of the valid that were answered "
        "(eval/synthetic.py says what these are)"
    )
    return found


if __name__ == "__main__":
    cli.launch(main, Config)
