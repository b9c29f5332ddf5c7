"""The comparison of rewards: its statistics by hand and by loops, what offline mode writes, and sweeps of tiny runs."""

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rewards
from ablate import Config, main, parse, scores_of
from tests.test_shards import make_group
from upt.compare import offline, sweep
from upt.compare.offline import Scores, Votes, statistics
from upt.errors import RunsFailed, Stopped, UserError
from upt.groups import shards, stats
from upt.groups.stats import Groups
from upt.run import processes

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG"


def groups_of(*keys, **fields) -> list[dict]:
    """One group for each string of keys, "." being an abstention; gold is 7."""
    return [
        make_group(uid=f"x/train/{i:06d}", keys=tuple(None if key == "." else key for key in row), **fields)
        for i, row in enumerate(keys)
    ]


# A right majority, a wrong one, unanimity, no majority; all is lost on the last, which has no gold.
FIVE = groups_of("7778", "8887", "7777", "127.") + groups_of("1234", gold=None)


def scored(groups: list[dict], label: str) -> tuple[Scores, Votes]:
    score, votes = scores_of(*parse(label, None), seed=3), Votes()
    for group in groups:
        score.add(group)
        votes.add(group)
    score.close()
    votes.close()
    return score, votes


def write(folder: Path, groups: list[dict], per_shard: int = 3) -> Path:
    for step in range(0, len(groups), per_shard):
        shards.write_shard(shards.shard_path(folder, step), groups[step : step + per_shard])
    return folder


# --- statistics by hand -----------------------------------------------------------------------------------------------


def test_summary_of_the_votes():
    summary = scored(FIVE, "majority")[1].summary(0.5)
    assert summary == pytest.approx({
        "groups": 5, "responses": 20, "without gold": 1,
        "majority share": (0.75 + 0.75 + 1 + 0.25 + 0.25) / 5,
        "abstentions": 1 / 20,
        "right responses": (3 + 1 + 4 + 1) / 16,
        "right majorities": (1 + 0 + 1 + 1 / 3) / 4,  # of three tied answers one is right
        "mixed groups": 3 / 4,
        "spurious majorities": 1 / 4,
    })  # fmt: skip
    assert scored(FIVE, "majority")[1].summary(0.75)["spurious majorities"] == 1 / 4
    assert scored(FIVE, "majority")[1].summary(0.76)["spurious majorities"] == 0
    # Two answers at .5 each are no majority, and neither is silence.
    assert scored(groups_of("8899", "...."), "majority")[1].summary(0.0)["spurious majorities"] == 0
    assert scored(groups_of("1234", gold=None), "majority")[1].summary(0.5)["right responses"] is None


