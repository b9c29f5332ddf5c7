"""The page on a run: what is taken from its files, worked out by hand. In a browser: test_report_browser.py."""

import base64
import gzip
import json
import os
import re
import shutil
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

import report
import train_upt
from eval.report import collect, page
from tests.test_shards import make_group
from upt.errors import SettingError, ShardError
from upt.groups import shards
from upt.groups.shards import open_image
from upt.run import locking, records
from upt.run.machine import machine

HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 'taken'\"> <svg onload=\"document.title='taken'\">",
    "<!--<script> javascript:document.title='taken' &lt;b&gt; \\href{javascript:document.title='taken'}{x}",
    "$\\href{javascript:document.title='taken'}{x}$ \\(\\htmlData{a=b}{c}\\) $\\def\\a{\\a\\a}\\a$ $\\frac{1}{$",
    "$\\raisebox{20em}{FAKE}$ $\\smash{\\rule{9em}{9em}}$",
    "\u202eright to left\u202c \u2066\u2067 \x00 \ud800 \u2028 ' \" `",
    "x" * 1_000_000,
]


def group_of(keys, rewards=(), text=None, **fields) -> dict:
    group = make_group(keys=keys, **fields)
    for response, reward in zip(group["responses"], rewards):
        response["reward"] = reward
    for response in group["responses"] if text else ():
        response["text"] = text
    return group


def same(relative: str | None) -> str | None:
    return relative


# ------------------------------------------------------------------------------------------------------------ by hand


def test_what_is_noteworthy_of_a_group():
    def found(**fields) -> list[str]:
        return collect.shown(make_group(**fields), same)["flags"]

    assert found(keys=("7", "7", "7", "8"), gold="7") == []
    assert found(keys=("8", "8", "8", "7"), gold="7") == ["wrong"]
    assert found(keys=("7", "7", "8", "8"), gold="9") == ["split"]  # a tie has no majority that could be wrong
    assert found(keys=("7", "7", "7", None), gold=None) == ["abstained"]
    group = make_group(keys=("7", "7", "8"), gold=None) | {"skipped": True}
    group["responses"][0]["finish"] = "length"
    for response, score in zip(group["responses"], (0.2, None, 0.9), strict=True):
        response["judge"] = {"score": score, "parsed": score is not None}
    assert collect.shown(group, same)["flags"] == ["skipped", "cut", "judge"]
    group["responses"][0]["judge"]["score"] = 0.9  # as high: it does not object
    assert collect.shown(group, same)["flags"] == ["skipped", "cut"]


def test_a_group_is_shown_by_what_can_be_read():
    group = group_of(("7", "8"), gold="7.0", rewards=(1.0, 0.0))
    shown = collect.shown(group, same)
    assert [r["right"] for r in shown["responses"]] == [True, False]
    assert [r["reward"] for r in shown["responses"]] == [1.0, 0.0]
    assert not {"token_ids", "logprobs"} & {*shown["responses"][0]}
    assert shown["share"] == 0.5 and shown["majority"] is None


def test_curves_leave_out_steps_without_groups():
    rows = [
        {"step": 0, "groups": 2, "entropy": 0.5, "kl": None, "seconds": {"rollout": 1.0}},
        {"step": 1, "groups": 0},
        {"step": 2, "groups": 2, "entropy": 0.25, "kl": None, "seconds": {"rollout": 2.0, "judge": 3.0}},
    ]
    assert collect.curves(rows) == {
        "step": [0, 2], "entropy": [0.5, 0.25], "seconds judge": [None, 3.0], "seconds rollout": [1.0, 2.0],
    }  # fmt: skip


def test_json_in_the_page_is_no_markup():
    text = page.as_json({"a": HOSTILE})
    assert "<" not in text and json.loads(text) == {"a": HOSTILE}


def test_tables_of_a_comparison(tmp_path):
    (tmp_path / "table.md").write_text(
        "after\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n## Gain\n\n| a |\n|---|\n| 3 |\n"
    )
    assert collect.tables_in(tmp_path) == [
        {"title": "", "rows": [["a", "b"], ["1", "2"]]}, {"title": "Gain", "rows": [["a"], ["3"]]},
    ]  # fmt: skip
    assert collect.tables_in(tmp_path / "nowhere") == []


# ---------------------------------------------------------------------------------------------------------- of a run


def parts(path: Path) -> dict:
    """What lies in the page, by name."""
    found = {}
    for name, text in re.findall(r'<script type="text/plain" id="([^"]*)">([^<]*)</script>', path.read_text()):
        found[name] = json.loads(gzip.decompress(base64.b64decode(text)))
    found["about"] = json.loads(re.search(r'id="about">([^<]*)</script>', path.read_text())[1])
    return found


