"""The maker of the embedded model: its demonstrations, its optimizer, and the snapshot it writes."""

import json
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import warmup
from upt import prompts
from upt.answers import is_well_formed, vote_key
from upt.data import shapes
from upt.errors import SettingError
from upt.model.packing import Row
from upt.model.policy import Policy
from upt.prompts import judge_turns
from upt.run import presets
from upt.run.settings import Rollout
from upt.stages import judging
from upt.warmup import demonstrations, lessons, muon


def test_clean_demonstrations_are_right_and_in_the_format_asked_for():
    for item in shapes.questions("warmup", 0, 200):
        for style in demonstrations.STYLES:
            text = demonstrations.demonstrate(item, style)
            assert vote_key(text) == item.gold
            assert is_well_formed(text) == (style == "think-boxed")


def test_guesses_are_as_many_and_as_wrong_as_they_say():
    rng = random.Random(0)
    items = shapes.questions("warmup", 0, 3000)
    right = {"guess": [], "steps": []}
    for item in items:
        text = demonstrations.guess_or_demonstrate(item, "think-boxed", rng, 0.5, 0.6)
        assert is_well_formed(text)
        right["guess" if "by eye" in text else "steps"].append(vote_key(text) == item.gold)
    assert abs(len(right["guess"]) / len(items) - 0.5) < 0.04
    # Four in ten are the right number and the rest any of 10 to 15, which hits the right one now and then.
    assert 0.41 < sum(right["guess"]) / len(right["guess"]) < 0.50 and all(right["steps"])


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 50), (2, 50, 20), (1, 30, 30)):
        values = torch.linalg.svdvals(muon.orthogonalise(torch.randn(shape)))
        assert values.shape == (shape[0], min(shape[1:]))
        assert values.max() < 1.3 and values.median() > 0.6


def test_muon_moves_by_its_learning_rate():
    p = torch.nn.Parameter(torch.zeros(16, 64))
    optimizer = muon.Muon([p], lr=0.1, weight_decay=0.0)
    torch.manual_seed(0)
    p.grad = torch.randn(16, 64)
    optimizer.step()
    # Singular values near 1, times lr * 0.2 * sqrt(64): a Frobenius norm near 0.16 * sqrt(16), against the gradient.
    assert 0.7 * 0.64 < p.norm() < 1.3 * 0.64 and (p.detach() * p.grad).sum() < 0


def test_muon_and_adamw_leave_frozen_parameters_out(tiny):
    network = Policy.load(tiny, dtype="fp32", device="cpu").model.requires_grad_(True)
    everything = {p for o in muon.muon_and_adamw(network, 1e-3) for g in o.param_groups for p in g["params"]}
    assert everything == {*network.parameters()}
    network.model.visual.requires_grad_(False)
    some = {p for o in muon.muon_and_adamw(network, 1e-3) for g in o.param_groups for p in g["params"]}
    assert some == everything - {*network.model.visual.parameters()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    settings = dict(answer_steps=3, judge_steps=2, guess_steps=1, batch=4, judged=8, eval_questions=8)
    for name in ("one", "two", "three"):
        warmup.main(warmup.Config(out=folder / name, seed=int(name == "three"), **settings))
    return folder


def test_a_snapshot_is_laid_out_as_on_the_hub(made):
    files = {path.name for path in (made / "one").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "warmup.json",
    } <= files
    config = AutoConfig.from_pretrained(made / "one")
    assert config.model_type == "qwen2_5_vl"
    model = AutoModelForImageTextToText.from_pretrained(made / "one")
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.8e6
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(made / "one").eos_token_id
    report = json.loads((made / "one" / "warmup.json").read_text())
    assert {"answering", "judging", "guessing", "config", "seconds"} == set(report)
    assert {"greedy", "mean", "maj", "pass", "kinds"} <= set(report["judging"])
    assert Policy.load(str(made / "one")).family.image_processor.merge_size == 2


@pytest.mark.parametrize("before", [[], ["config.json", "warmup.json"]])
def test_where_it_was_interrupted_it_can_be_made_again(tmp_path, monkeypatch, before):
    """For the first time, or over an older one: what is half written is no model, and no folder of somebody else."""
    settings = dict(answer_steps=1, judge_steps=0, batch=2, eval_questions=2, eval_samples=1)
    for name in before:
        (tmp_path / name).touch()

    def killed(policy, folder):
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Policy, "export", killed)
        warmup.main(warmup.Config(out=tmp_path, **settings))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", ".warmup.json"}
    warmup.main(warmup.Config(out=tmp_path, **settings))
    assert "answering" in json.loads((tmp_path / "warmup.json").read_text())
    assert not (tmp_path / ".warmup.json").exists() and Policy.load(str(tmp_path))