EXPECTED = {
    "majority": {  # rewards 1110 1110 1111 0000 0000
        "signal": 2 / 5, "skipped": 0, "mean": 0.5, "std": 0.5,
        "label acc": (1 + 0 + 1 + 1 / 4) / 4, "label acc, signal": (1 + 0) / 2,
        "reward acc": (4 + 0 + 4 + 3) / 16,  # the share of r = right
        "AUC": (7 * 4 + (7 * 3 + 2 * 4) / 2) / (9 * 7),  # right: 7 of 1, 2 of 0; wrong: 3 of 1, 4 of 0
        "AUC in group": (1 + 0 + 0.5) / 3, "right way": 1 / 3, "no way": 1 / 3, "to spurious": 1 / 4,
    },
    "frequency": {  # .75 .75 .75 .25, the same, 1 1 1 1, .25 .25 .25 0, .25 four times
        "signal": 3 / 5, "skipped": 0, "mean": 10.75 / 20,
        "std": math.sqrt((6 * 0.75**2 + 2 * 0.25**2 + 4 + 3 * 0.25**2 + 4 * 0.25**2) / 20 - (10.75 / 20) ** 2),
        "label acc": (1 + 0 + 1 + 1 / 3) / 4, "label acc, signal": (1 + 0 + 1 / 3) / 3,
        "reward acc": (4 + 0 + 4 + 2) / 16,
        "AUC in group": (1 + 0 + (1 + 0.5 + 0.5) / 3) / 3, "right way": 2 / 3, "no way": 0, "to spurious": 1 / 4,
    },
    "confident-majority": {  # the last two groups are skipped
        "signal": 2 / 5, "skipped": 2 / 5, "mean": 10 / 12, "label acc": 2 / 3, "reward acc": 8 / 12,
        "AUC in group": 1 / 2, "right way": 1 / 2, "no way": 0, "to spurious": 1 / 4,
    },
    "supervised": {"label acc": (1 + 1 + 1 + 1) / 4, "reward acc": 1, "AUC": 1, "right way": 1, "to spurious": 0},
    "majority@energy": {"right way": 1 / 3, "no way": 1 / 3, "to spurious": 1 / 4},  # advantages below 0 throughout
    "majority(min_share=.9)": {"signal": 0, "skipped": 4 / 5, "mean": 1, "label acc": 1, "label acc, signal": None,
                               "AUC": None, "AUC in group": None, "right way": None, "to spurious": 0},
    "majority(min_share=.8,max_share=.9)": {"skipped": 1, "mean": None, "label acc": None, "to spurious": None},
}  # fmt: skip


@pytest.mark.parametrize("label", EXPECTED)
def test_statistics_by_hand(label):
    row = statistics(*scored(FIVE[: 4 if label == "supervised" else 5], label), confident=0.5)
    for name, value in EXPECTED[label].items():
        assert row[name] == (value if value is None else pytest.approx(value, abs=1e-12)), name


def test_without_gold_there_are_no_diagnostics():
    row = statistics(*scored(groups_of("1123", "1234", gold=None), "majority"), confident=0.5)
    assert row["signal"] == 1 / 2 and row["mean"] == 2 / 8
    assert all(row[name] is None for name in offline.COLUMNS if name not in offline.UNGRADED)


def test_groups_of_different_sizes():
    groups, r = Groups([2, 1, 4]), np.array([1.0, 2.0, 5.0, 0.1, 0.1, 0.1, 0.1])
    assert groups.mean(r).tolist() == pytest.approx([1.5, 5, 0.1])
    assert groups.max(r).tolist() == [2, 5, 0.1] and groups.differ(r).tolist() == [True, False, False]
    right = np.array([False, True, True, True, False, False, False])
    assert stats.auc(r, right, groups).tolist() == [1, 0.5]
    assert stats.top_correctness(r, right, groups).tolist() == [1, 1, 0.25]
    assert stats.direction(-r, right, groups).tolist() == [-1, 0]  # (.1 + .1 + .1) / 3 is not .1 in floating point
    rest, mask = groups.only(np.array([True, False, True]))
    assert rest.sizes.tolist() == [2, 4] and mask.tolist() == [True, True, False, True, True, True, True]


def test_pearson():
    x = np.array([0.0, 0, 1, 1])
    assert stats.pearson(x, np.array([0.0, 1, 0, 1])) == pytest.approx(0)
    assert stats.pearson(x, 3 - 2 * x) == pytest.approx(-1)
    assert stats.pearson(x, np.array([0.0, 0, 0, 1])) == pytest.approx(1 / math.sqrt(3))
    assert stats.pearson(x, np.full(4, 0.1 + 0.2)) is None and stats.pearson(x[:0], x[:0]) is None