def test_the_page_is_made_with_the_run_and_holds_all_of_it(run):
    made = run / "report.html"
    first = made.read_bytes()
    assert report.main(report.Config(runs=(run,))) == made and made.read_bytes() == first
    found = parts(made)
    (about,) = found["about"]["runs"]
    assert about["parts"] == [0, 1, 2] and about["state"] == "finished" and about["steps"] == 3
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert about["curves"]["entropy"] == [row["entropy"] for row in rows]
    assert [step for step, _ in about["held_out"]["mean"]] == [0, 2, 3]
    summary = json.loads((run / "summary.json").read_text())
    assert about["table"][0]["before"].startswith(f"{100 * summary['before']['greedy']['value']:.1f} [")
    assert {row["questions"] for row in about["table"]} == {"4*"}
    assert about["after"] == "after" and about["note_on_scores"].startswith("* fewer than 30: ")
    manifest = json.loads((run / "manifest.json").read_text())
    assert about["versions"].items() <= manifest["versions"].items() and "torch" in about["versions"]
    assert about["begun"] == manifest["begun"].replace("T", " ")[:16] and about["machine"] == machine("cpu")
    for step in range(3):
        (path,) = (p for p in shards.list_shards(run / "rollouts") if p.stem == f"step-{step:06d}")
        groups = shards.read_shard(path)
        assert [g["uid"] for g in found[f"groups-0-{step}"]] == [g["uid"] for g in groups]
        texts = [[r["text"] for r in g["responses"]] for g in groups]
        assert [[r["text"] for r in g["responses"]] for g in found[f"groups-0-{step}"]] == texts
        for group in found[f"groups-0-{step}"]:
            assert (made.parent / group["image"]).is_file()
    after = json.loads((run / "after.json").read_text())["rows"]
    assert [row["after"] for row in found["answers-0"]] == [row["responses"] for row in after]
    assert all((made.parent / row["image"]).is_file() for row in found["answers-0"])


def test_a_run_in_the_making_and_one_without_held_out_scores(run, tmp_path):
    begun = shutil.copytree(run, tmp_path / "begun")
    for name in ("summary.json", "after.json", "rollouts/step-000002.jsonl", "report.html"):
        (begun / name).unlink()
    lines = (begun / "metrics.jsonl").read_text().splitlines()
    (begun / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])  # the third is being written
    found = parts(report.main(report.Config(runs=(begun,))))
    (about,) = found["about"]["runs"]
    assert (about["state"], about["finished"], about["parts"]) == ("stopped after step 2 of 3", False, [0, 1])
    assert about["command"].startswith("python train_upt.py --resume --out ")
    train_upt.prepare(train_upt.Config(resume=True, out=begun))  # which is taken, whatever the settings were
    # The last evaluation is the one after two steps, which is said.
    assert about["after"] == "after 2 of 3 steps" and "difference" in about["table"][0]
    rows = json.loads((begun / "held-out" / "step-000002.json").read_text())["rows"]
    assert [row["after"] for row in found["answers-0"]] == [row["responses"] for row in rows]
    for path in (begun / "before.json", *(begun / "held-out").glob("*.json")):
        path.unlink()
    found = parts(report.main(report.Config(runs=(begun,))))
    (about,) = found["about"]["runs"]
    assert found["answers-0"] == [] and about["table"] == [] and about["after"] == ""
    shutil.copy(run / "before.json", begun)
    (about,) = parts(report.main(report.Config(runs=(begun,))))["about"]["runs"]
    assert about["table"][0]["before"] and "after" not in about["table"][0] and about["after"] == ""


def test_several_runs_and_a_folder_of_runs(run, tmp_path):
    folder = tmp_path / "ablate"
    for name in ("majority/seed-0", "majority/seed-1"):
        shutil.copytree(run, folder / name)
    made = report.main(report.Config(runs=(folder,)))
    assert made == folder / "report.html"
    about = parts(made)["about"]["runs"]
    assert [one["name"] for one in about] == ["majority/seed-0", "majority/seed-1"]
    assert [one["variant"] for one in about] == ["majority", "majority"]
    with locking.holding(folder):  # a comparison that is between two runs
        assert report.make(report.Config(runs=(folder,), out=made, watch=True))
    assert not report.make(report.Config(runs=(folder,), out=made, watch=True))
    both = report.main(report.Config(runs=(run, folder / "majority/seed-1"), out=tmp_path / "both.html"))
    found = parts(both)
    assert len(found["about"]["runs"]) == 2 and "groups-1-2" in found
    assert (both.parent / found["groups-0-0"][0]["image"]).is_file()


