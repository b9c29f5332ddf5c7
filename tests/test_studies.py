"""Results that remake themselves: tables by hand, pages that hold what the records say, a study of pretended runs."""

import json
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import train_upt
import warmup
from ablate import split_words
from bench import alarms, curves, making, studies, tables
from bench.making import Place, Study, Sweep
from rewards import REWARDS
from tests.test_docs import CONFIGS
from upt.compare import sweep
from upt.errors import DataError, RunsFailed, SettingError
from upt.groups.variants import parse_variant, split_variants
from upt.run import cli

ROOT = Path(__file__).parents[1]


# --- the pages --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records() -> dict[str, dict]:
    paths = {study.name: ROOT / "bench/results" / f"{study.name}.json" for study in studies.STUDIES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


@pytest.mark.parametrize("page", studies.PAGES)
def test_pages_hold_what_the_records_give(page, records):
    text = (ROOT / page).read_text()
    assert tables.fill(text, tables.rendered(studies.STUDIES, records)) == text, "run python -m bench.studies --fill"


def test_every_table_has_one_place():
    places = [name for page in studies.PAGES for _, name, _ in tables.PLACE.findall((ROOT / page).read_text())]
    assert sorted(places) == sorted(name for study in studies.STUDIES for name in study.tables)


@pytest.mark.parametrize("study", studies.STUDIES, ids=lambda study: study.name)
def test_studies_have_flags_and_rewards_that_exist(study):
    for of in study.sweeps:
        cli.parse(train_upt.Config, split_words(f"{study.flags} {of.flags}"))
        assert all(parse_variant(label.partition("@")[0])[0] in REWARDS for label in split_variants(of.rewards))
    assert len({of.name for of in study.sweeps}) == len(study.sweeps)  # each has a folder of its own
    for command in study.commands:
        script, *flags = shlex.split(command.replace("{seed}", "0"))
        cli.parse(CONFIGS[script.removesuffix(".py")], flags)
    if study.base:
        cli.parse(warmup.Config, shlex.split(studies.BASES[study.base]))
    assert {*study.uses} <= {other.name for other in studies.STUDIES}


def test_a_place_of_no_table_is_refused_and_text_around_stays():
    page = "a\n<!-- table: one -->\nold\n<!-- end -->\nb\n<!-- table: two -->\n<!-- end -->\n"
    filled = tables.fill(page, {"one": "new\n", "two": "other\n"})
    assert filled == (
        "a\n<!-- table: one -->\n\nnew\n\n<!-- end -->\nb\n<!-- table: two -->\n\nother\n\n<!-- end -->\n"
    )
    assert tables.fill(filled, {"one": "new\n", "two": "other\n"}) == filled
    with pytest.raises(DataError, match="table: two -->: no study fills such a table; did you mean 'twos'"):
        tables.fill(page, {"one": "new\n", "twos": "other\n"})


@pytest.mark.parametrize("broken", ["<!-- table: one -->\na\n", "<!-- table:one -->\na\n<!-- end -->\n"])
def test_a_place_that_is_not_closed_swallows_nothing(broken):
    page = f"{broken}text\n<!-- table: two -->\n<!-- end -->\n"
    with pytest.raises(DataError, match="a table's place is not <!-- table: NAME --> … <!-- end -->, among <!-- tab"):
        tables.fill(page, {"one": "new\n", "two": "other\n"})


# --- tables by hand ---------------------------------------------------------------------------------------------------


def a_run(label: str, seed: int, *means: float, alarms: tuple = (), chosen: int | None = None) -> dict:
    """A run whose held-out mean is `means` after 0, 10, 20 … steps.

    The other scores are above it: greedy by .01, maj by .02, pass by .03, length by .04, entropy by .05.
    """

    def each(value: float) -> dict:
        return {name: value + i / 100 for i, name in enumerate(tables.NAMES)}

    def scores(value: float) -> dict:
        found = {name: {"value": x} for name, x in each(value).items()}
        return found | {"kinds": {"sum": {"mean": value, "greedy": 1.0}}}

    last = 10 * (len(means) - 1)
    between = {str(10 * i): each(value) for i, value in enumerate(means[1:-1], 1)}
    run = {"label": label, "seed": seed, "steps": last, "before": scores(means[0]), "after": scores(means[-1])}
    return run | {"by_step": between, "alarms": dict.fromkeys(alarms, ["hollow"]), "chosen": chosen or last}


def a_record(*runs: dict, **more) -> dict:
    return {
        "command": "python -m bench.studies --only x --seeds 2", "base": {"name": "plain", "flags": "--guess-steps 0"},
        "fingerprint": {"0": "sha256:0123456789", "1": "sha256:abcdefabcd"}, "complete": True, "planned": 4,
        "threads": 1, "date": "2026-01-02", "machine": "Abacus, 2 cores",
        "versions": {"torch": ["2.12.0", "2.13.0"], "transformers": ["5.23.0"]},
        "runs": [*runs],
    } | more  # fmt: skip


X = Study("x", base="plain")
TWO = (
    a_run("`majority`", 0, 0.70, 0.76, 0.78),
    a_run("`majority`", 1, 0.74, 0.82, 0.80),
    a_run("`random`", 0, 0.70, 0.71, 0.70),
    a_run("`random`", 1, 0.74, 0.72, 0.73),
)
# Of two values, half of the interval is t(.975, 1) |x - y| / 2 = 6.353 |x - y|.


def test_scores_and_paired_gains_by_hand():
    found = {"x": a_record(*TWO)}
    after = tables.after(X, found).splitlines()
    assert after[2].startswith("| base | 2 | 72.0 ± 25.4 |")  # 6.353 * 4
    assert after[3].startswith("| `majority` | 2 | 79.0 ± 12.7 | 80.0 ± 12.7 | 81.0 ±")
    assert after[4].startswith("| `random` | 2 | 71.5 ± 19.1 |")
    gain = tables.gain("`majority`")(X, found).splitlines()
    assert len(gain) == 4 and gain[2].startswith("| `majority` | 2 | +7.0 ± 12.7 |")  # 8 and 6
    assert gain[3].startswith("| `random` | 2 | -0.5 ± 6.4 |")  # 0 and -1
    assert gain[2].endswith("|  |  |") and "| -7.5 ± 6.4 |" in gain[3]  # after training less 8 and 7


def test_the_front_table_by_hand():
    head, _, *lines = tables.front(X, {"x": a_record(*TWO)}).splitlines()
    assert head == "|  | mean | greedy | maj@8 | pass@8 |"
    assert lines == [
        "| before training | 72.0 ± 25.4 | 73.0 ± 25.4 | 74.0 ± 25.4 | 75.0 ± 25.4 |",
        "| gain, **label-free** (`majority`) | " + " | ".join(["+7.0 ± 12.7"] * 4) + " |",
        # Of runs with labels there is none yet.
        "| gain, control (`random` rewards) | " + " | ".join(["-0.5 ± 6.4"] * 4) + " |",
    ]


def test_scores_by_step_by_hand():
    runs = [*TWO[:3]]  # of the control one seed so far
    assert tables.by_step("mean", (0, 10, 20, 30))(X, {"x": a_record(*runs)}).splitlines()[2:] == [
        "| `majority` | 2 | 72.0 ± 25.4 | 79.0 ± 38.1 | 79.0 ± 12.7 | – |",
        "| `random` | 1 | 70.0 | 71.0 | 70.0 | – |",
    ]


def test_other_tables_by_hand():
    kinds = tables.by_kind("`majority`")(X, {"x": a_record(*TWO)})
    assert kinds.splitlines()[2:] == ["| sum | 72.0 ± 25.4 | +7.0 ± 12.7 | 100.0 ± 0.0 | +0.0 ± 0.0 |"]
    own, beside = [a_run("own", 0, 0.70, 0.77), a_run("own", 1, 0.74, 0.78)], tables.gain("`majority`", "x")
    rows = beside(replace(X, name="y"), {"x": a_record(*TWO), "y": a_record(*own)}).splitlines()
    assert rows[2].startswith("| `majority` | 2 | +7.0 ± 12.7 |") and rows[2].endswith("|  |  |")
    assert rows[3].startswith("| own | 2 | +5.5 ± 19.1") and "| -1.5 ± 6.4 |" in rows[3]
    other = {"y": a_record(*own, fingerprint={"0": "sha256:0123456789", "1": "sha256:another"})}
    rows = beside(replace(X, name="y"), {"x": a_record(*TWO)} | other).splitlines()
    assert "| -1.0 |" in rows[3]  # seed 1 had another base there: no pair
    judged = [
        {"label": "judge", "seed": s, "AUC": a, "AUC in group": 0.5, "label acc": 0.25} for s, a in ((0, 0.6), (1, 0.7))
    ]
    assert tables.judged(X, {"x": {"judged": judged}}).splitlines()[2] == (
        "| judge | 2 | 0.650 ± 0.635 | 0.500 ± 0.000 | 25.0 ± 0.0 |"
    )
    written = [{"kept": 600, "candidates": 1000, "filters": {"repeat": {"seen": 1000, "failed": 400}}}] * 2
    assert tables.filters(X, {"x": {"written": written}}).splitlines()[2:] == [
        "| `repeat` | 2,000 | 800 |", "| kept | 1,200 of 2,000 |  |"
    ]  # fmt: skip
    also = [run | {"also": {"before": TWO[0]["after"], "after": TWO[0]["before"]}} for run in TWO[:1]]
    assert "| `majority` | 1 | -8.0 | -8.0 |" in tables.elsewhere(X, {"x": a_record(*also)})


def test_a_tables_line_says_where_it_comes_from():
    found = tables.rendered([replace(X, tables={"t": tables.after}, uses=["z"])], {"x": a_record(), "z": a_record()})[
        "t"
    ]
    assert found.splitlines()[-1] == (
        "`python -m bench.studies --only x --seeds 2` with the runs of `z`; bases 01234567, abcdefab by `python "
        "warmup.py --guess-steps 0 --seed S`; 1 thread a run; 2026-01-02; Abacus, 2 cores; torch 2.12.0 and 2.13.0, "
        "transformers 5.23.0."
    )
    part = tables.rendered([replace(X, tables={"t": tables.after})], {"x": a_record(*TWO[:3], complete=False)})["t"]
    assert "; 3 of 4 runs so far; " in part
    none = tables.rendered([replace(X, tables={"t": tables.after})], {})["t"]
    assert none == "*Not measured yet: `python -m bench.studies --only x`.*\n"
    over = Study("over", uses=["x", "z"], tables={"t": lambda study, records: "T"})
    assert tables.rendered([over], {})["t"] == "*Not measured yet: `python -m bench.studies --only x,z`.*\n"
    found = tables.rendered([over], {"x": a_record(*TWO[:3], complete=False)})["t"]
    assert found == "T\n\nFrom the records of `x` (3 of 4 runs so far); `z` not measured yet.\n"


def test_the_figure_shows_the_scores():
    axes = curves.by_step(["`majority`", "`random`"])(a_record(*TWO)).axes
    assert [axis.lines[0].get_xdata().tolist() for axis in axes] == [[0, 10, 20]] * 3
    assert axes[0].lines[0].get_ydata().tolist() == pytest.approx([72, 79, 79])
    assert axes[1].lines[0].get_ydata().tolist() == pytest.approx([75, 82, 82])  # pass
    assert axes[2].lines[1].get_ydata().tolist() == pytest.approx([0.77, 0.765, 0.765])  # entropy
    axes = curves.by_step(["`judged`", "`random`"])(a_record(*TWO)).axes  # of one of them no run yet
    assert [line.get_label() for line in axes[0].lines] == ["random"]
    assert not curves.by_step(["`judged`"])(a_record()).axes[0].lines


# --- alarms -----------------------------------------------------------------------------------------------------------


def test_what_alarms_and_choices_were_worth_by_hand():
    runs = [
        a_run("a", 0, 0.50, 0.60, 0.45, alarms=("15",), chosen=10),  # lost 5, warned; the choice is the best
        a_run("a", 1, 0.50, 0.60, 0.45, chosen=20),  # lost 5, not warned; the choice is 15 below the best
        a_run("b", 0, 0.50, 0.55, 0.58, alarms=("3",), chosen=10),  # gained 8, warned; 3 below the best
        a_run("b", 1, 0.50, 0.505, chosen=10),  # neither; not scored between
    ]
    lines = alarms.table({"one": runs[:2], "two": runs[2:]}).splitlines()
    assert lines[2] == "| `one` | 2 | 1 of 2 | 0 of 0 | 7.5 | 15.0 | +7.5 | 1 of 2 |"
    assert lines[3] == "| `two` | 2 | 0 of 0 | 1 of 1 | 3.0 | 3.0 | -3.0 | 0 of 2 |"
    assert lines[4] == "| all | 4 | 1 of 2 | 1 of 1 | 6.0 | 15.0 | +4.0 | 1 of 4 |"
    gold = [a_run("`supervised`", 0, 0.50, 0.60), a_run("`majority`", 0, 0.50, 0.60)]
    assert "| `x` | 1 | 0 of 0 | 0 of 1 |" in tables.health(Study("health", uses=["x", "y"]), {"x": a_record(*gold)})


def test_another_rule_can_be_tried_on_rows():
    class Late:
        def add(self, row: dict) -> list[str]:
            return ["late", "gap"] * (row["step"] >= 2)

    rows = [{"step": step, "groups": int(step != 3)} for step in range(5)]
    raised, chosen = alarms.replay(rows, [4, 2, 5], Late, lambda rows, steps: steps[len(rows[2]["alarms"])])
    assert raised == {2: ["late"], 4: ["late"]} and chosen == 5  # steps in order; `gap` is about the programs


# --- a study of pretended runs ----------------------------------------------------------------------------------------

STAND_IN = """
import json, os, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, reward, seed = Path(given["--out"]), given["--reward"], int(given["--seed"])
assert os.environ["OMP_NUM_THREADS"] == "1" and given["--model"].endswith(f"base-plain-{seed}")
if (Path(given["--model"]).parents[1] / f"broken-{reward}").exists():
    sys.exit("broken")
names = ("greedy", "mean", "maj", "pass", "length", "entropy")
before = {name: {"value": 0.5} for name in names}
after = {name: {"value": 0.6 + 0.1 * seed} for name in names}
(out / "before.json").write_text(json.dumps(before))
versions = {"torch": "2", "transformers": "5"}
manifest = {"seed": seed, "model": {"fingerprint": f"sha256:{seed}"}, "versions": versions}
manifest |= {"git_commit": "abc", "dirty": reward == "random"}
(out / "rollouts").mkdir()
(out / "rollouts" / "manifest.json").write_text(json.dumps(manifest))
row = {"groups": 1, "majority_share": 0.5, "entropy": 0.5, "answer_entropy": 1, "information": 0.5}
row |= {"abstention_share": 0, "length": 3}
rows = [row | {"step": step} for step in range(3)]
rows[2]["held_out"] = {name: 0.65 for name in names}
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
summary = {"before": before, "after": after, "end": {"steps": 3}, "seconds": {"rollout": 1.5, "update": 2}}
summary["config"] = {"seed": seed, "eval_questions": 4, "eval_samples": 2}
(out / "summary.json").write_text(json.dumps(summary))
"""
PAGE = "# Page\n\n<!-- table: after -->\n<!-- end -->\n\n<!-- table: note -->\n<!-- end -->\n"


@pytest.fixture
def pretended(tiny, tmp_path, monkeypatch):
    """Settings of studies.main whose runs are a script that pretends, and whose bases are there."""
    (tmp_path / "train.py").write_text(STAND_IN)
    (tmp_path / "count.py").write_text(
        "import sys; from pathlib import Path; out = Path(sys.argv[2]); out.mkdir(exist_ok=True);"
        "(out / 'n').write_text((out / 'n').read_text() + 'x' if (out / 'n').exists() else 'x')"
    )
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(sweep, "POLL", 0.02)
    monkeypatch.setattr(sweep, "figure", lambda metrics: Figure())  # which takes longer than all the rest
    for seed in (0, 1):
        base = shutil.copytree(tiny, tmp_path / "out" / f"base-plain-{seed}")
        made = json.loads(json.dumps(asdict(warmup.Config(seed=seed)), default=str))
        (base / "warmup.json").write_text(json.dumps({"config": made}))
    for page in studies.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(PAGE)
    study = Study(
        "toy",
        base="plain",
        steps=3,
        sweeps=[Sweep("majority random"), Sweep("majority", "--kl-coef 0.01", name="KL .01")],
        commands=[f"{tmp_path}/count.py --out {{out}}/counted-{{seed}}"],
        found=lambda folder, seeds: {"counted": [(folder / f"counted-{seed}" / "n").read_text() for seed in seeds]},
        tables={"after": tables.after, "note": lambda study, records: str(records["toy"]["counted"])},
    )
    config = studies.Config(seeds=2, jobs=2, out=tmp_path / "out", root=tmp_path)
    return lambda sweeps=study.sweeps, pictures="", **more: studies.main(
        replace(config, **more), [replace(study, sweeps=sweeps, pictures=pictures)], {"plain": ""}
    )


def test_a_study_is_made_recorded_and_filled_in_and_goes_on(pretended, tmp_path, capsys):
    (tmp_path / "broken-random").touch()
    with pytest.raises(RunsFailed, match="toy: 2 of 4 runs failed"):
        pretended()
    page = (tmp_path / "README.md").read_text()
    assert "| `majority` | 2 | 65.0 ± 63.5 |" in page and "`random`" not in page and "; 4 of 6 runs so far; " in page
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    assert len(times) == 4

    (tmp_path / "broken-random").unlink()
    pretended()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # finished runs are kept
    record = json.loads((tmp_path / "bench/results/toy.json").read_text())
    assert [(run["label"], run["seed"]) for run in record["runs"]] == [
        ("`majority`", 0), ("`majority`", 1), ("`random`", 0), ("`random`", 1), ("`majority`, KL .01", 0),
        ("`majority`, KL .01", 1),
    ]  # fmt: skip
    run = record["runs"][1]
    assert run["by_step"]["2"]["mean"] == 0.65 and run["after"]["mean"]["value"] == 0.7 and run["seconds"] == 3.5
    assert alarms.series(run, "mean") == {0: 0.5, 2: 0.65, 3: 0.7} and run["chosen"] == 3 and run["alarms"] == {}
    assert record["complete"] and record["planned"] == 6 and all("folder" not in run for run in record["runs"])
    assert record["fingerprint"] == {"0": "sha256:0", "1": "sha256:1"}  # as the runs' manifests say
    assert record["commits"] == ["abc", "abc and changes"] and record["versions"]["transformers"] == ["5"]
    assert record["counted"] == ["x", "x"]  # once for each seed, in both commands together
    for name in studies.PAGES:
        page = (tmp_path / name).read_text()
        assert "| `majority`, KL .01 | 2 | 65.0 ± 63.5 |" in page and "runs so far" not in page
    # From the record alone the pages are the same again.
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "README.md").write_text(PAGE)
    pretended(fill=True)
    assert (tmp_path / "README.md").read_text() == page and not list((tmp_path / "out").glob("*"))