def test_correlations_leave_out_what_one_of_the_two_skips():
    labels = ("majority", "frequency", "confident-majority(tau=.8)", "frequency(min_share=0,max_share=.1)")
    parts = [scored(FIVE, label) for label in labels]
    matrices = offline.correlations([score for score, _ in parts], parts[0][1].groups)
    majority, often = [*([1, 1, 1, 0] * 2), *[1] * 4, *[0] * 8], [*([0.75] * 3 + [0.25]) * 2, *[1] * 4]
    often += [0.25, 0.25, 0.25, 0, *[0.25] * 4]
    assert matrices["reward"][0][1] == matrices["reward"][1][0] == pytest.approx(np.corrcoef(majority, often)[0, 1])
    assert matrices["reward"][0][2] is None  # only unanimity is left, where both are constant
    assert matrices["reward"][3] == [None] * 4
    centred = np.array([[0.5, 0.5, 0.5, -1.5] * 2 + [0] * 12, [0.5, 0.5, 0.5, -1.5] * 2 + [0] * 12], dtype=float)
    centred[1, 12:16] = 0.5, 0.5, 0.5, -1.5  # group-norm of .25 .25 .25 0
    assert matrices["advantage"][0][1] == pytest.approx(np.corrcoef(centred)[0, 1], abs=1e-5)
    assert matrices["advantage"][0][0] == pytest.approx(1) and matrices["advantage"][0][2] is None


def test_what_energy_takes_from_a_whole_group_does_not_enter_the_correlation():
    parts = [scored(FIVE, label) for label in ("majority@mean", "majority@energy", "majority@energy-centred")]
    matrix = offline.correlations([score for score, _ in parts], parts[0][1].groups)["advantage"]
    assert np.array(matrix) == pytest.approx(np.ones((3, 3)))


@pytest.mark.parametrize("label", ["confident-majority@energy(beta=2)", "random", "judged@rloo"])
def test_scores_are_those_of_training(label):
    groups = some_groups(30)
    (score, _), variant = scored(groups, label), parse(label, None)[0]
    expected = rewards.score(groups, variant.reward, variant.advantage or "group-norm", seed=3)
    for array, name in ((score.r, "reward"), (score.A, "advantage")):
        assert array.tolist() == [response[name] for group in expected for response in group["responses"]]
    assert score.skipped.tolist() == [group.get("skipped", False) for group in expected]


def test_t_interval():
    assert stats.t_interval([1, 2, 3]) == pytest.approx((2, 4.302652729911275 / math.sqrt(3)))
    assert stats.t_interval([0.25]) == (0.25, None)


# --- statistics by loops ----------------------------------------------------------------------------------------------


def some_groups(n: int) -> list[dict]:
    draw = random.Random(5)
    found = []
    for i in range(n):
        keys = draw.choices(["7", "8", "9", "10", None], weights=[4, 2, 2, 1, 1], k=draw.choice([2, 5, 8]))
        if draw.random() < 0.15:
            keys = [keys[0]] * len(keys)
        group = make_group(uid=f"x/train/{i:06d}", step=i, keys=tuple(keys), gold=draw.choice(["7", "7.0", "8", None]))
        for response in group["responses"]:
            response |= {"self_certainty": draw.choice([1.0, 2.0, draw.random()]), "entropy": draw.random()}
            response["judge"] = {"score": draw.random(), "parsed": True}
        found.append(group)
    return found