def test_runs_of_every_kind_in_a_folder(run, tmp_path):
    """Beside each other: a run, one in rounds, seeds of a comparison, and what is none."""
    many = tmp_path / "many"
    kinds = ["evolve/round-01/run", "evolve/round-02/run", "majority/seed-0", "majority/seed-1", "plain"]
    for name in kinds:
        shutil.copytree(run, many / name)
    shutil.copy(run / "manifest.json", many / "evolve")
    (many / "nothing" / "seed-0").mkdir(parents=True)
    assert collect.runs_in(many) == [many / name for name in kinds]
    assert [*collect.named([many]).values()] == kinds
    with locking.holding(many / "evolve"):  # rounds that are between two of them
        assert report.make(report.Config(runs=(many,), out=many / "report.html"))


def test_a_run_keeps_its_name_while_others_come(run, tmp_path, monkeypatch):
    folder = tmp_path / "ablate"
    shutil.copytree(run, folder / "majority/seed-0")
    first = {folder / "majority/seed-0": "majority/seed-0"}
    assert collect.named([folder]) == first and collect.title([folder], first) == "ablate: 1 run"
    for name in ("majority/seed-1", "random/seed-0"):
        shutil.copytree(run, folder / name)
        found = collect.named([folder])
        assert first.items() <= found.items() and found[folder / name] == name
    assert collect.named([folder / "random/seed-0", run]).keys() == {folder / "random/seed-0", run}
    monkeypatch.chdir(folder / "random")
    alone = folder / "random/seed-0"
    assert collect.named([Path("seed-0")]) == {alone: "seed-0"}
    monkeypatch.chdir(alone)
    assert collect.named([Path(".")]) == {alone: "seed-0"} and collect.title([Path(".")], {alone: ""}) == "seed-0"


def test_names_of_folders_that_are_no_text(run, tmp_path, capsys):
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff"))
    shutil.copytree(run, other)
    shutil.copytree(run, tmp_path / "y")
    found = parts(report.main(report.Config(runs=(tmp_path,))))
    assert [one["name"] for one in found["about"]["runs"]] == ["x\\xff", "y"]
    assert found["groups-0-0"][0]["image"].startswith("x%FF/rollouts/images/")
    made = report.main(report.Config(runs=(other,)))
    assert made == other / "report.html" and "x\\udcff/report.html" in capsys.readouterr().out


def test_pictures_in_the_page(run, tmp_path):
    made = report.main(report.Config(runs=(run,), out=tmp_path / "far" / "away.html", embed=True))
    source = parts(made)["groups-0-0"][0]["image"]
    (group, *_) = shards.read_shard(shards.shard_path(run / "rollouts", 0))
    assert source.startswith("data:image/png;base64,")
    with Image.open(BytesIO(base64.b64decode(source.split(",")[1]))) as shown:
        assert shown.tobytes() == open_image(run / "rollouts", group["image"]).tobytes()
    # What leads out of the folder of a run is not taken into a page that may be sent.
    copy = shutil.copytree(run, tmp_path / "copy")
    scores = json.loads((copy / "after.json").read_text())
    scores["rows"][0]["image"] = "../manifest.json"
    (copy / "after.json").write_text(json.dumps(scores))
    with pytest.raises(ShardError):
        report.main(report.Config(runs=(copy,), out=tmp_path / "sent.html", embed=True))


def test_a_page_that_follows_its_run(run, tmp_path, monkeypatch, capsys):
    """It waits for a run that has only begun, follows it, and ends with it: here it is stopped after two steps."""
    begun = shutil.copytree(run, tmp_path / "begun")
    (begun / "summary.json").unlink()
    (begun / "report.html").unlink()
    lines = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_text("".join(lines[:1]))
    (begun / "manifest.json").rename(tmp_path / "manifest.json")
    held, seen = locking.holding(begun), []
    held.__enter__()

    def sleep(seconds):
        path = begun / "report.html"
        about = parts(path)["about"] if path.is_file() else None
        seen.append((seconds, about and (about["refresh"], about["runs"][0]["state"])))
        if len(seen) == 3:  # after two looks at nothing
            (tmp_path / "manifest.json").rename(begun / "manifest.json")
        if len(seen) == 4:
            (begun / "metrics.jsonl").write_text("".join(lines[:2]))
            held.__exit__(None, None, None)

    monkeypatch.setattr(report.time, "sleep", sleep)
    made = report.main(report.Config(runs=(begun,), watch=True, every=7))
    assert seen == [(7, None)] * 3 + [(7, (7, "running, step 1 of 3 is made"))]
    assert capsys.readouterr().err.count("no run of train_upt.py there") == 1  # said once, however long it takes
    about = parts(made)["about"]
    assert "refresh" not in about and about["runs"][0]["state"] == "stopped after step 2 of 3"


