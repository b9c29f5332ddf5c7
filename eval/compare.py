r"""Whether two models' scored responses to a benchmark really differ, from the questions that both answered.

    python -m eval.compare A B --out compared.json
    python -m eval.compare runs/a runs/b                                    # after training, by two runs
    python -m eval.compare runs/train/before.json runs/train/after.json     # what a run gained and lost

A and B are score files of eval/score.py, folders that hold `scores.jsonl`, or folders of such folders, one for each
benchmark; or the held-out scores of a run: greedy answers and samples are compared for themselves. Let a_q and b_q be
the shares of right samples of question q, d_q = b_q - a_q, over N questions:

    accuracy     mean of a_q and of b_q
    difference   mean of d_q; 95 % percentile bootstrap interval over questions (Efron & Tibshirani 1993, ch. 13)
    gained, lost questions with d_q > 0 and with d_q < 0
    p            two-sided exact sign test: were gained and lost questions equally likely, Binomial(gained + lost, 1/2).
                 With one sample for each question this is McNemar's exact test (Psychometrika 12, 1947); with more it
                 counts questions whose share rose or fell, and not by how much
    pass@k       mean of 1 - C(n - c, k) / C(n, k), c of n samples being right (arXiv 2107.03374, eq. 1)
    maj@k        the samples in their order, cut into n // k blocks of k: the share of blocks whose most frequent vote
                 key is right. Tied keys share the vote, a key counts as right by the mean verdict of the block's
                 responses that gave it, and a block without a key is wrong. So is, in maj@1, an answer that the
                 protocol took from a response without a vote key: maj@1 can be below the accuracy

Where both sides have their summaries, the benchmark's own figures stand beside each other, each over all questions of
its side. Accuracy and difference are also given for each value of each category. Nothing is corrected for how many
categories or benchmarks are looked at: of twenty that are equal, one is expected to show a difference. The interval of
a handful of questions is too narrow, and that of questions without a change is [0, 0], however few they are.

The last line printed is a JSON object; `--out` has besides the ids gained and lost, the categories, pass@k and maj@k.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from eval.score import figures
from upt.errors import DataError, in_words
from upt.files import check_file, read_json, write_whole
from upt.groups.stats import FEW_NOTE, counted, markdown
from upt.ranges import Seed
from upt.run import cli
from upt.run.typed import Typed

RESAMPLES = 10_000
AT_ONCE = 500  # resamples held in memory
HELD_OUT = {"held-out, greedy": slice(0, 1), "held-out, samples": slice(1, None)}  # of a question's responses
SHOWN = 5  # ids printed of those gained and of those lost
# Of eval.run, those that change what a model says.
SETTINGS = ("prompt", "temperature", "top_p", "top_k", "max_new_tokens", "max_prompt_tokens", "pixels", "split")
DETAILS = ("figures", "gained_ids", "lost_ids", "categories", "at_k")  # in --out, not in the last line

# name: what is expected, and whether a value is that; other fields are not read
FIELDS = {
    "id": ("text", lambda x: isinstance(x, str)),
    "sample": ("a whole number", lambda x: type(x) is int),
    "correct": ("true or false", lambda x: isinstance(x, bool)),
    "vote_key": ("text or null", lambda x: isinstance(x, str | None)),
    "categories": ("lists of texts by name", lambda x: isinstance(x, dict) and all(map(_texts, x.values()))),
}


def _texts(x) -> bool:
    return isinstance(x, list) and all(isinstance(text, str) for text in x)


@dataclass
class Config(Typed):
    a: tyro.conf.Positional[Path]
    """score file, its folder, a folder of benchmarks, or a run: the side to start from"""
    b: tyro.conf.Positional[Path]
    """the same of the other side; differences are B - A"""
    out: Path | None = None
    """JSON file to write the result to; None: print only"""
    seed: Seed = 0
    """of the bootstrap's resamples"""


# --- what is read -----------------------------------------------------------------------------------------------------