def by_loops(groups: list[dict], variant, confident: float) -> dict:
    """The definitions of COLUMNS, one response at a time, on what rewards.score says."""
    groups = rewards.score(groups, variant.reward, variant.advantage or "group-norm", seed=3)
    kept = [g for g in groups if not g.get("skipped")]
    every = [x["reward"] for g in kept for x in g["responses"]]
    mean = math.fsum(every) / len(every)
    tops, tops_signal, hits, ways, aucs, pushed = [], [], [], [], [], []
    good, bad = [], []
    for g in groups:
        if g["gold"] is None:
            continue
        gold = "7" if g["gold"].startswith("7") else "8"
        r, A = ([x[name] for x in g["responses"]] for name in ("reward", "advantage"))
        keys = [x["key"] for x in g["responses"]]
        m, right = rewards.majority_key(keys), [key == gold for key in keys]
        mine = [a for a, key in zip(A, keys) if key == m]
        spurious = m is not None and m != gold and keys.count(m) / len(keys) >= confident
        pushed.append(spurious and sum(mine) / len(mine) > sum(A) / len(A) + 1e-9)
        if g.get("skipped"):
            continue
        best = [ok for ok, x in zip(right, r) if x == max(r)]
        tops.append(sum(best) / len(best))
        bar = mean
        if min(r) < max(r):
            tops_signal.append(tops[-1])
            bar = sum(r) / len(r)
        hits += [(x > bar + 1e-9) == ok for x, ok in zip(r, right)]
        one, two = [x for x, ok in zip(r, right) if ok], [x for x, ok in zip(r, right) if not ok]
        good, bad = good + one, bad + two
        if one and two:
            aucs.append(np.mean([(x > y) + 0.5 * (x == y) for x in one for y in two]))
            gap = np.mean([a for a, ok in zip(A, right) if ok]) - np.mean([a for a, ok in zip(A, right) if not ok])
            ways.append(0 if abs(gap) < 1e-9 else gap)
    return {
        "signal": sum(len({x["reward"] for x in g["responses"]}) > 1 for g in kept) / len(groups),
        "skipped": 1 - len(kept) / len(groups),
        "mean": mean,
        "std": math.sqrt(sum((x - mean) ** 2 for x in every) / len(every)),
        "label acc": np.mean(tops),
        "label acc, signal": np.mean(tops_signal),
        "reward acc": np.mean(hits),
        "AUC": np.mean([(x > y) + 0.5 * (x == y) for x in good for y in bad]),
        "AUC in group": np.mean(aucs),
        "right way": np.mean([w > 0 for w in ways]),
        "no way": np.mean([w == 0 for w in ways]),
        "to spurious": np.mean(pushed),
    }


@pytest.mark.parametrize(
    "label",
    ["majority", "frequency@rloo", "confident-majority", "judged@energy", "self-certainty", "random", "dirichlet@mean",
     "majority(lam_fmt=.3,min_share=.3,max_share=.9)@energy-centred"],
)  # fmt: skip
def test_statistics_by_loops(label):
    groups = some_groups(200)
    row = statistics(*scored(groups, label), confident=0.6)
    assert row == pytest.approx(by_loops(groups, parse(label, None)[0], 0.6), abs=1e-9)


# --- offline ----------------------------------------------------------------------------------------------------------