def test_a_run_that_stops_early_and_rounds_have_their_page(run, tmp_path):
    stopped = shutil.copytree(run, tmp_path / "stopped")
    (stopped / "summary.json").unlink()
    with locking.holding(stopped):  # as the run itself does while it makes its page
        assert page.at_end(stopped)
    about = parts(stopped / "report.html")["about"]
    assert "refresh" not in about and about["runs"][0]["state"] == "stopped after step 3 of 3"
    lines = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["nonfinite_in_a_row"] = 5
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert page.at_end(stopped)
    state = parts(stopped / "report.html")["about"]["runs"][0]["state"]
    assert state == "stopped after step 3 of 3: its updates were not finite"
    (stopped / "metrics.jsonl").unlink()
    assert page.at_end(stopped)
    assert parts(stopped / "report.html")["about"]["runs"][0]["state"] == "before its first step"

    out = tmp_path / "rounds"
    out.mkdir()
    shutil.copy(run / "manifest.json", out)
    assert page.at_end(out)  # stopped while the first questions were written
    for i in (1, 2):
        shutil.copytree(run, out / f"round-0{i}" / "run")
    (out / "round-02" / "run" / "summary.json").unlink()
    assert page.at_end(out)
    runs = parts(out / "report.html")["about"]["runs"]
    assert [one["name"] for one in runs] == ["round-01/run", "round-02/run"]
    assert runs[1]["command"].endswith("/rounds")  # all of them go on, not the round alone


def test_groups_of_shards_that_lie_elsewhere(run, tmp_path):
    """Of a run --from-shards: its own folder has none."""
    store = shutil.copytree(run / "rollouts", tmp_path / "runs" / "store")
    copy = shutil.copytree(run, tmp_path / "runs" / "r")
    shutil.rmtree(copy / "rollouts")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["config"] |= {"from_shards": "runs/store", "steps": 2}  # from where the run was started
    (copy / "manifest.json").write_text(json.dumps(manifest))
    made = report.main(report.Config(runs=(copy,)))
    found = parts(made)
    assert found["about"]["runs"][0]["parts"] == [0, 1]  # the run went through two of the three
    for step in (0, 1):
        uids = [group["uid"] for group in shards.read_shard(shards.shard_path(store, step))]
        assert [group["uid"] for group in found[f"groups-0-{step}"]] == uids
    assert (made.parent / found["groups-0-0"][0]["image"]).is_file()
    shutil.rmtree(store)
    (about,) = parts(report.main(report.Config(runs=(copy,))))["about"]["runs"]
    assert "those of runs/store, which is not there any more" in about["note"] and about["parts"] == []


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(SettingError, match="nowhere: no run of train_upt.py there; give the folder that was its --out"):
        report.main(report.Config(runs=(tmp_path / "nowhere",)))
    with pytest.raises(SettingError, match="a/manifest.json is a file; give the folder of a run, as .*/a$"):
        report.main(report.Config(runs=(run / "manifest.json",)))
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "rollouts" / "step-000001.jsonl").write_text("{")
    with pytest.raises(ShardError, match="step-000001.jsonl:1: not a JSON record"):
        report.main(report.Config(runs=(broken,)))


@pytest.mark.parametrize(("line", "said"), [
    (b'{"step": 1}\xff', "'utf-8' codec can't decode byte 0xff"),
    (b'{"step": Infinity}', "its step is None"),
    (b'{"step": 1e999}', "its step is inf"),
    (b'{"step": "1"}', "its step is '1'"),
    (b'{"loss": 1}', "it has no 'step'"),
    (b"[1]", "list indices"),
    (b"[" * 100_000, "not JSON"),
])  # fmt: skip
def test_a_damaged_log_is_said(tmp_path, line, said):
    """By whoever reads it, a run that goes on among them."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "kl": NaN}\n' + line + b"\n")
    with pytest.raises(ShardError, match=f"metrics.jsonl: a line is no record of a step .line 2: .*{said}.*; mend"):
        records.steps(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "kl": NaN}\n' + line)  # it is being written
    assert records.steps(tmp_path) == [{"step": 0, "kl": None}]


def test_a_run_ends_well_without_its_page(tiny, tmp_path, monkeypatch, capfd):
    def fails(*_, **__):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(page, "write", fails)
    settings = {"steps": 1, "questions_per_step": 2, "group_size": 2, "max_new_tokens": 2, "eval_questions": 0}
    train_upt.main(train_upt.Config(model=tiny, out=tmp_path / "r", device="cpu", **settings))
    assert (tmp_path / "r" / "summary.json").is_file()
    assert "no page on the run: report.html" in capfd.readouterr().err