def score_files(path: Path) -> dict[str | None, Path]:
    """Score files by benchmark, the folder's name; by None where `path` means a single one.

    Held-out scores of a run go by the names of HELD_OUT. Raises FileNotFoundError where there is none.
    """
    if path.is_file():
        return dict.fromkeys(HELD_OUT, path) if path.suffix == ".json" else {None: path}
    if (path / "scores.jsonl").is_file():
        return {None: path / "scores.jsonl"}
    held_out = dict.fromkeys(HELD_OUT, path / "after.json") if (path / "after.json").is_file() else {}
    files = sorted([*path.glob("*/scores.jsonl"), *path.glob("benchmarks/*/scores.jsonl")])
    if found := held_out | {file.parent.name: file for file in files}:
        return found
    raise FileNotFoundError(
        f"{path}: expected a score file, a folder with scores.jsonl, a folder of such folders, or a finished run with "
        "held-out scores; `python -m eval.score … --out scores.jsonl` writes a score file"
    )


def read_scores(file: Path) -> dict[str, list[dict]]:
    """The rows of each question in the order of their samples, as many for each question.

    Raises ValueError naming file and line of what is broken, missing or there twice.
    """
    questions: dict[str, list[dict]] = {}
    places: dict[tuple[str, int], str] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):  # by \n alone: a string may hold other line ends
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"it is {type(row).__name__}, not an object with fields")
            for name, (expected, holds) in FIELDS.items():
                if not holds(row[name]):
                    raise TypeError(f"{name} is {row[name]!r}, expected {expected}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{where} is no score: {in_words(error)}; score the responses again with eval.score"
            ) from None
        uid, sample = row["id"], row["sample"]
        if (uid, sample) in places:
            raise DataError(
                f"{where}: question {uid!r} has sample {sample} already, in {places[uid, sample]}; drop one"
            )
        places[uid, sample] = where
        questions.setdefault(uid, []).append(row)
    if not questions:
        raise DataError(f"{file} holds no score; write it with `python -m eval.score … --out {file}`")
    first = next(iter(questions))
    for uid, found in questions.items():
        if len(found) != len(questions[first]):
            raise DataError(
                f"{file}: question {uid!r} has {len(found)} samples and question {first!r} has "
                f"{len(questions[first])}; score as many responses to each question"
            )
    return {uid: sorted(found, key=lambda row: row["sample"]) for uid, found in questions.items()}


def held_out_rows(file: Path, part: slice) -> dict[str, list[dict]]:
    """The same as `read_scores` of a run's held-out scores: of every question with gold, some of its responses.

    Raises ValueError for a file without answers.
    """
    fix = "give the held-out scores of a run, such as RUN/after.json, or what `eval.heldout --out` wrote"
    try:
        rows = [row for row in read_json(file, fix)["rows"] if "greedy" in row]
        found = {
            row["uid"]: [
                {"id": row["uid"], "sample": i, "correct": response["correct"], "vote_key": response["key"],
                 "asked": (row["question"], row["gold"]), "categories": {"kind": [row["kind"]]} if row["kind"] else {}}
                for i, response in enumerate(row["responses"][part])
            ]
            for row in rows
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} holds no answers ({in_words(error)}); {fix}") from None
    if not found:
        raise DataError(f"{file} has no question with gold; {fix}")
    return found


def summary_of(file: Path) -> tuple[Path, dict]:
    """What is known of how a score file was made, and where that stands."""
    path = file.with_suffix(".summary.json")
    if file.suffix == ".json" and (manifest := file.parent / "manifest.json").is_file():
        return manifest, {"responses": json.loads(manifest.read_bytes())}
    return path, json.loads(path.read_bytes()) if path.is_file() else {}