def test_a_complete_record_stays_until_there_is_another_and_its_origin_with_it(pretended, tmp_path, monkeypatch):
    settings = {"seeds": 1, "sweeps": [Sweep("random")]}
    pretended(**settings)
    path = tmp_path / "bench/results/toy.json"
    first = json.loads(path.read_text())
    monkeypatch.setattr(making, "processor", lambda: "another machine")
    pretended(**settings)
    assert json.loads(path.read_text()) == first
    shutil.rmtree(tmp_path / "out/toy/runs/random")
    (tmp_path / "broken-random").touch()
    with pytest.raises(RunsFailed):
        pretended(**settings)
    assert json.loads(path.read_text()) == first
    (tmp_path / "broken-random").unlink()
    pretended(**settings)
    assert json.loads(path.read_text())["machine"] == "another machine"


def test_base_and_runs_are_scored_alike_on_another_data_set(pretended, tmp_path):
    pretended(seeds=1, sweeps=[Sweep("majority")])
    study = Study("toy", base="plain", sweeps=[Sweep("majority")], also="elsewhere")
    place, out = Place(tmp_path / "out", 1, 1, {"plain": ""}), tmp_path / "out"
    run = f"{out}/toy/runs/majority/seed-0"
    assert making.scoring(study, place, {0: "mark"}) == {
        f"-m eval.heldout --data elsewhere --model {out}/base-plain-0 --seed 0 --eval-questions 4 --eval-samples 2 "
        f"--out {out}/toy/also-0.json": "mark",
        f"-m eval.heldout --data elsewhere --run {run} --out {run}/also.json": "mark",
    }
    assert making.record(study, place, True)["runs"][0]["also"] == {}  # not scored yet
    scores = json.loads(Path(f"{run}/before.json").read_text())
    for path in (f"{out}/toy/also-0.json", f"{run}/also.json"):
        Path(path).write_text(json.dumps(scores))
    assert making.record(study, place, True)["runs"][0]["also"]["after"]["mean"] == {"value": 0.5}