def test_it_is_deterministic_and_keyed_by_the_seed(made):
    weights = {name: (made / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")}
    assert weights["one"] == weights["two"] != weights["three"]
    for name in ("tokenizer.json", "config.json"):
        assert (made / "one" / name).read_bytes() == (made / "two" / name).read_bytes()


def test_text_goes_through_the_tokenizer_unchanged(made):
    tokenizer = AutoTokenizer.from_pretrained(made / "one")
    text = "<think>4 red + 2 blue = 6</think>\\boxed{6} ü→∠ 3.5°"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1234")["input_ids"]) == 4  # Qwen's rule: a digit a token


def test_a_verdict_stands_where_the_judge_reads_it(tiny):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    item = shapes.questions("warmup", 0, 5)[3]
    texts = [demonstrations.demonstrate(item, "think-boxed"), "<think>by eye</think>\\boxed{no}"]
    end = policy.tokenizer.eos_token_id
    taught = lessons.verdicts(policy, item, [[*policy.tokens(text), end] for text in texts])
    prefix, after = judging.frame(policy, judge_turns("judge-tiny"), item, True)
    assert policy.place(item.uid, prefix, taught.prompt.features).ids == taught.prompt.ids
    for text, digit, ids, weights in zip(texts, "90", taught.responses, taught.weights, strict=True):
        asked = policy.tokens(text + after + presets.TINY["judge_prefix"])
        assert ids[: len(asked)] == asked and ids[len(asked)] == policy.tokens(digit)[0]
        verdict = len(policy.tokens("\\boxed{9/9}")) + 1
        # The candidate is judged, not taught.
        assert weights == [0.0] * (len(ids) - verdict) + [lessons.VERDICT_WEIGHT] * verdict


def test_answers_to_be_judged_are_the_models_own_and_whole(tiny):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    items = shapes.questions("warmup", 0, 8)
    settings = dict(group_size=8, max_new_tokens=40, max_prompt_tokens=512, prompt="think-boxed", seed=1)
    sampling = Rollout(model=tiny, temperature=1.0, top_p=1.0, **settings)
    one, two = lessons.own_answers(policy, items, sampling), lessons.own_answers(policy, items[:3], sampling)
    assert len(one) == 8 and one[:3] == two  # a question's answers do not depend on what else is asked
    end = policy.tokenizer.eos_token_id
    assert all(ids[-1] == end and len(ids) <= 40 for answers in one for ids in answers)
    # A model that has learnt nothing stops by chance, at one token in 400 or so: 1 - .9975 ** 40 is a tenth of 64.
    assert 0 < sum(map(len, one)) < 20


def test_each_phase_teaches_what_it_says(tmp_path, monkeypatch):
    batches, tower, real = {}, {}, lessons.train

    def record(policy, made, steps, optimizers, end, name):
        made, vision = [*made], policy.base.model.visual.state_dict()
        before = {key: value.clone() for key, value in vision.items()}
        real(policy, made, steps, optimizers, end, name)
        batches[name] = made
        tower[name] = any(not torch.equal(vision[key], before[key]) for key in before)

    judged = []
    monkeypatch.setattr(lessons, "train", record)
    monkeypatch.setattr(lessons, "own_answers", lambda policy, items, sampling: [[[5, 6]]] * len(items))
    real_verdicts = lessons.verdicts
    monkeypatch.setattr(lessons, "verdicts", lambda p, item, ids: judged.append(item) or real_verdicts(p, item, ids))
    settings = dict(answer_steps=2, judge_steps=3, guess_steps=2, batch=4, judging=3, asking=2, judged=5)
    warmup.main(warmup.Config(out=tmp_path, questions=20, eval_questions=2, eval_samples=1, **settings))
    assert {name: [len(batch) for batch in of] for name, of in batches.items()} == {
        "answering": [4, 4], "judging": [4 + 3 + 2] * 3, "guessing": [4, 4]
    }  # fmt: skip
    assert tower == {"answering": True, "judging": False, "guessing": True}  # whether it has moved
    assert all(set(batch[4].weights[0]) == {0.0, lessons.VERDICT_WEIGHT} for batch in batches["judging"])
    uids = [item.uid for item in shapes.questions("warmup", 0, 20 + 5 + 6)]
    assert [item.uid for item in judged] == [uids[20 + n % 5] for n in range(9)]  # none that answering has taught


def test_more_questions_than_there_are_pictures_are_refused(tmp_path):
    with pytest.raises(SettingError, match="--questions 39999, --judged 1000 .* 240 are more than the 40000 pictures"):
        warmup.main(warmup.Config(out=tmp_path / "x", questions=39999))
    assert not (tmp_path / "x").exists()


def test_a_question_to_be_foreseen_leaves_prompt_and_answer_as_they_are(tiny):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    item = shapes.questions("warmup", 0, 5)[3]
    made = lessons.lesson(policy, item, "think-boxed", demonstrations.demonstrate(item, "think-boxed"))
    taught = lessons.with_question(policy, made, item)
    assert taught.prompt.ids + taught.responses[0] == made.prompt.ids + made.responses[0]
    asked, answer = policy.tokens(item.question), made.responses[0]
    assert policy.tokenizer.decode(taught.prompt.ids[-1:]) == "<|vision_end|>"
    assert policy.tokenizer.decode(taught.responses[0]).startswith(item.question)
    between = len(taught.responses[0]) - len(asked) - len(answer)
    expected = [lessons.QUESTION_WEIGHT] * len(asked) + [0.0] * between + [1.0] * len(answer)
    assert taught.weights == [expected] and between > 5
    policy.see([(made.prompt, made.pixels, None)])
    rows = [Row(x.prompt, x.responses, []) for x in (made, taught)]
    with torch.no_grad():
        one, two = (policy.logprobs([row])[0] for row in rows)
    assert torch.allclose(one, two[-len(answer) :], atol=1e-5)


def test_both_ways_of_asking_are_taught(tmp_path, monkeypatch):
    taught, real = [], lessons.asking_lesson

    def record(policy, item, mode, texts):
        taught.append((item, mode, texts))
        return real(policy, item, mode, texts)

    monkeypatch.setattr(lessons, "asking_lesson", record)
    settings = dict(answer_steps=1, judge_steps=6, batch=2, judged=5, judging=2, eval_questions=4, eval_samples=1)
    warmup.main(warmup.Config(out=tmp_path, questions=14, asking=4, **settings))
    answered = shapes.questions("warmup", 0, 14 + 5)
    assert len(taught) == 24 and {item.uid for item, _, _ in taught}.isdisjoint(item.uid for item in answered)
    assert [mode for _, mode, _ in taught] == list(demonstrations.MODES) * 12
    for item, mode, texts in taught:
        assert len(texts) == 2 and all(shapes.understand(item.scene, text) for text in texts)
        single = item.kind in ("angle", "length")  # a picture that has one question only
        assert texts[0] == item.question if mode == "direct" or single else texts[0] != item.question


def test_asking_lessons_show_what_synthesis_shows(tiny):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    item = shapes.questions("warmup", 0, 5)[3]
    for mode in demonstrations.MODES:
        made = lessons.asking_lesson(policy, item, mode, ["How long?", "How wide is it?"])
        prompt = policy.tokenizer.decode(made.prompt.ids)
        assert prompts.asking(mode).split("{question}")[-1][:60] in prompt
        assert (item.question in prompt) == (mode == "in-context")
        texts = [policy.tokenizer.decode(response) for response in made.responses]
        assert texts == ["How long?<|im_end|>", "How wide is it?<|im_end|>"]
        assert made.weights == [[1.0] * len(response) for response in made.responses]
