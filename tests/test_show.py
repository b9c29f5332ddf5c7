"""A run in a notebook: tables and curves by hand, cards that hold text as text."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.test_report import HOSTILE
from tests.test_shards import make_group
from upt import show
from upt.errors import SettingError, ShardError
from upt.groups import shards
from upt.groups.shards import SCHEMA, save_image


def row(uid: str, right: bool, text: str) -> dict:
    response = {"text": text, "key": text, "correct": right}
    asked = {"question": f"{uid}?", "choices": None, "gold": "7", "image": None, "kind": None}
    return {"uid": uid, "greedy": float(right), "responses": [response, response], **asked}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    manifest = {"schema": SCHEMA, "stage": "train", "config": {}, "seed": 0, "model": None, "adapter": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows = [{"step": step, "entropy": 0.5 / (step + 1), "seconds": {"rollout": step}, "kl": None} for step in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "ent')
    for name, right in (("before", (0, 1, 1, 0)), ("after", (1, 0, 1, 0))):
        found = [row(f"q{i}", bool(x), f"{name} {i}") for i, x in enumerate(right)]
        scores = {"mean": {"value": sum(right) / 4}, "entropy": {"value": 0.5}, "rows": found}
        (folder / f"{name}.json").write_text(json.dumps(scores))
    picture = save_image(folder / "rollouts", Image.new("RGB", (4, 4), "red"))
    groups = [make_group(uid=f"g{i}", keys=("7", "7", "8", None), image=picture) for i in range(2)]
    for r, reward in zip(groups[1]["responses"], (1.0, 1.0, 0.0, 0.0)):
        r |= {"reward": reward, "advantage": reward - 0.5, "judge": {"score": None, "parsed": False}}
    shards.write_shard(shards.shard_path(folder / "rollouts", 3), groups)
    return folder


def test_metrics_are_a_table(run):
    table = show.metrics(run)
    assert table.index.tolist() == [0, 1, 2, 3]  # the line that is being written is left out
    assert table["entropy"].tolist() == [0.5, 0.25, 0.5 / 3, 0.125] and table["seconds.rollout"].tolist() == [*range(4)]


def test_curves_have_a_panel_for_what_was_measured(run):
    figure = show.curves(run, names=("kl", "entropy", "seconds.rollout"), smooth=2)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["entropy", "seconds.rollout"]
    (line,) = shown[1].lines
    np.testing.assert_allclose(line.get_ydata(), [0, 0.5, 1.5, 2.5])
    both = show.curves(run, run, names=("entropy",))
    assert len(both.axes) == 1
    with pytest.raises(SettingError, match="none of nothing was measured; there are .*entropy"):
        show.curves(run, names=("nothing",))


def test_a_group_is_a_card(run):
    card = show.group(run, step=3, index=1)
    assert "votes: 2 × 7, 1 × 8; gold: 7" in repr(card) and "| +1.000 | +0.500 | –" in repr(card)
    assert card._repr_html_().count("<b><bdi>7</bdi></b>") == 2 and "data:image/png;base64," in card._repr_html_()
    assert repr(show.group(run, step=3, uid="g0")).startswith("g0\n")
    # A run --from-shards has its groups elsewhere.
    other = run.parent / "other"
    other.mkdir()
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"] = {"from_shards": str(run / "rollouts"), "steps": 1}
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert repr(show.group(other, step=0, uid="g1")) == repr(card)
    for wanted, error, message in (
        ({"step": 5}, ShardError, "step-000005.jsonl: no such shard; there are step-000003 to step-000003"),
        ({"step": 3, "index": 2}, SettingError, "no group of index 2 among its 2"),
        ({"step": 3, "uid": "x"}, SettingError, "no group of uid 'x'"),
    ):
        with pytest.raises(error, match=message):
            show.group(run, **wanted)


def test_text_is_text():
    for text in HOSTILE:
        group = make_group(uid=text, question=text, choices=[text] * 40, gold=text, keys=("7",))
        group["responses"][0] |= {"text": text, "key": text}
        card = show.shown(group)
        html = card._repr_html_()
        assert not re.search("<(script|img|svg|a)", html) and len(html) < 100_000 and html.encode()
        outside = re.sub("<bdi>[^<]*</bdi>", "", html)
        assert not {"\u202e", "\x00"} & {*outside, *repr(card)}  # marks of direction end with their text
    group = make_group(keys=("\u202e1", "\u202e1", "2"), gold="3\u2067")  # each ends by itself, not with the line
    facts = re.search("<p>(<bdi>votes.*?)</p>", show.shown(group)._repr_html_())[1]
    parts = [f"<bdi>{part}</bdi>" for part in ("votes: ", "2 × ", "\u202e1", ", ", "1 × ", "2", "; gold: ", "3\u2067")]
    assert facts == "".join(parts)
    assert "&lt;script&gt;" in show.shown(make_group(uid=HOSTILE[0]))._repr_html_()
    assert len(show.shorter("x" * 1_000_000)) < show.CHARACTERS + 10


def test_a_terminal_gets_no_commands():
    assert show.printable("a\x1b]0;x\x07\n\tb\u202e五\ud800") == "a\\x1b]0;x\\x07\n\tb\\u202e五\\ud800"


def test_what_changed(run):
    gained = show.changed(run)
    assert repr(gained).startswith("gained: 1 of 4 held-out questions\n\nq0\nq0?\nbefore | before 0\nafter | after 0")
    assert "q1" in repr(show.changed(run, "lost")) and "q2" in repr(show.changed(run, "kept"))
    assert "q3" in repr(show.changed(run, "missed")) and "<td" in show.changed(run)._repr_html_()
    for name in ("before", "after"):
        scores = json.loads((run / f"{name}.json").read_text())
        for one in scores["rows"]:
            one["gold"] = one["responses"][0]["correct"] = None
        (run / f"{name}.json").write_text(json.dumps(scores))
    with pytest.raises(SettingError, match="its 4 held-out questions have no gold.* python report.py"):
        show.changed(run)
    with pytest.raises(SettingError, match="'won': expected one of gained, lost, kept, missed"):
        show.changed(run, "won")
    scores = json.loads((run / "after.json").read_text())
    scores["rows"] = [{"uid": row["uid"], "greedy": 1.0} for row in scores["rows"]]  # from before answers were kept
    (run / "after.json").write_text(json.dumps(scores))
    with pytest.raises(SettingError, match="no held-out answers before and after"):
        show.changed(run)
    (run / "after.json").unlink()
    with pytest.raises(SettingError, match="no held-out answers before and after"):
        show.changed(run)


def test_runs_are_compared(run, tmp_path):
    table = show.compare(run)
    assert table.loc[str(run), ("mean", "gain")] == 0 and table.loc[str(run), ("entropy", "after")] == 0.5
    with pytest.raises(SettingError, match="nowhere: no run there"):
        show.compare(tmp_path / "nowhere")