def test_a_command_that_fails_is_shown_and_done_again(tmp_path, capsys):
    script, made = tmp_path / "script.py", tmp_path / "a b" / "made"
    made.parent.mkdir()
    script.write_text("print('some words'); raise SystemExit(3)")
    commands = {f"{script} --out '{made}'": "a mark"}
    with pytest.raises(RunsFailed, match=rf"python {script} --out '{made}': its output is in .*\.part"):
        making.run(commands, tmp_path / "logs", 1)
    assert "    some words" in capsys.readouterr().err
    script.write_text("import os, sys; os.mkdir(sys.argv[2])")
    making.run(commands, tmp_path / "logs", 1)
    making.run(commands, tmp_path / "logs", 1)  # done, or mkdir would fail
    made.rmdir()
    making.run(commands, tmp_path / "logs", 1)
    assert made.is_dir()
    with pytest.raises(RunsFailed):  # of another base it is done again, and mkdir fails
        making.run(dict.fromkeys(commands, "another mark"), tmp_path / "logs", 1)


def test_a_study_that_is_refused_leaves_record_and_pages(pretended, tmp_path):
    pretended()
    before = {path: path.read_bytes() for path in (tmp_path / "README.md", tmp_path / "bench/results/toy.json")}
    base = tmp_path / "out/base-plain-0/warmup.json"
    base.write_text(base.read_text().replace('"seed": 0', '"seed": 3'))
    with pytest.raises(SettingError, match="seed 3 there, 0 now"):
        pretended()
    assert {path: path.read_bytes() for path in before} == before


