"""Held-out scores: the table, its paired intervals, worked out by hand; and those of a run, found by its folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train_upt
from eval import heldout
from upt.answers import is_correct, vote_key
from upt.data import shapes
from upt.data.questions import Question
from upt.errors import SettingError, UserError
from upt.groups.shards import open_image
from upt.model.decoding import Sampled
from upt.model.policy import Policy
from upt.run import trained


def scores(greedy: list[float], entropy: float, kinds: str | None = None, keep_rows: bool = True) -> dict:
    kinds = kinds or "a" * len(greedy)
    rows = [{"uid": f"u{i}", "kind": k, "greedy": g, "entropy": entropy} for i, (g, k) in enumerate(zip(greedy, kinds))]
    found = {name: heldout.interval([row[name] for row in rows]) for name in ("greedy", "entropy")}
    found["kinds"] = {
        k: {"questions": kinds.count(k), "greedy": heldout.interval([r["greedy"] for r in rows if r["kind"] == k])}
        for k in sorted(set(kinds))
    }
    return found | {"questions": len(rows), "graded": len(rows)} | ({"rows": rows} if keep_rows else {})


def lines(text: str) -> dict[str, str]:
    return {line.split("  ")[0]: line for line in text.splitlines()}


def test_differences_are_paired_by_question():
    # The same ten of forty questions are wrong before, and one of them right after: nearly no doubt about the gain.
    before = scores([0.0] * 10 + [1.0] * 30, 0.244)
    after = scores([1.0] + [0.0] * 9 + [1.0] * 30, 0.081)
    gain = heldout.difference(before, after, "greedy")
    assert gain["value"] == pytest.approx(1 / 40)
    assert gain["low"] == 0.0 and gain["high"] <= 0.1  # unpaired, it would reach from -0.16 to 0.21
    row = lines(heldout.table({"before": before, "after": after}))["greedy"]
    assert row.split()[:2] == ["greedy", "40"] and "75.0 [" in row and "77.5 [" in row and "+2.5 [0.0, " in row


def test_a_question_that_only_one_side_has_stays_out():
    before, after = scores([0.0, 1.0], 0.1), scores([1.0, 1.0, 0.0], 0.1)
    assert heldout.difference(before, after, "greedy")["value"] == 0.5


def test_entropy_has_digits_enough():
    table = heldout.table({"before": scores([1.0] * 40, 0.0441), "after": scores([1.0] * 40, 0.0382)})
    assert heldout.cell({"value": -0.00002, "low": -0.0006, "high": 0.00001}, "entropy", "+") == "0.000 [-0.001, 0.000]"
    assert "0.044 [0.044, 0.044]" in table and "-0.006 [-0.006, -0.006]" in table and "-0.0 " not in table


def test_rows_say_their_n_and_warn_below_thirty():
    table = heldout.table({"x": scores([1.0] * 59, 0.1, "a" * 30 + "b" * 29)})
    assert lines(table)["a greedy"].split()[2] == "30" and lines(table)["b greedy"].split()[2] == "29*"
    assert table.splitlines()[-1].startswith("* fewer than 30")
    assert "fewer" not in heldout.table({"x": scores([1.0] * 30, 0.1)})


def test_scores_of_an_older_run_have_a_difference_without_interval():
    old, new = scores([0.0, 1.0] * 20, 0.1, keep_rows=False), scores([1.0] * 40, 0.1)
    assert heldout.difference(old, new, "greedy") == {"value": 0.5}
    assert lines(heldout.table({"a": old, "b": new}))["greedy"].endswith("+50.0")


def test_intervals_are_percentiles_of_resampled_means():
    values = np.array([0.0, 1.0, 1.0, 1.0])
    found = heldout.interval(values)
    assert found["value"] == 0.75 and found["low"] in (0.25, 0.0) and found["high"] == 1.0


# ------------------------------------------------------------------------------------------------------ --run


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory) -> Path:
    """A run that started from a merged adapter, with settings of its own."""
    root = tmp_path_factory.mktemp("begun")
    first = Policy.load(tiny, dtype="fp32", device="cpu")
    first.add_lora(2, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in first.trainable():
            parameter.normal_(std=0.05)
    first.save(root / "first")
    train_upt.main(
        train_upt.Config(
            data="shapes", model=tiny, adapter=str(root / "first"), out=root / "run", steps=2, save_every=1, seed=3,
            questions_per_step=2, group_size=4, max_new_tokens=5, eval_questions=5, eval_samples=2, lora_rank=2,
            eval_split="validation", reward="random", learning_rate=0.02, prompt="boxed", temperature=0.8, top_p=0.9,
            top_k=50, max_pixels=56 * 56, min_pixels=56 * 56, max_prompt_tokens=400, dtype="fp32", device="cpu",
        )
    )  # fmt: skip
    return root / "run"


def kept(path: Path) -> dict:
    """The scores in a file of a run, less where the pictures lie, which scoring again does not keep."""
    scores = json.loads(path.read_text())
    return scores | {"rows": [row | {"image": None} for row in scores["rows"]]}


def test_a_question_with_its_answers_and_verdicts():
    def said(key: str) -> str:
        return f"so it is \\boxed{{{key}}}"

    question = Question("q", "How many?", None, None, "3", "count")
    sampled = [Sampled(ids=[1, 2], logprobs=[], finish="stop", entropy=x, self_certainty=0.0) for x in (0.1, 0.3, 0.2)]
    row = heldout.row_of(question, None, [said("4")], [said("3"), said("3"), "no answer"], sampled)
    named = [(r["key"], r["correct"]) for r in row["responses"]]
    assert named == [("4", False), ("3", True), ("3", True), (None, False)]
    assert (row["greedy"], row["mean"], row["maj"], row["pass"]) == (0, 2 / 3, 1, 1)
    assert (row["majority_share"], row["abstentions"], row["length"]) == (2 / 3, 1 / 3, 2)
    assert row["entropy"] == pytest.approx(0.2)
    blind = heldout.row_of(Question("q", "How many?", None, None, None, None), None, [said("4")], [said("3")], sampled)
    assert "greedy" not in blind and [r["correct"] for r in blind["responses"]] == [None, None]


def test_a_run_keeps_what_was_asked_and_answered(begun):
    before, after = (json.loads((begun / f"{name}.json").read_text())["rows"] for name in ("before", "after"))
    asked = shapes.questions("validation", 3, 5)
    for question, old, new in zip(asked, before, after, strict=True):
        assert {name: old[name] for name in ("question", "choices", "gold", "kind")} == {
            name: new[name] for name in ("question", "choices", "gold", "kind")
        } == {name: getattr(question, name) for name in ("question", "choices", "gold", "kind")}  # fmt: skip
        assert open_image(begun / "held-out", old["image"]).tobytes() == question.image.tobytes()
        for row in (old, new):
            assert len(row["responses"]) == 3 and row["greedy"] == row["responses"][0]["correct"]
            assert row["mean"] == sum(r["correct"] for r in row["responses"][1:]) / 2
            for r in row["responses"]:
                assert r["key"] == vote_key(r["text"]) and r["correct"] == is_correct(r["text"], question.gold)
    assert [row["responses"] for row in before] != [row["responses"] for row in after]


def test_a_run_is_scored_again_as_it_was_in_training(begun, capsys):
    after, before = (kept(begun / f"{name}.json") for name in ("after", "before"))
    config = heldout.Config(run=begun, device="cpu")
    scores = heldout.main(config)
    assert scores == after != before  # every figure of every question, bit for bit
    assert f"evaluating {begun / 'start'} with {begun / 'adapter'} on 5 of" in capsys.readouterr().err
    last = begun / "checkpoints" / "step-000002"
    for inside in (begun / "adapter", last, last / "adapter"):
        assert heldout.main(heldout.Config(run=inside, device="cpu")) == after
    earlier = heldout.main(heldout.Config(run=begun / "checkpoints" / "step-000001", device="cpu"))
    assert earlier["rows"] != after["rows"] and [row["uid"] for row in earlier["rows"]] == [
        row["uid"] for row in after["rows"]
    ]
    asked = heldout.Config(run=begun, eval_questions=3, split="test", temperature=0.5, device="cpu").resolve()
    assert (asked.eval_questions, asked.split, asked.temperature, asked.top_p) == (3, "test", 0.5, 0.9)


def test_a_runs_policy_has_the_log_probabilities_of_training(begun):
    """Worked out by PEFT's own merge of both adapters, one after the other."""
    config = heldout.Config(run=begun, device="cpu").resolve()
    policy, ids = trained.load_policy(config), torch.tensor([[5, 6, 7, 8]])
    settings = json.loads((begun / "manifest.json").read_text())["config"]
    merged = Policy.load(settings["model"], adapter=settings["adapter"], dtype="fp32", device="cpu")
    merged.load_adapter(begun / "adapter")
    with torch.no_grad():
        assert torch.equal(policy.base(input_ids=ids).logits, merged.base(input_ids=ids).logits)
        start = Policy.load(settings["model"], dtype="fp32", device="cpu").base(input_ids=ids).logits
        with policy.reference():
            reference = policy.base(input_ids=ids).logits
    assert (reference - start).abs().max() > 0.01 and (policy.base(input_ids=ids).logits - reference).abs().max() > 0.01
    question = shapes.questions("validation", 3, 1)[0]
    assert policy.family.look(question.image)[0].grid == (1, 4, 4)  # 56 x 56: the run's pixel limits


