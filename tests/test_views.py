"""Views: pictures that change no answer, half of a group that sees them, and runs in which it does."""

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
import rollout
import synthesize
import train_upt
from eval import heldout
from eval import run as eval_run
from kernels import row_id
from tests.test_policy import exact, one_by_one, questions, responses, with_lora
from tests.test_train import SMALL, adapter, run, same
from upt import data
from upt.data import Question, Questions, shapes
from upt.data.views import VIEWS, shown, without_view
from upt.errors import SettingError, ShardError, Stopped
from upt.groups import shards
from upt.model import decoding
from upt.model.packing import Prompt, pack
from upt.model.policy import Policy
from upt.prompts import template
from upt.run.settings import Sampling
from upt.stages import sampling

# ------------------------------------------------------------------------------------------------ pictures


def chequered(width: int, height: int) -> Image.Image:
    """Blue, with a red field in the middle."""
    pixels = np.full((height, width, 3), (10, 20, 200), np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = (240, 40, 40)
    return Image.fromarray(pixels)


def test_views_by_hand():
    image = chequered(40, 20)
    sizes = {name: view(image).size for name, view in VIEWS.items()}
    assert sizes == {"brighter": (40, 20), "faded": (40, 20), "scaled": (46, 23), "padded": (46, 26)}
    # A tenth of the way to 255: 10 + 24.5, 20 + 23.5, 200 + 5.5.
    assert VIEWS["brighter"](image).getpixel((0, 0)) == pytest.approx((34.5, 43.5, 205.5), abs=0.5)
    # Grey by 299/1000 R + 587/1000 G + 114/1000 B: 38 for blue, 100 for an eighth part of red (50 of 800 pixels).
    grey = (750 * 38 + 50 * 100) / 800
    faded = tuple(0.9 * value + 0.1 * grey for value in (10, 20, 200))
    assert VIEWS["faded"](image).getpixel((0, 0)) == pytest.approx(faded, abs=1)
    assert VIEWS["scaled"](image).getpixel((14, 8)) == (240, 40, 40)
    padded = VIEWS["padded"](image)
    assert padded.crop((3, 3, 43, 23)).tobytes() == image.tobytes() and padded.getpixel((0, 0)) == (10, 20, 200)
    assert VIEWS["scaled"](chequered(39, 20)).size == (45, 23)  # 44.85, up
    image.putpixel((0, 0), (255, 255, 255))  # one pixel of the edge is no reason for another border
    assert VIEWS["padded"](image).getpixel((0, 0)) == (10, 20, 200)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", [(84, 84), (2, 400), (3, 3), (400, 2), (1000, 700)])
def test_views_of_any_picture_can_be_shown_and_are_the_same_every_time(view, size):
    image = chequered(*size)
    before, seen = image.tobytes(), VIEWS[view](image)
    assert seen.mode == "RGB" and seen.tobytes() == VIEWS[view](image).tobytes()
    assert image.tobytes() == before and seen.tobytes() != before
    assert max(seen.size) <= 200 * min(seen.size)  # what image processors take


@pytest.mark.parametrize("view", VIEWS)
def test_colours_stay_apart_and_in_their_places(view):
    image = shapes.questions("train", 0, 1)[0].image
    colours, fields = [shapes.BACKGROUND, shapes.WHITE, *shapes.COLOURS.values()], []
    for colour in colours:
        image.paste(colour, (28, 28, 56, 56))
        seen = VIEWS[view](image)
        fields.append(seen.getpixel((seen.width // 2, seen.height // 2)))
    apart = [max(abs(a - b) for a, b in zip(one, two)) for i, one in enumerate(fields) for two in fields[:i]]
    assert min(apart) > 60  # green and background, 96 apart in the picture


def test_the_setting_knows_every_view():
    hint = get_type_hints(Sampling)["view"]
    assert {*get_args(get_args(hint)[0])} == {*VIEWS}


def test_a_question_is_shown_in_its_view():
    image = chequered(20, 20)
    question = Question("u", "?", None, image, None, view="padded")
    plain, viewed = shown(question)
    assert plain is question and viewed.image.size == (24, 24) and viewed.uid == "u"
    for other in (replace(question, view=None), replace(question, image=None)):
        assert shown(other) == [other]


# ------------------------------------------------------------------------------------------------ in the model


def test_rows_of_a_group_in_two_views():
    twin = Prompt("u", [1, 2, 3, 4], torch.arange(4)[None], None)
    prompt = Prompt("u", [1, 2, 3], torch.arange(3)[None], None, twin)
    alone = Prompt("v", [1, 2], torch.arange(2)[None], None)
    assert [prompt.seen_by(i, 4) is twin for i in range(4)] == [False, False, True, True]
    group = [[7], [7, 7], [], [8, 8]]
    found = [(row.prompt, row.owners) for batch in pack([prompt, alone], [group, group], 100) for row in batch]
    expected = [(twin, [(0, 3)]), (prompt, [(0, 0), (0, 1)]), (alone, [(1, 0), (1, 1), (1, 3)])]
    assert sorted(found, key=lambda row: -len(row[0].ids)) == expected
    found = [(len(row.prompt.ids), row.owners) for batch in pack([prompt], [[[7, 7]] * 4], 4) for row in batch]
    assert found == [(4, [(0, 2)]), (4, [(0, 3)]), (3, [(0, 0)]), (3, [(0, 1)])]


def test_log_probabilities_of_a_twin_are_those_of_its_picture_alone(tiny):
    policy = exact(with_lora(tiny))
    asked = [replace(question, view="scaled") for question in questions()]  # to other grids
    answers = [group + group for group in responses(policy, len(asked))]  # the same three in either view
    plain = one_by_one(policy, questions(), answers)
    viewed = one_by_one(policy, [shown(question)[-1] for question in asked], answers)
    prompts, _ = policy.encode(asked, template("boxed"))
    assert [prompt.twin is None for prompt in prompts] == [False, False, False, True]  # the last has no picture
    differ = []
    for batch in pack(prompts, answers, 100):
        logprob, _ = policy.logprobs(batch, 0.7)
        owners = [owner for row in batch for owner in row.owners]
        sizes = [len(response) for row in batch for response in row.responses]
        for (g, i), found in zip(owners, logprob.split(sizes)):
            torch.testing.assert_close(found, (viewed if i >= 3 else plain)[g, i][0], atol=1e-11, rtol=1e-11)
            differ.append(float((found - (plain if i >= 3 else viewed)[g, i][0]).abs().max()))
    assert len(differ) == 24 and sum(d > 1e-6 for d in differ) == 18  # all but those without a picture


def test_half_of_a_group_is_sampled_from_the_view_and_half_as_without(tiny):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    settings = rollout.Config(model=tiny, group_size=4, max_new_tokens=8).resolve()
    found = [*data.load("shapes", "train", 0, limit=6), Question("text", "What is 3+4?", None, None, "7")]
    asked = [replace(question, view="padded") for question in found]
    prompts, _ = policy.encode(found, template("boxed"))
    paired, _ = policy.encode(asked, template("boxed"))
    without = [[r.ids for r in group] for group in sampling.sample_groups(policy, prompts, 3, settings)]
    both = [[r.ids for r in group] for group in sampling.sample_groups(policy, paired, 3, settings)]
    assert [group[:2] for group in both] == [group[:2] for group in without]
    assert both[-1] == without[-1] and all(one[2:] != two[2:] for one, two in zip(both[:-1], without[:-1]))
    viewed, _ = policy.encode([shown(question)[-1] for question in asked], template("boxed"))
    rows = [row_id(3, prompt.uid, g) for prompt in viewed for g in (2, 3)]
    alone = [r.ids for r in decoding.generate(policy, viewed, rows, settings)]
    assert [ids for group in both for ids in group[2:]] == alone


def test_a_prompt_that_is_too_long_in_one_view_is_left_out(tiny):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    image = chequered(140, 84)
    question = Question("u", "?", None, image, None)
    (plain,), _ = policy.encode([question], "{question}")
    (wider,), _ = policy.encode([replace(question, image=VIEWS["padded"](image))], "{question}")
    assert len(wider.ids) > len(plain.ids)
    asked = [replace(question, view="padded")]
    assert policy.encode(asked, "{question}", len(wider.ids))[0][0].twin.ids == wider.ids
    assert policy.encode(asked, "{question}", len(wider.ids) - 1) == ([], {"u": len(wider.ids)})


# ------------------------------------------------------------------------------------------------ in a run


SETTINGS = {"steps": 1, "reward": "two-view", "view": "padded", "minibatches": 2, "kl_coef": 0.01}


@pytest.fixture(scope="module")
def online(tiny, tmp_path_factory):
    """A step whose groups see their pictures padded by half, and are rewarded for what both halves answer."""
    with pytest.MonkeyPatch.context() as patched:
        # A random model gives no boxed answers; these keys make groups that agree in part.
        patched.setattr(sampling, "vote_key", lambda text, choices=None: str(len(text) % 2))
        yield run(tiny, tmp_path_factory.mktemp("views") / "online", **SETTINGS)


def test_the_record_says_who_saw_what(online):
    groups = shards.read_shard(shards.shard_path(online / "rollouts", 0))
    assert [[r.get("view") for r in group["responses"]] for group in groups] == [[None, None, "padded", "padded"]] * 4
    pictures = {group["image"] for group in groups}
    assert pictures == {path.relative_to(online / "rollouts").as_posix() for path in online.rglob("*.png")}
    question = data.load("shapes", "train", 0)[int(groups[0]["uid"].rpartition("/")[2])]
    assert shards.open_image(online / "rollouts", groups[0]["image"]).tobytes() == question.image.tobytes()
    # On-policy: what the trainer makes of the tokens is what they were sampled with, in both views.
    row = json.loads((online / "metrics.jsonl").read_text())
    assert row["logprob_gap_max"] < 1e-4
    assert {response["reward"] for group in groups for response in group["responses"]} == {0, 1}
    assert any(float(value.abs().max()) > 0 for name, value in adapter(online).items() if "lora_B" in name)


def test_the_stages_give_the_same_adapter(tiny, online, tmp_path):
    sizes = {name: SMALL[name] for name in ("questions_per_step", "group_size", "max_new_tokens")}
    rollout.main(rollout.Config(model=tiny, out=tmp_path / "rollouts", steps=1, view="padded", **sizes))
    rewards.main(rewards.Config(rollouts=tmp_path / "rollouts", out=tmp_path / "scored", reward="two-view"))
    own = SMALL | {"reward": None, "minibatches": 2, "kl_coef": 0.01, "from_shards": tmp_path / "scored"}
    train_upt.main(train_upt.Config(out=tmp_path / "staged", **own))
    assert same(online, tmp_path / "staged")
    assert json.loads((tmp_path / "staged/manifest.json").read_text())["config"]["view"] == "padded"
    with pytest.raises(SettingError, match="--view scaled: .*sampled with --view padded.*leave it out"):
        train_upt.main(train_upt.Config(out=tmp_path / "other", view="scaled", **own))


def test_a_stopped_run_goes_on_from_what_it_had_sampled(tiny, online, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise Stopped("here", 143)

    with monkeypatch.context() as patched:
        patched.setattr(train_upt, "rewarded", stopped)
        with pytest.raises(Stopped):
            run(tiny, tmp_path / "run", **SETTINGS)
    assert shards.shard_path(tmp_path / "run/rollouts", 0).exists()
    train_upt.main(train_upt.Config(out=tmp_path / "run", resume=True))
    assert same(online, tmp_path / "run")


def test_label_blind_with_two_views(tiny, online, tmp_path, monkeypatch):
    real = data.load
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: real(*args, **kwargs).without_gold())
    assert same(online, run(tiny, tmp_path / "blind", **SETTINGS))


def test_evaluation_sees_plain_pictures(tiny):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    config = rollout.Config(model=tiny, max_new_tokens=6, view="padded").resolve()
    asked = data.load("shapes", "test", 0, limit=3)
    scores = [heldout.evaluate(policy, asked, replace(config, view=view), 3, 2) for view in ("padded", None)]
    assert scores[0] == scores[1]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"view": "scaled", "group_size": 5}, "--view scaled: .*--group-size has to be even, not 5"),
        ({"view": "mirrored"}, "view is 'mirrored': expected brighter or faded or scaled or padded"),
        ({"reward": "two-view"}, "--reward two-view .*--view faded"),
        ({"reward": "two-view(lam_fmt=.5)"}, "--reward two-view.*--view faded"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tiny, tmp_path, settings, said):
    with pytest.raises(SettingError, match=said):
        run(tiny, tmp_path / "run", steps=1, **settings)
    assert not (tmp_path / "run").exists()


def test_questions_without_a_picture_are_counted_or_refused(tiny, tmp_path):
    rows = [{"question": f"What is {i} + 1?"} for i in range(4)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for script in (train_upt, rollout):
        config = script.Config(model=tiny, data=str(tmp_path / "text.jsonl"), view="faded", out=tmp_path / "run")
        with pytest.raises(SettingError, match="--view faded: the questions of text have no pictures; leave it out"):
            script.main(config)
        assert not shards.list_shards(tmp_path / "run")
    some = Questions("mine", "train", [*"abcde"], None, has_gold=False, note="", pictures=3)
    assert "2 of 5 questions have no picture" in without_view(some, "faded")
    assert without_view(data.load("shapes", "train", 0, limit=4), "faded") is None


def test_scripts_that_compare_with_plain_pictures_have_no_view():
    for script in (heldout, eval_run, synthesize):
        with pytest.raises(SettingError, match="view is 'faded': expected None"):
            script.Config(view="faded")


@pytest.mark.parametrize("views", ["ps", "s..s", "..sp", "ssss", "...s", ".s.", "s"])
def test_a_record_in_which_it_is_not_told_who_saw_what(views):
    from tests.test_shards import make_group

    names = {"p": "padded", "s": "scaled", ".": None}
    group = make_group(keys=("7",) * len(views))
    for response, letter in zip(group["responses"], views):
        response["view"] = names[letter]
    with pytest.raises(ShardError, match="x:1: the views of the responses are .*first half"):
        shards.validate(group, "x:1")