def test_specs_are_parsed_and_checked():
    one, two = parse("majority, frequency(lam_fmt=.1)@energy(beta=2)", "rloo")
    assert (one.label, one.reward, one.advantage) == ("majority", "majority", "rloo")
    assert two.label == "frequency(lam_fmt=.1)@energy(beta=2)"
    assert (two.reward, two.advantage) == ("frequency(lam_fmt=.1)", "energy(beta=2)")
    for text, message in {
        "majorty": "no reward is called 'majorty'", "majority@rlo": "no advantage is called 'rlo'", " ": "no variant",
        "majority majority": "twice",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse(text, None)


def test_offline_writes_tables_and_figure(tmp_path, capsys):
    rollouts = write(tmp_path / "rollouts", some_groups(40))
    labels = ["majority", "judged(t_h=.9)@energy-centred", "random(seed=4)", "confident-majority(tau=1)"]
    config = Config(rollouts=rollouts, rewards=" ".join(labels), out=tmp_path / "a")
    found = main(config)
    with open(tmp_path / "a" / "variants.csv") as file:
        rows = [*csv.DictReader(file)]
    assert [row["variant"] for row in rows] == labels
    for row in rows:
        read = {name: float(row[name]) if row[name] else None for name in offline.COLUMNS}
        assert read == found["variants"][row["variant"]]
    with open(tmp_path / "a" / "correlation.csv") as file:
        rows = [*csv.reader(file)]
    assert rows[0] == ["of", "variant", *labels] and len(rows) == 1 + 2 * len(labels)
    assert rows[4] == ["reward", labels[3], "", "", "", ""]  # nothing but unanimity, always 1: no correlation
    assert float(rows[1][4]) == found["correlation"]["reward"][0][2]
    shown, text = capsys.readouterr().out, (tmp_path / "a" / "variants.md").read_text()
    assert f"| majority | {100 * found['variants']['majority']['signal']:.1f} |" in shown and "reading" in shown
    assert shown.split("\n\n")[0].split("\n40 groups")[0] in text
    assert (tmp_path / "a" / "reward-by-share.png").read_bytes().startswith(PNG)
    main(Config(**vars(config) | {"out": tmp_path / "b"}))
    for name in ("variants.csv", "correlation.csv", "variants.md", "reward-by-share.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_figure_shows_mean_rewards_by_share():
    score, votes = scored(FIVE, "frequency")
    page = offline.figure([score], votes)
    right, wrong, unknown = page.axes[1].lines
    assert right.get_xydata().tolist() == [[0.25, 0.25], [0.75, pytest.approx((3 * 0.75 + 0.25) / 4)], [1, 1]]
    assert wrong.get_xydata().tolist() == [[0.25, pytest.approx(0.5 / 3)], [0.75, pytest.approx((0.25 + 3 * 0.75) / 4)]]
    assert unknown.get_xydata().tolist() == [[0.25, 0.25]]
    skips = offline.figure([scored(FIVE, "confident-majority")[0]], votes)
    shown = [line.get_xdata().tolist() for line in skips.axes[1].lines]
    assert shown == [[0.75, 1], [0.75], []]  # the groups of p(m) = .25 are skipped
    heights = [sum(bar.get_height() for bar in bars) for bars in page.axes[0].containers]
    assert heights == [9, 7, 4]


def test_default_variants_are_those_that_the_shards_serve(tmp_path, capsys):
    def chosen(name: str, groups: list[dict]) -> list[str]:
        return [*main(Config(rollouts=write(tmp_path / name, groups), out=tmp_path / "out"))["variants"]]

    every, judged = list(rewards.REWARDS), ("judged", "judge-only")
    assert chosen("all", [group | {"gold": "7"} for group in some_groups(6)]) == every
    blind = chosen("blind", groups_of("1123", gold=None))
    assert blind == [name for name in every if name not in (*judged, "supervised", "random")]
    # A later group without gold takes `supervised` out, `random` stays for the groups that have it.
    capsys.readouterr()
    assert chosen("some", FIVE) == [name for name in every if name not in (*judged, "supervised")]
    assert "left out: supervised needs gold" in capsys.readouterr().err
    pictured = [group | {"image": "images/a.png"} for group in FIVE]
    assert "two-view" in chosen("none has a picture", FIVE) and "two-view" not in chosen("one view", pictured)
    assert "left out: two-view needs two views of the picture; sample with `--view" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rewards": "majority judged(t_h=.9)"}, r"judged\(t_h=.9\) needs a judge's scores.*judge.py.*x/train/000000"),
        ({"rewards": "majority supervised"}, "supervised needs gold answers.*leave this variant out.*x/train/000000"),
        ({"rewards": "majority", "steps": 3}, "--steps: no setting of a comparison on --rollouts"),
        ({"rewards": "majority", "train": "--learning-rate 1"}, "--learning-rate 1: no setting"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_written(tmp_path, settings, message):
    rollouts = write(tmp_path / "rollouts", groups_of("1123", gold=None) + FIVE)
    with pytest.raises(ValueError, match=message):
        main(Config(rollouts=rollouts, out=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_offline_needs_no_torch_and_takes_its_own_settings_only(tmp_path):
    write(tmp_path / "rollouts", FIVE)
    code = (
        "import sys, ablate; from pathlib import Path; folder = Path(sys.argv[1]); "
        "ablate.main(ablate.Config(rollouts=folder / 'rollouts', out=folder / 'out')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True).returncode == 0
    flags = ["--rollouts", str(tmp_path / "rollouts"), "--out", str(tmp_path / "out2"), "--learning-rate", "1e-4"]
    done = subprocess.run([sys.executable, "ablate.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "--learning-rate 1e-4: no setting of a comparison" in done.stderr


# --- online -----------------------------------------------------------------------------------------------------------

SMALL = (
    "--questions-per-step 3 --group-size 4 --max-new-tokens 8 --lora-rank 2 --lora-alpha 4 --learning-rate 1e-2 "
    "--eval-questions 4 --eval-samples 2"
)


@pytest.mark.slow
def test_a_sweep_of_tiny_runs(tiny, tmp_path, capsys):
    out = tmp_path / "sweep"
    config = Config(rewards="random random@mean", model=tiny, steps=2, seeds=2, jobs=2, out=out, train=SMALL)
    table = main(config)
    folders = {(v, s): out / v / f"seed-{s}" for v in ("random", "random@mean") for s in (0, 1)}
    summaries = {key: json.loads((folder / "summary.json").read_text()) for key, folder in folders.items()}
    # One evaluation of the base for each seed.
    for seed in (0, 1):
        pair = [folders[v, seed] for v in ("random", "random@mean")]
        assert (pair[0] / "before.json").read_bytes() == (pair[1] / "before.json").read_bytes()
        assert sum("held out, before" in (folder / "log.txt").read_text() for folder in pair) == 1
    assert summaries["random", 0]["before"] != summaries["random", 1]["before"]
    assert summaries["random@mean", 1]["config"]["advantage"] == "mean"
    assert summaries["random", 1]["config"]["advantage"] == "group-norm"
    assert summaries["random", 1]["config"]["seed"] == 1 and summaries["random", 0]["config"]["lora_rank"] == 2
    # The table, from the summaries by hand: of two values, half the interval is t(.975, 1) |x - y| / 2.
    with open(out / "table.csv") as file:
        rows = {row["reward"]: row for row in csv.DictReader(file)}
    assert [*rows] == ["base", "random", "random@mean"] and rows["random"]["seeds"] == "2"
    for name in sweep.SCORES:
        values = {when: [summaries["random", s][when][name]["value"] for s in (0, 1)] for when in ("before", "after")}
        gains = [after - before for before, after in zip(*values.values(), strict=True)]
        for column, (x, y) in {name: values["after"], f"{name}_gain": gains}.items():
            assert float(rows["random"][column]) == pytest.approx((x + y) / 2), column
            assert float(rows["random"][f"{column}_half"]) == pytest.approx(12.706204736 * abs(x - y) / 2), column
        assert float(rows["base"][name]) == pytest.approx(sum(values["before"]) / 2)
        assert rows["base"][f"{name}_gain"] == ""
    assert table["random"]["gain"]["length"][0] == pytest.approx(float(rows["random"]["length_gain"]))
    text = (out / "table.md").read_text()
    assert f"| random@mean | 2 | {100 * float(rows['random@mean']['greedy']):.1f} ± " in text
    assert text in capsys.readouterr().out
    assert (out / "curves.png").read_bytes().startswith(PNG)
    assert "random@mean/seed-1" in (out / "report.html").read_text()

    # One run is lost: it alone is made again, on the base that its seed's other run has.
    times = {key: (folder / "summary.json").stat().st_mtime_ns for key, folder in folders.items()}
    lost = folders["random@mean", 1]
    shutil.rmtree(lost)
    assert main(config) == table
    assert {key for key, folder in folders.items() if (folder / "summary.json").stat().st_mtime_ns != times[key]} == {
        ("random@mean", 1)
    }
    assert "held out, before" not in (lost / "log.txt").read_text()
    assert "3 of 4 runs are finished already" in capsys.readouterr().err
    # Other settings want another folder.
    with pytest.raises(ValueError, match="sweep holds a comparison of 2 steps, and --steps says 3: give another --out"):
        main(Config(**vars(config) | {"steps": 3}))


STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, reward = Path(given["--out"]), given["--reward"]
(out / "manifest.json").write_text("{}")
print("threads", os.environ["OMP_NUM_THREADS"])
print("given", given["--seed"], given["--model"], given["--data"], given.get("--learning-rate"))
print("gpus", given.get("--gpus"))
if reward == "random(seed=8)":
    signal.signal(signal.SIGTERM, lambda *_: ((out / "asked").touch(), sys.exit(143)))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if reward == "random(seed=9)":
    sys.exit("no luck with this reward")
if not (out / "before.json").exists():
    print("evaluating the base")
    time.sleep(0.5)
    (out / "before.json").write_text('{"greedy": {"value": 0.5}}')
row = {"entropy": 0.5, "length": 3, "majority_share": 0.5}
(out / "metrics.jsonl").write_text("".join(json.dumps(row | {"step": step}) + chr(10) for step in (0, 1)))
before = json.loads((out / "before.json").read_text())
(out / "summary.json").write_text(json.dumps({"before": before, "after": {"greedy": {"value": 0.75}}}))
"""


@pytest.fixture
def stand_in(tiny, tmp_path, monkeypatch):
    """Settings of a sweep whose runs are a script that pretends."""
    (tmp_path / "train.py").write_text(STAND_IN)
    (tmp_path / "model").mkdir()
    shutil.copy(Path(tiny) / "config.json", tmp_path / "model")
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(sweep, "POLL", 0.02)
    return {"model": str(tmp_path / "model"), "steps": 2, "out": tmp_path / "out"}


def test_a_failed_run_is_reported_and_the_others_go_on(stand_in, capsys):
    with pytest.raises(RunsFailed, match="2 of 6 runs failed"):
        main(Config(rewards="random(seed=9) majority frequency", seeds=2, jobs=2, **stand_in))
    shown = capsys.readouterr()
    assert "FAILED random(seed=9), seed 1" in shown.err and "    no luck with this reward" in shown.err
    assert "| majority | 2 | 75.0 ± 0.0 |" in shown.out and "| random(seed=9) | 0 | – |" in shown.out
    assert "| majority | 2 | +25.0 ± 0.0 |" in shown.out and "| base | 2 | 50.0 ± 0.0 |" in shown.out
    # The first run of a seed failed before it had evaluated the base: the next one did, once.
    logs = {path.parent: path.read_text() for path in stand_in["out"].rglob("log.txt")}
    assert sum("evaluating the base" in log for log in logs.values()) == 2 and len(logs) == 6
    assert all(f"threads {max(1, len(os.sched_getaffinity(0)) // 2)}\n" in log for log in logs.values())


def test_each_seed_may_have_a_base_and_data_of_its_own(stand_in, tmp_path, capsys):
    for seed in (0, 1):
        shutil.copytree(stand_in["model"], tmp_path / f"base-{seed}")
    settings = stand_in | {"model": str(tmp_path / "base-{seed}"), "rewards": "majority random"}
    with pytest.raises(UserError, match="base-2"):  # before any run begins, and not for some of the seeds
        main(Config(seeds=3, **settings))
    assert not stand_in["out"].exists()
    main(Config(seeds=2, jobs=1, threads=1, data="shapes,q-{seed}", train="--learning-rate 1e-{seed}", **settings))
    logs = {path.parent: path.read_text() for path in stand_in["out"].rglob("log.txt")}
    for folder, log in logs.items():
        seed = folder.name[-1]
        assert f"given {seed} {tmp_path}/base-{seed} shapes,q-{seed} 1e-{seed}\n" in log and "threads 1\n" in log
    assert len(logs) == 4 and sum("evaluating the base" in log for log in logs.values()) == 2
    assert f"shapes,q-{{seed}}, {tmp_path}/base-{{seed}}, 2 steps" in (stand_in["out"] / "table.md").read_text()


def test_gpus_are_those_of_each_run(stand_in, capsys):
    main(Config(rewards="majority", seeds=1, jobs=1, train="--gpus 2", **stand_in))
    (log,) = stand_in["out"].rglob("log.txt")
    threads = max(1, processes.cores() // 2)  # of the one run, two processes share the cores
    assert "gpus 2\n" in log.read_text() and f"threads {threads}\n" in log.read_text()


def test_tables_stay_where_no_run_succeeds_and_the_reason_is_said(stand_in, capsys):
    settings = dict(rewards="random(seed=9)", seeds=1, **stand_in)
    log = stand_in["out"] / "random-seed=9" / "seed-0" / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("error: of another day\n")
    (stand_in["out"] / "table.md").write_text("of before")
    with pytest.raises(RunsFailed, match=r"1 of 1 runs failed: random\(seed=9\), seed 0: no luck with this reward$"):
        main(Config(**settings))
    assert (stand_in["out"] / "table.md").read_text() == "of before"


def test_a_signal_stops_the_runs_first(stand_in, capsys):
    with pytest.raises(Stopped) as ended:
        main(Config(rewards="random(seed=8) majority", seeds=1, jobs=1, **stand_in))
    assert ended.value.signal == signal.SIGTERM
    assert (stand_in["out"] / "random-seed=8" / "seed-0" / "asked").exists()
    assert not (stand_in["out"] / "majority").exists()
    assert "the same command goes on" in capsys.readouterr().err


def test_a_base_of_unknown_settings_is_not_used(stand_in):
    folder = stand_in["out"] / "majority" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "before.json").write_text('{"greedy": {"value": 0.0}}')  # beside it no manifest
    assert main(Config(rewards="majority", seeds=1, **stand_in))["base"]["after"]["greedy"] == (0.5, None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train": "--seed 3"}, "--seed: the runs differ"),
        ({"train": "--from_shards x"}, "--from_shards: the runs differ"),
        ({"rewards": "random random()"}, "would share a folder"),
        ({"seeds": 0}, "at least 1"),
        ({"steps": 0}, "--steps must be at least 1"),
    ],
)
def test_settings_of_a_sweep_are_checked_before_it_starts(stand_in, settings, message):
    with pytest.raises(ValueError, match=message):
        main(Config(**stand_in | {"rewards": "majority"} | settings))
    with pytest.raises(UserError, match="--learnig-rate is no setting; did you mean '--learning-rate'"):
        main(Config(rewards="majority", train="--learnig-rate 1", **stand_in))
    assert not stand_in["out"].exists()


def test_curves_that_coincide_are_all_to_be_seen():
    run = [{"step": step, "accuracy": 0.5, "entropy": 0.1, "length": 3, "majority_share": 0.6} for step in range(4)]
    axis = sweep.figure({name: [run] for name in ("majority", "frequency", "judged")}).axes[0]
    widths = [line.get_linewidth() for line in axis.get_lines()]
    dashes = [line.get_linestyle() for line in axis.get_lines()]
    assert len(widths) == 3 and widths == sorted(widths, reverse=True) and len({*widths}) == 3  # the first lies below
    assert dashes[0] == "-" and "-" not in dashes[1:]


def test_curves_are_means_and_ranges_over_seeds():
    steps, values = sweep.over_seeds([{1: 1.0, 2: 4.0}, {1: 3.0}])
    assert steps == [1, 2] and values.tolist() == [[2, 4], [1, 4], [3, 4]]
    assert sweep.over_seeds([{}])[1].shape == (3, 0)
    runs = [[{"step": 0, "length": 1.0}, {"step": 1, "length": 4.0}], [{"step": 0, "length": 3.0, "accuracy": None}]]
    page = sweep.figure({"a": runs, "b": runs})
    assert [axis.lines[1].get_ydata().tolist() for axis in page.axes][2] == [2, 4]
    assert page.axes[2].lines[1].get_xdata().tolist() == [1, 2]  # what a step has made is drawn behind it
    assert [text.get_text() for text in page.legends[0].texts] == ["a", "b"]