def test_a_run_that_cannot_be_found_or_is_not_whole(begun, tiny, tmp_path):
    with pytest.raises(SettingError, match="--run brings its own model and adapter"):
        heldout.Config(run=begun, model=tiny).resolve()
    for nothing in (tmp_path, tmp_path / "nowhere", begun.parent):
        with pytest.raises(SettingError, match="no run of train_upt.py there; give the folder that was its --out"):
            heldout.Config(run=nothing).resolve()
    with pytest.raises(UserError, match="with .*first merged into it, not for .*; give --model .*run/start"):
        heldout.Config(model=tiny, adapter=str(begun / "adapter")).resolve()
    for inside in ("rollouts", "checkpoints", "manifest.json"):
        with pytest.raises(SettingError, match=f"{inside} holds no adapter: give the folder of the run, {begun}$"):
            heldout.Config(run=begun / inside).resolve()
    unfinished = tmp_path / "run"
    shutil.copytree(begun, unfinished)
    manifest = json.loads((begun / "manifest.json").read_text())
    for name in ("model", "data"):
        config = {key: value for key, value in manifest["config"].items() if key != name}
        (unfinished / "manifest.json").write_text(json.dumps(manifest | {"config": config}))
        with pytest.raises(UserError, match=f"manifest.json: no usable '{name}' in its config; .*--model"):
            heldout.Config(run=unfinished).resolve()
    without = {key: value for key, value in manifest["config"].items() if not key.startswith("eval_")}
    (unfinished / "manifest.json").write_text(json.dumps(manifest | {"config": without}))
    assert heldout.Config(run=unfinished).resolve().data == manifest["config"]["data"]
    shutil.copy(begun / "manifest.json", unfinished)
    shutil.rmtree(unfinished / "adapter")
    with pytest.raises(SettingError, match="has no adapter yet: let the run end .*, or give its latest.*step-000002"):
        heldout.Config(run=unfinished).resolve()
    shutil.rmtree(unfinished / "start")
    with pytest.raises(SettingError, match=r"start is gone.*make it again by (.*)$") as refusal:
        heldout.Config(run=unfinished / "checkpoints" / "step-000002").resolve()
    exec(str(refusal.value).split("again by ")[1], {"Policy": Policy})
    again = heldout.Config(run=unfinished / "checkpoints" / "step-000002", device="cpu")
    assert heldout.main(again) == kept(begun / "after.json")