def origin(a: Path, b: Path) -> dict:
    """{"benchmark", "protocol", "figures", "settings"} by the summaries beside the score files.

    The first two are None where neither tells. `figures` are the benchmark's own, {"a", "b"}, empty where a side has
    none; `settings` are those of how responses were made and read that differ, {name: [of a, of b]}. Raises ValueError
    where the two sides are not of one benchmark and protocol.
    """
    sides, about = [], {}
    for file in (a, b):
        path = file.with_suffix(".summary.json")
        try:
            path, summary = summary_of(file)
            if not isinstance(summary, dict):
                raise ValueError(f"it is {type(summary).__name__}, not an object with fields")
            made = (summary.get("responses") or {}).get("config") or {}
            known = {name: summary.get(name) for name in ("benchmark", "protocol", "extractor")}
            sides.append((known, {name: made[name] for name in SETTINGS if name in made}, summary.get("metrics") or {}))
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path} is no summary: {error}; score again with eval.score, or remove it") from None
    (known_a, made_a, own_a), (known_b, made_b, own_b) = sides
    for name in ("benchmark", "protocol"):
        if None not in (known_a[name], known_b[name]) and known_a[name] != known_b[name]:
            raise DataError(
                f"{a} and {b} cannot be compared: their summaries say {name} {known_a[name]} and {known_b[name]}; "
                f"score both with the same --{name}"
            )
        about[name] = known_b[name] if known_a[name] is None else known_a[name]
    pairs = {name: [made_a[name], made_b[name]] for name in made_a if name in made_b}
    if None not in (known_a["extractor"], known_b["extractor"]):
        pairs["extractor"] = [known_a["extractor"], known_b["extractor"]]
    about["figures"] = {"a": own_a, "b": own_b} if own_a and own_b else {}
    return about | {"settings": {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}}


# --- what is computed -------------------------------------------------------------------------------------------------


def bootstrap(x: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean of one number for each question with its 95 % percentile interval: {"value", "low", "high"}."""
    # How often each distinct value is drawn is all that a resample's mean depends on, and there are few of them.
    value, count = np.unique(np.asarray(x, dtype=np.float64), return_counts=True)
    rng, share = np.random.default_rng(seed), count / len(x)
    means = [rng.multinomial(len(x), share, AT_ONCE) / len(x) @ value for _ in range(RESAMPLES // AT_ONCE)]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"value": float(share @ value), "low": float(low), "high": float(high)}


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact p of as uneven a split as this one where both ways are equally likely; 1 of nothing."""
    from scipy.stats import binomtest  # here: scipy takes half a second to import

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def pass_at(k: int, right: Sequence[bool]) -> float:
    """The probability that of k samples, drawn without replacement from these n >= k, at least one is right."""
    n, c = len(right), sum(right)
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)  # whole numbers of any size: nothing overflows


def maj_at(k: int, keys: Sequence[str | None], right: Sequence[bool]) -> float:
    """The share of right votes among the n // k votes of k samples each, k <= n; ties and null keys as stated above."""
    votes = []
    for start in range(0, len(keys) - k + 1, k):
        verdicts: dict[str, list[bool]] = {}
        for key, verdict in zip(keys[start : start + k], right[start : start + k], strict=True):
            if key is not None:
                verdicts.setdefault(key, []).append(verdict)
        most = max(map(len, verdicts.values()), default=0)
        tied = [sum(of_key) / most for of_key in verdicts.values() if len(of_key) == most]
        votes.append(sum(tied) / len(tied) if tied else 0.0)
    return sum(votes) / len(votes)


def at_k(a: list[list[dict]], b: list[list[dict]], seed: int) -> list[dict]:
    """pass@k and maj@k of the same questions' rows on both sides, for k = 1, 2, 4, … and each side's n.

    [{"k", "pass": {"a", "b", "difference"}, "maj": {…}}]; of a side with fewer than k samples, None.
    """
    sizes = {len(a[0]), len(b[0])}
    found = []
    for k in sorted(sizes | {2**i for i in range(max(sizes).bit_length()) if 2**i < max(sizes)}):
        passes, majs = [], []
        for side in (a, b):
            usable = [([row["vote_key"] for row in q], [row["correct"] for row in q]) for q in side if len(q) >= k]
            passes.append([pass_at(k, right) for _, right in usable])
            majs.append([maj_at(k, keys, right) for keys, right in usable])
        found.append({"k": k, "pass": paired(*passes, seed), "maj": paired(*majs, seed)})
    return found