def test_fewer_seeds_do_not_replace_a_complete_record(pretended, tmp_path, capsys):
    pretended()
    path = tmp_path / "bench/results/toy.json"
    before = path.read_bytes()
    pretended(seeds=1)
    assert path.read_bytes() == before and "of 2 seeds or more" in capsys.readouterr().err


def test_pictures_of_a_study_come_into_the_docs(pretended, tmp_path):
    (tmp_path / "draw.py").write_text(
        "import sys; from pathlib import Path; out = Path(sys.argv[2]); out.mkdir();(out / 'p.png').write_text('drawn')"
    )
    pretended(pictures=f"{tmp_path}/draw.py --out {{out}}/pictures")
    assert (tmp_path / "docs/p.png").read_text() == "drawn"


def test_what_a_judge_told_and_which_questions_were_kept_is_read(tmp_path):
    head = "variant,AUC,AUC in group,label acc"
    for mode, rows in (
        ("logit", ["frequency,.7,.6,.5", "judge-only,.8,,.25"]),
        ("text", ["frequency,.7,.6,.5", "judged,1,1,1"]),
    ):
        (tmp_path / f"compared-{mode}-1").mkdir()
        (tmp_path / f"compared-{mode}-1" / "variants.csv").write_text("\n".join([head, *rows]))
    assert making.judged(tmp_path, [0, 1])["judged"] == [
        {"label": "`frequency`", "seed": 1, "AUC": 0.7, "AUC in group": 0.6, "label acc": 0.5},
        {"label": "`judge-only`, logit mode", "seed": 1, "AUC": 0.8, "label acc": 0.25},
        {"label": "`judged`, text mode", "seed": 1, "AUC": 1, "AUC in group": 1, "label acc": 1},
    ]
    (tmp_path / "in-context-0").mkdir()
    (tmp_path / "in-context-0" / "summary.json").write_text('{"kept": 3}')
    assert making.written(tmp_path, [0, 1]) == {"written": [{"kept": 3}]}


def test_a_base_of_other_settings_is_not_taken(pretended, tmp_path):
    place = Place(tmp_path / "out", 2, 1, {"plain": "--answer-steps 7"})
    with pytest.raises(SettingError, match="base-plain-1 is a base of other settings: answer_steps 260 there, 7 now"):
        making.check_base(place.base(X, 1), "--answer-steps 7", 1)
    making.check_base(place.base(X, 1), "", 1)
    with pytest.raises(SettingError, match="seed 1 there, 0 now"):
        making.check_base(place.base(X, 1), "", 0)


def test_studies_are_chosen_by_name():
    assert [study.name for study in studies.select("long, rewards", studies.STUDIES)] == ["rewards", "long"]
    with pytest.raises(SettingError, match="'lng' is no study; give names among rewards, long, .*did you mean 'long'"):
        studies.select("rewards,lng", studies.STUDIES)