def paired(a: Sequence[float], b: Sequence[float], seed: int) -> dict:
    """{"a": mean, "b": mean, "difference": bootstrap of b - a} of numbers in the same order of questions.

    The mean of a side without numbers is None, and so is the difference then.
    """
    mean_a, mean_b = (float(np.mean(x)) if len(x) else None for x in (a, b))
    difference = bootstrap(np.subtract(b, a), seed) if len(a) == len(b) else None
    return {"a": mean_a, "b": mean_b, "difference": difference}


def compare(a: Path, b: Path, seed: int = 0, part: slice | None = None) -> dict:
    """Two score files compared as the docstring above says, or `part` of two held-out ones; shares are from 0 to 1.

    {"benchmark", "protocol", "figures", "settings", "questions", "only_a", "only_b", "samples_a", "samples_b", "a",
    "b", "difference", "gained", "lost", "p", "significant", "gained_ids", "lost_ids", "categories": {name: {value: …}},
    "at_k"}; at_k is empty where each question has one sample. Raises ValueError for files that cannot be compared.
    """
    about = origin(a, b)
    left, right = (read_scores(file) if part is None else held_out_rows(file, part) for file in (a, b))
    # In order of number where ids are numbers, so that the order of lines does not reach the result.
    ids = sorted(left.keys() & right.keys(), key=lambda uid: (len(uid), uid))
    if not ids:
        raise DataError(f"{a} and {b} have no question in common; compare responses to the same benchmark")
    for uid in ids:
        if left[uid][0].get("asked") != right[uid][0].get("asked"):
            raise DataError(f"{a} and {b}: question {uid!r} is another one in each; compare runs with the same --seed")
    labels = {uid: left[uid][0]["categories"] for uid in ids}
    for uid in ids:
        if any(row["categories"] != labels[uid] for row in left[uid] + right[uid]):
            raise DataError(f"{a} and {b}: the categories of question {uid!r} differ; score both with the same --data")
    share_a, share_b = (
        {uid: sum(row["correct"] for row in side[uid]) / len(side[uid]) for uid in ids} for side in (left, right)
    )

    def of(chosen: list[str]) -> dict:
        return paired([share_a[uid] for uid in chosen], [share_b[uid] for uid in chosen], seed)

    categories: dict[str, dict[str, dict]] = {}
    for name in dict.fromkeys(name for label in labels.values() for name in label):
        values = sorted({value for label in labels.values() for value in label.get(name, ())})
        chosen = {value: [uid for uid in ids if value in labels[uid].get(name, ())] for value in values}
        categories[name] = {value: {"questions": len(chosen[value])} | of(chosen[value]) for value in values}
    gained = [uid for uid in ids if share_b[uid] > share_a[uid]]
    lost = [uid for uid in ids if share_b[uid] < share_a[uid]]
    samples = len(left[ids[0]]), len(right[ids[0]])
    p = sign_test(len(gained), len(lost))
    return about | {
        "questions": len(ids), "only_a": len(left) - len(ids), "only_b": len(right) - len(ids),
        "samples_a": samples[0], "samples_b": samples[1], **of(ids),
        "gained": len(gained), "lost": len(lost), "p": p, "significant": p < 0.05,
        "gained_ids": gained, "lost_ids": lost, "categories": categories,
        "at_k": at_k([left[uid] for uid in ids], [right[uid] for uid in ids], seed) if max(samples) > 1 else [],
    }  # fmt: skip


# --- what is printed --------------------------------------------------------------------------------------------------


def _cells(scores: dict) -> list[str]:
    """Per cent: A, B and the difference with its interval."""
    cells = ["" if scores[side] is None else f"{100 * scores[side]:.2f}" for side in ("a", "b")]
    if scores["difference"] is None:
        return [*cells, ""]
    # Adding 0.0 makes a rounded -0.0 positive.
    value, low, high = (f"{round(100 * x, 2) + 0.0:+.2f}" for x in scores["difference"].values())
    return [*cells, f"{value} [{low}, {high}]"]


def verdict(found: dict) -> str:
    """What the test says, in a sentence."""
    test = "McNemar's exact test" if found["samples_a"] == found["samples_b"] == 1 else "exact sign test"
    counts = f"B gained {found['gained']} and lost {found['lost']} of {found['questions']} questions"
    if not found["significant"]:
        return f"The difference is not significant at 5 % ({test}, p = {found['p']:.3g}): {counts}."
    up = found["gained"] > found["lost"]
    text = f"B is significantly {'better' if up else 'worse'} than A at 5 % ({test}, p = {found['p']:.3g}): {counts}"
    # A sign test does not weigh the questions: many small gains can stand beside a lower mean.
    agrees = found["difference"]["value"] * (1 if up else -1) > 0
    return f"{text}." if agrees else f"{text}, though its accuracy is not {'higher' if up else 'lower'}."


def report(found: dict) -> str:
    """The tables and the verdict of one comparison."""
    samples = f"samples for each: A {found['samples_a']}, B {found['samples_b']}"
    alone = f"left out: {found['only_a']} that only A has, {found['only_b']} that only B has"
    table = [("", "", "questions", "A", "B", "B - A, 95 %"), ("all", "", counted(found["questions"]), *_cells(found))]
    for name, values in found["categories"].items():
        table += [(name, value, counted(scores["questions"]), *_cells(scores)) for value, scores in values.items()]
    parts = [f"{found['questions']} questions; {samples}; {alone}", markdown(table)]
    parts += [FEW_NOTE] * any(row[2].endswith("*") for row in table)
    if found["figures"]:  # of all questions of each side, as its owners give them
        own_a, own_b = (dict(figures(found["figures"][side])) for side in "ab")
        lines = [(name, own_a[name], own_b[name]) for name in own_a if name in own_b]
        parts.append(markdown([("figure", "A", "B"), *lines]))
    if found["at_k"]:
        head = [("", "A", "B", "B - A, 95 %")]
        lines = [(f"{m}@{row['k']}", *_cells(row[m])) for m in ("pass", "maj") for row in found["at_k"]]
        parts.append(markdown(head + lines))
    for which in ("gained", "lost"):
        ids = found[f"{which}_ids"]
        parts.append(f"{which}: {len(ids)}" + (f" ({', '.join(ids[:SHOWN])}{', …' * (len(ids) > SHOWN)})" * bool(ids)))
    return "\n\n".join([*parts, verdict(found)])


def main(config: Config) -> dict:
    """Compare, write `out`, print; returns {"a", "b", "seed", "benchmarks": {name: what compare returns}}."""
    config = replace(config)
    if config.out is not None:
        check_file(config.out)
    a, b = score_files(config.a), score_files(config.b)
    if not (common := [name for name in a if name in b]):
        raise DataError(
            f"{config.a} and {config.b} have no benchmark in common; name two score files, or two folders that hold "
            "benchmarks of the same names"
        )
    for side, mine, other in (("A", a, b), ("B", b, a)):
        for name in sorted(mine.keys() - other.keys()):
            print(f"{name}: only {side} has it, left out ({mine[name]})", file=sys.stderr)
    found = {}
    for name in common:
        scores = compare(a[name], b[name], config.seed, HELD_OUT.get(name))
        found[name or scores["benchmark"] or "scores"] = scores
    result = {"a": str(config.a), "b": str(config.b), "seed": config.seed, "benchmarks": found}
    if config.out:
        write_whole(config.out, [json.dumps(result, indent=2).encode() + b"\n"])
    print(f"A: {config.a}\nB: {config.b}\n")
    for name, scores in found.items():
        protocol = f", {scores['protocol']} protocol" if scores["protocol"] else ""
        print(f"{name}{protocol}: {report(scores)}\n")
        if differ := [f"{key} {x} and {y}" for key, (x, y) in scores["settings"].items()]:
            print(f"A and B were not made alike: {', '.join(differ)}\n")
    short = {name: {k: v for k, v in scores.items() if k not in DETAILS} for name, scores in found.items()}
    print(json.dumps(result | {"benchmarks": short}))
    return result


if __name__ == "__main__":
    cli.launch(main, Config)
