import copy
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from PIL import Image

import rewards
from rewards import Config, advantage, bind_reward, g, main, reward, score
from tests.test_shards import make_group
from upt import answers
from upt.answers import before_answer, extract_answer, keeps_format
from upt.groups import manifests, shards, variants, votes
from upt.groups.novelty import novelty, similarity
from upt.run import presets
from upt.run.metrics import summary


def group_of(keys, **fields):
    return make_group(keys=tuple(None if key == "." else key for key in keys), **fields)


def judged_group(keys, scores, **fields):
    """With a judge's score for each response; None: its judgement could not be parsed."""
    group = group_of(keys, **fields)
    for response, s in zip(group["responses"], scores, strict=True):
        response["judge"] = {"score": s, "parsed": s is not None}
    return group


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_votes_count_keys_and_leave_abstentions_out():
    group = group_of(["b", None, "a", "b", None])
    assert votes.counts(group) == {"b": 2, "a": 1} and list(votes.counts(group)) == ["b", "a"]
    assert votes.majority_key(group) == "b"
    assert votes.majority_share(group) == 2 / 5
    assert votes.distinct(group) == 2
    assert votes.abstentions(group) == 2
    assert votes.majority_key(["x", "y", "x"]) == "x"  # keys alone do as well


def test_a_tie_or_silence_has_no_majority():
    assert votes.majority_key(["a", "b", "b", "a", None]) is None
    assert votes.majority_key(["a", "b", "b", "a", None], ties="first") == "a"
    assert votes.majority_share(["a", "b", "b", "a", None]) == 2 / 5
    for ties in ("none", "first"):
        assert votes.majority_key([None, None, None], ties=ties) is None
    assert votes.majority_share([None, None]) == 0 and votes.distinct([None, None]) == 0
    assert votes.majority_key([None, None, "a"]) == "a"  # two abstentions do not outvote one answer
    with pytest.raises(ValueError, match="ties"):
        votes.majority_key(["a"], ties="last")


# C = 1 - H(pi) / log 2 for pi = (3/5, 2/5), and for pi = (4/7, 3/7)
C_32 = 1 + (3 / 5 * math.log(3 / 5) + 2 / 5 * math.log(2 / 5)) / math.log(2)
C_43 = 1 + (4 / 7 * math.log(4 / 7) + 3 / 7 * math.log(3 / 7)) / math.log(2)
CASES = [
    # keys, variant, rewards
    ("aab.", "majority", [1, 1, 0, 0]),
    ("a...", "majority", [1, 0, 0, 0]),
    ("abab.", "majority", [0, 0, 0, 0, 0]),
    ("babac", "majority(ties='first')", [1, 0, 1, 0, 0]),
    ("....", "majority", [0, 0, 0, 0]),
    ("....", "majority(ties='first')", [0, 0, 0, 0]),
    ("aab.", "frequency", [0.5, 0.5, 0.25, 0]),
    ("abab.", "frequency", [0.4, 0.4, 0.4, 0.4, 0]),
    ("....", "frequency", [0, 0, 0, 0]),
    ("a", "frequency", [1]),
    ("aab.", "frequency(gamma=2)", [0.25, 0.25, 0.0625, 0]),
    ("aab.", "frequency(gamma=.5)", [0.5**0.5, 0.5**0.5, 0.5, 0]),
    ("....", "frequency(gamma=.001)", [0, 0, 0, 0]),
    ("aaaaaaaaab", "gated-frequency", [1] * 9 + [0]),  # p(m) = .9 > .85: the gate is open
    ("aaaaaaaabb", "gated-frequency", [0.8] * 8 + [0.2] * 2),
    ("a" * 17 + "bbb", "gated-frequency", [0.85] * 17 + [0.15] * 3),  # p(m) = .85 is not above it
    ("aaaaaaaaa.", "gated-frequency", [1] * 9 + [0]),
    ("aaaaaa....", "gated-frequency", [0.6] * 6 + [0] * 4),  # abstentions stay in the denominator
    ("aaab", "gated-frequency(threshold=.7)", [1, 1, 1, 0]),
    ("aabb.", "gated-frequency(threshold=.3)", [0.4, 0.4, 0.4, 0.4, 0]),  # above, but no unique m
    ("....", "gated-frequency", [0, 0, 0, 0]),
    ("aab.", "confident-majority", [1, 1, 0, 0]),  # p(m) = .5 is enough
    ("aaa", "confident-majority(tau=1)", [1, 1, 1]),
    ("aab..", "confident-majority(tau=.4)", [1, 1, 0, 0, 0]),
    ("a", "confident-majority", [1]),
    ("aab.", "semantic-entropy", [0.5, 0.5, 0.25, 0]),
    ("abcd", "semantic-entropy", [0, 0, 0, 0]),
    ("ab..", "semantic-entropy", [0, 0, 0, 0]),  # the two that answer differ
    ("a...", "semantic-entropy", [0, 0, 0, 0]),  # a single answer agrees with no other
    ("aa..", "semantic-entropy", [0.5, 0.5, 0, 0]),
    ("aaaa", "semantic-entropy", [1, 1, 1, 1]),
    ("....", "semantic-entropy", [0, 0, 0, 0]),
    ("a", "semantic-entropy", [0]),
    # a single answer: pi = 1, C = 1, log pi - log max pi = 0
    ("a", "dirichlet", [sigmoid(22 * 0.06)]),
    ("aa.", "dirichlet", [sigmoid(1.32)] * 2 + [0]),
    ("aa.", "dirichlet(beta=2,delta=.5)", [sigmoid(1)] * 2 + [0]),
    ("....", "dirichlet", [0, 0, 0, 0]),
    ("aab.", "dirichlet", [C_32 * sigmoid(1.32)] * 2 + [C_32 * sigmoid(22 * (math.log(2 / 3) + 0.06)), 0]),
    ("aab.", "dirichlet(alpha=2)", [C_43 * sigmoid(1.32)] * 2 + [C_43 * sigmoid(22 * (math.log(3 / 4) + 0.06)), 0]),
    ("aab.", "continuous-consistency", [0.5**0.7, 0.5**0.7, 0.25**0.7, 0]),  # <think>hm</think> is one word
    ("aab.", "continuous-consistency(power=1,words=.5)", [0.45, 0.45, 0.225, 0]),
    ("aab.", "continuous-consistency(power=2,words=.8,penalty=.4)", [0.225, 0.225, 0.05625, 0]),  # (1 - .8) / .8 = .25
    ("aab.", "continuous-consistency(power=0)", [1, 1, 1, 0]),  # and not 0^0 for the abstention
    ("....", "continuous-consistency", [0, 0, 0, 0]),
    ("a", "continuous-consistency", [1]),
    ("aab.", "scrl", [1, 1, 0, -1]),  # p(m) = .5, .25 above the second, which is not below .125
    ("aaabcdef", "scrl", [1, 1, 1] + [0] * 5),  # .375 is enough; of 8 responses none can be below .125
    ("aab.", "scrl(tau_pos=.51)", [0, 0, 0, -1]),
    ("aab.", "scrl(margin=.25)", [0, 0, 0, -1]),  # not above the margin
    ("aab.", "scrl(tau_low=.3)", [1, 1, -1, -1]),  # as unsure as the group is unsure enough
    ("aab.", "scrl(tau_low=1)", [1, 1, -1, -1]),  # never the trusted one
    ("aabb", "scrl(margin=0)", [0, 0, 0, 0]),  # a tie is no margin
    ("a...", "scrl", [0, -1, -1, -1]),  # alone, but .25 < .375: abstentions stay in the denominator
    ("aa..", "scrl", [1, 1, -1, -1]),  # no second: its share is 0
    ("aa..", "scrl(margin=.5)", [0, 0, -1, -1]),
    ("....", "scrl(tau_pos=0)", [-1, -1, -1, -1]),
    ("a", "scrl", [1]),
    ("aaaaaabbbbccdefg", "scrl", [0] * 6 + [0] * 4 + [0, 0] + [-1] * 4),  # 6/16 = .375, but 2/16 is not above .125
    ("aaaaaaabbbbccdef", "scrl", [1] * 7 + [0] * 4 + [0, 0] + [-1] * 3),
    ("aaaaaaaabb", "scrl(margin=.6)", [0] * 10),  # .8 - .2 = .6, which in floating point is .6000000000000001
    ("aab.", "evol", [0.75, 0.75, -0.75, -1]),  # <think>hm</think> throughout: no text is more novel, nu = 1/2
    ("aabb", "evol", [-0.75] * 4),  # no m
    ("a...", "evol", [0.75, -1, -1, -1]),
    ("....", "evol", [-1] * 4),
    ("a", "evol", [0.75]),
    ("aab.", "self-certainty", [3.1] * 4),
    ("aab.", "negative-entropy", [-0.21] * 4),
]


@pytest.mark.parametrize("keys, variant, expected", CASES)
def test_rewards_by_hand(keys, variant, expected):
    got = reward(group_of(keys), variant)
    assert got == pytest.approx(expected, abs=1e-15)
    assert all(type(r_i) is float for r_i in got)


BY_COUNT = [
    "majority",
    "frequency",
    "frequency(gamma=.3)",
    "gated-frequency",
    "confident-majority",
    "dirichlet",
    "semantic-entropy",
]


@pytest.mark.parametrize("variant", BY_COUNT)
def test_count_rewards_see_keys_alone_and_no_order(variant):
    keys = ["a", "b", "a", None, "c", "a"]
    blind = group_of(keys, gold=None)
    for response in blind["responses"]:
        response["text"] = "\\boxed{b}"
    expected = dict(zip(keys, reward(blind, variant), strict=True))
    for order in itertools.islice(itertools.permutations(keys), 0, 720, 37):
        assert reward(group_of(order, gold="b"), variant) == [expected[key] for key in order]


@pytest.mark.parametrize("keys", ["ab", "abc.", "aabb", "abcdefg", "aabbccddeeff", "aaabbbccc.."])
@pytest.mark.parametrize("alpha", [1, 2, 5])
def test_dirichlet_earns_exactly_nothing_where_the_vote_is_even(keys, alpha):
    assert reward(group_of(keys), "dirichlet", alpha=alpha) == [0.0] * len(keys)
    assert all(
        0 <= r_i < 1e-14 for r_i in reward(group_of(keys), "dirichlet", alpha=alpha / 10)
    )  # rounding, not below 0


def test_words_before_the_answer_cost_up_to_the_penalty():
    group = group_of("aaaaaaab")
    for response, w in zip(group["responses"], (0, 6, 9, 12, 30, 9, 0, 12), strict=True):
        response["text"] = " \n".join([*["word"] * w, "\\boxed{a} and seven more words after the answer"])
    p, q = (7 / 8) ** 0.7, (1 / 8) ** 0.7
    expected = [p, p, p * 0.95, p * 0.9, p * 0.9, p * 0.95, p, q * 0.9]
    assert reward(group, "continuous-consistency") == pytest.approx(expected, rel=1e-14)
    expected = [p, p, p * 0.5, 0, 0, p * 0.5, p, 0]
    assert reward(group, "continuous-consistency", penalty=1) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    "text, before",
    [
        ("two words \\boxed{7} and after", "two words "),
        ("\\boxed{1} no, \\boxed {\\frac{1}{2}}", "\\boxed{1} no, "),
        ("a \\boxed{5} then \\boxed{6", "a "),  # cut off: the last balanced one counts
        ("a \\boxed{b \\boxed{5}} c", "a \\boxed{b "),  # of nested ones the innermost
        ("so <answer>1</answer> or <ANSWER>2</ANSWER> <answer>3", "so <answer>1</answer> or "),
        ("<answer>8</answer> b \\boxed{9} <answer>10</answer>", "<answer>8</answer> b "),
        ("t <answer>8 \\boxed{9</answer>", "t "),
        ("x < y <answer>{</answer>", "x < y "),
        ("no answer at all", "no answer at all"),
        ("\\boxed{1} empty \\boxed{ }", "\\boxed{1} empty \\boxed{ }"),  # the last one counts, and it is empty
        ("\\boxed{7}", ""),
        ("", ""),
        (None, ""),
        (7, ""),
    ],
)
def test_the_text_before_the_answer(text, before):
    assert before_answer(text) == before


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 130_000, "{" * 1_000_000, "a " * 500_000 + "\\boxed{7}", "\\boxed{" * 65_000 + "}" * 65_000,
     "<answer>" * 130_000 + "</answer>", "\\boxed{}" * 120_000, "<" * 1_000_000 + "<answer>1</answer>",
     "\\" * 1_000_000 + "boxed{1}", "\\boxed" * 100_000 + "{1}", "\ud800\0 " * 300_000 + "\\boxed{\ud800}"],
    ids=range(10),
)  # fmt: skip
def test_the_text_before_the_answer_of_hostile_text(text):
    start = time.process_time()
    before = before_answer(text)
    assert time.process_time() - start < 2
    assert text.startswith(before)
    if answer := extract_answer(text):
        assert extract_answer(text[len(before) :]) == answer
        assert text[len(before) :].startswith(("\\boxed", "<answer>"))


def test_the_format_that_a_prompt_asks_for():
    whole, boxed, tagged = "<think>hm</think>\\boxed{7}", "so \\boxed{7}", "<answer>7</answer>"
    assert [keeps_format(text, "think-boxed") for text in (whole, boxed, tagged, "7", None)] == [True] + [False] * 4
    for prompt in ("boxed", "plain", ""):
        assert [keeps_format(text, prompt) for text in (whole, boxed, tagged)] == [True] * 3
        assert [keeps_format(text, prompt) for text in ("7", "\\boxed{}", "<think>a</think>", None)] == [False] * 4
    assert keeps_format("<think>a</think>\\boxed{}", "think-boxed")  # well-formed, though nothing is in the box


def test_the_sampling_pass_says_how_certain_a_response_was():
    group = group_of("aab.")
    for i, response in enumerate(group["responses"]):
        response |= {"self_certainty": 3.0 + i, "entropy": 0.5 * i}
    assert reward(group, "self-certainty") == [3, 4, 5, 6]
    assert reward(group, "negative-entropy") == [0, -0.5, -1, -1.5]


def test_frequency_to_the_power_of_one_is_the_share_to_the_bit():
    plain, one = bind_reward("frequency"), bind_reward("frequency(gamma=1)")
    for size in range(1, 33):
        for n in range(size + 1):
            group = group_of("a" * n + "." * (size - n))
            assert plain(group) == one(group) == [n / size] * n + [0.0] * (size - n)
    group = group_of("aaabbc.")
    for gamma in (0.3, 3):  # of the two settings that do this, the same numbers
        assert reward(group, "frequency", gamma=gamma) == reward(
            group, "continuous-consistency", power=gamma, penalty=0
        )
    for wrong in (0, -1, "2"):
        with pytest.raises(ValueError, match="gamma is .*, expected a number above 0"):
            reward(group, "frequency", gamma=wrong)


def test_scrl_punishes_what_is_rare_and_no_surer_than_the_group():
    group = group_of("aaaaaabcde")  # p(a) = .6; the others have .1 each, below .125
    entropies = [0.2] * 6 + [0.1, 0.2, 0.3, 0.2]
    for response, h in zip(group["responses"], entropies, strict=True):
        response["entropy"] = h
    # The group's mean is (1.2 + .8) / 10 = .2: b is surer, c and e are exactly as sure, d is less sure.
    assert reward(group, "scrl") == [1] * 6 + [0, -1, -1, -1]
    for response in group["responses"][:6]:
        response["entropy"] = 0.5  # now the mean is .38, and all of the rare ones are surer
    assert reward(group, "scrl") == [1] * 6 + [0] * 4
    group = group_of("bbcdaaaaaa")
    for response, h in zip(group["responses"], [0.1, 0.5, 0.2, 0.2] + [0.25] * 6, strict=True):
        response["entropy"] = h
    # b has the mean of its responses, .3, the group (1 + 1.5) / 10 = .25: both are punished, though one is sure
    assert reward(group, "scrl(tau_low=.25)") == [-1, -1, 0, 0] + [1] * 6
    # An abstention counts in the group's mean: with one at 2.25 it is (2.5 + 2.25) / 11 = .43, above b's
    group["responses"].append(group_of(".")["responses"][0] | {"entropy": 2.25})
    assert reward(group, "scrl(tau_low=.25)") == [0, 0, 0, 0] + [1] * 6 + [-1]


def test_the_means_that_scrl_compares_are_exact():
    group = group_of("abc")
    for response, h in zip(group["responses"], (0.1, 0.2, 0.3), strict=True):
        response["entropy"] = h  # mean .2, where (.1 + .2 + .3) / 3 is .20000000000000004
    assert reward(group, "scrl(tau_low=.5)") == [0, -1, -1]


def says(keys, before):
    """A group whose responses say `before` before their answers."""
    group = group_of(keys)
    for response, text in zip(group["responses"], before, strict=True):
        response["text"] = f"{text}\\boxed{{{response['key']}}}" if response["key"] else text
    return group


def test_novelty_by_hand():
    # Sets of letters. ab, abc: 2/3; ab, cd: 0; abc, cd: 1/4. Less the means 1/3, 11/24, 1/8: 16/24, 13/24, 21/24.
    assert novelty(["ab", "abc", "cd"], 1) == pytest.approx([3 / 8, 0, 1], abs=1e-15)
    assert similarity({"abcde", "bcdef"}, {"abcde", "bcdeg"}) == Fraction(1, 3)
    assert similarity(set("ab"), set("ab")) == 1 and similarity(set("ab"), set("cd")) == 0
    assert similarity({""}, {""}) == similarity(set(), set()) == 1
    # Runs of 5: ab stands for itself, abcde and abcdef share one of two.
    assert novelty(["abcde", "abcdef", "ab"]) == pytest.approx([0, 0, 1])
    assert novelty(["ab", "ab", "cd"]) == [0, 0, 1]
    assert novelty([]) == [] and novelty(["x"]) == [0.5]
    assert novelty(["x", "y"]) == novelty(["x", "x"]) == [0.5] * 2
    assert novelty(["", "", ""]) == novelty(["one", "two", "six"]) == [0.5] * 3  # equally near, equally far
    # Each is to the others as 1/11, 1/5 and 1/5, in an order of its own: rounding may not be taken for a difference.
    assert 1 / 11 + 1 / 5 + 1 / 5 != 1 / 5 + 1 / 5 + 1 / 11
    assert novelty(["acdghk", "aefijl", "bcdijm", "befghn"], 1) == [0.5] * 4


def test_evol_by_hand():
    group = says("aabab.cc", ["ab", "abc", "x", "cd", "y", "z", "u", "u"])
    # a is m; b, and c, have two responses each, which are as far from each other
    expected = [0.5 + 3 / 16, 0.5, -0.75, 1, -0.75, -1, -0.75, -0.75]
    assert reward(group, "evol(ngram=1)") == pytest.approx(expected, abs=1e-15)
    expected = [-1 + 3 / 16, -1, -0.5] + [-0.75] * 3  # a tie: no m, and the novelty of each answer's own
    assert reward(says("aaabbb", ["ab", "abc", "cd", "x", "x", "x"]), "evol(ngram=1)") == pytest.approx(expected)
    spelled = says("777", ["so ", "so ", "then "])
    spelled["responses"][1]["text"] = "so \\boxed{14/2}"  # another spelling of the answer is not novel
    assert reward(spelled, "evol") == [0.5, 0.5, 1]


def test_evol_pays_the_same_for_the_same_text_in_any_order():
    draw = random.Random(5)
    for _ in range(40):
        size = draw.randint(1, 9)
        rows = [
            (draw.choice("aab."), " ".join(draw.choices(["one", "two", "red", "blue"], k=draw.randint(0, 4))))
            for _ in range(size)
        ]
        expected = dict(zip(rows, reward(says(*zip(*rows)), "evol"), strict=True))
        for _ in range(3):
            draw.shuffle(rows)
            assert reward(says(*zip(*rows)), "evol") == [expected[row] for row in rows]
        for (key, _), r in expected.items():
            assert r == -1 if key == "." else 0.5 <= r <= 1 or -1 <= r <= -0.5
            assert r >= 0.5 or key != votes.majority_key([k if k != "." else None for k, _ in rows])


def test_novelty_of_long_responses():
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(3000)]
    texts = [" ".join(draw.choices(words, k=1500)) for _ in range(16)] * 4  # about 2048 tokens each, G = 64
    nu = novelty(texts)
    assert (min(nu), max(nu)) == (0, 1) and nu[:16] * 4 == nu


RANGES = {
    "majority": (0, 1), "frequency": (0, 1), "gated-frequency": (0, 1), "confident-majority": (0, 1),
    "dirichlet": (0, 1), "semantic-entropy": (0, 1), "continuous-consistency": (0, 1), "scrl": (-1, 1), "evol": (-1, 1),
    "two-view": (0, 1),
    "judged": (-0.5, 1.2), "judge-only": (0, 1), "self-certainty": (3.1, 3.1), "negative-entropy": (-0.9, 0),
    "supervised": (0, 1), "random": (0, 1),
}  # fmt: skip


@pytest.mark.parametrize("variant", rewards.REWARDS)
def test_no_reward_leaves_its_range(variant):
    draw, (low, high) = random.Random(2), RANGES[variant]
    for _ in range(60):
        keys = draw.choices("aabcd.", k=draw.randint(1, 12))
        group = judged_group(keys, [draw.choice([None, 0.0, 0.4, 0.95, 1.0]) for _ in keys])
        for response in group["responses"]:
            response["entropy"] = draw.choice([0, 0.3, 0.9])
        if variant == "two-view":
            group = viewed("".join(keys), "".join(draw.choices("aabcd.", k=len(keys))))
        r = reward(group, variant)
        assert all(low <= r_i <= high for r_i in r)
        if "." in keys and variant in (*BY_COUNT, "continuous-consistency", "scrl", "evol", "judged"):
            silent = {r_i for r_i, key in zip(r, keys, strict=True) if key == "."}
            assert len(silent) == 1 and silent.pop() <= min(r)  # no answer earns less than none at all


# What is common to a group's rewards cancels in its advantages (docs/rewards.md, What cancels).
EXACT = "group-norm(eps=0)"


@pytest.mark.parametrize("estimator", rewards.ADVANTAGES)
def test_a_term_that_all_rewards_of_a_group_have_cancels(estimator):
    def cancels(r, term):
        return advantage([r_i + term for r_i in r], estimator) == pytest.approx(advantage(r, estimator), abs=1e-12)

    group = says("aaaab.", ["ab", "abc", "cd", "abd", "x", "z"])
    for response in group["responses"]:
        response["entropy"] = len(response["text"]) / 10
        response["self_certainty"] = 12 + len(response["text"])
    assert cancels(reward(group, "scrl"), 1)  # 0, 1 and 2 instead of -1, 0 and 1
    assert cancels(reward(group, "evol(ngram=1)"), 1)  # nothing below 0
    assert cancels(reward(group, "self-certainty"), -math.log(151_936))  # the paper's: KL(uniform || p)
    plain = reward(group, "frequency")
    assert reward(group, "frequency", lam_fmt=0.5) == [r_i - 0.5 for r_i in plain]  # all are ill-formed
    assert cancels(plain, -0.5)


def test_a_factor_that_all_rewards_of_a_group_have_cancels_under_group_norm_alone():
    def factors(r, without, factor):
        assert r == pytest.approx([factor * r_i for r_i in without], abs=1e-15)
        assert advantage(r, EXACT) == pytest.approx(advantage(without, EXACT), rel=1e-9)
        assert advantage(r, "group-norm") == pytest.approx(advantage(without, "group-norm"), rel=1e-3)
        for estimator in ("mean", "rloo", "energy-centred"):
            scaled = [factor * A_i for A_i in advantage(without, estimator)]
            assert advantage(r, estimator) == pytest.approx(scaled, rel=1e-9)
        beta = f"energy(beta={factor!r})"
        assert advantage(r, "energy") == pytest.approx(advantage(without, beta), rel=1e-9)

    # dirichlet: aab. without C
    sigmoids = [sigmoid(1.32)] * 2 + [sigmoid(22 * (math.log(2 / 3) + 0.06)), 0]
    factors(reward(group_of("aab."), "dirichlet"), sigmoids, C_32)
    # frequency: counts for shares
    factors(reward(group_of("aaab."), "frequency"), [3, 3, 3, 1, 0], 1 / 5)
    # judged: a judge that has one score for all
    judged = judged_group("aaab.", [0.95] * 5)
    factors(reward(judged, "judged(lam_fmt=0)"), reward(judged, "frequency"), g(0.95))
    # continuous-consistency: all are long
    long = says("aab.", ["word " * 12, "word " * 40, "word " * 20, "word " * 30])
    factors(reward(long, "continuous-consistency"), reward(long, "continuous-consistency(penalty=0)"), 0.9)


def test_of_two_different_rewards_group_norm_sees_the_order_alone():
    group = group_of("aaaaab")
    expected = advantage(reward(group, "majority"), EXACT)
    for variant in ("frequency", "frequency(gamma=.2)", "frequency(gamma=9)", "gated-frequency", "scrl", "dirichlet"):
        assert advantage(reward(group, variant), EXACT) == pytest.approx(expected, rel=1e-9)
    assert advantage(reward(group, "frequency"), "mean") != pytest.approx(advantage(reward(group, "majority"), "mean"))


def test_g_is_bounded_and_never_falls():
    grid = [i / 20000 for i in range(20001)]
    values = [g(s) for s in grid]
    assert 0.8 < min(values) and max(values) < 1.2
    assert all(a <= b for a, b in itertools.pairwise(values)) and values[0] < 0.8001 and values[-1] > 1.18
    assert g(0.65) == pytest.approx(1 + 0.2 * sigmoid(-15) - 0.2 * sigmoid(-5), rel=1e-15)
    assert g(0.95) == pytest.approx(1.1, abs=1e-5) and g(0.4) == pytest.approx(0.9, abs=1e-5)
    assert g(0.95, 0.4, 0.1) == pytest.approx(1.2, abs=1e-5) and g(0.4, 0.4, 0.1) == pytest.approx(0.95, abs=1e-5)


@pytest.mark.parametrize("tau", [1e-3, 1e-9, 1e-300, 5e-324])
def test_g_is_safe_with_steep_steps(tau):
    values = [g(s, tau_h=tau, tau_l=tau) for s in (0.0, 0.1, 0.39, 0.4, 0.41, 0.94, 0.95, 0.96, 1.0)]
    assert values == pytest.approx([0.8, 0.8, 0.8, 0.9, 1, 1, 1.1, 1.2, 1.2], abs=1e-4)


@pytest.mark.parametrize("s", [0.0, 0.2, 0.35, 0.4, 0.47, 0.65, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("settings", [{}, {"lam_pos": 0.4, "t_h": 0.9, "tau_h": 0.05}, {"lam_neg": 0.1, "tau_l": 0.1}])
def test_the_slope_of_g(s, settings):
    lam_pos, lam_neg, t_h, t_l, tau_h, tau_l = (
        settings.get(name, default)
        for name, default in {
            "lam_pos": 0.2,
            "lam_neg": 0.2,
            "t_h": 0.95,
            "t_l": 0.4,
            "tau_h": 0.02,
            "tau_l": 0.05,
        }.items()
    )
    high, low = sigmoid((s - t_h) / tau_h), sigmoid((t_l - s) / tau_l)
    analytic = lam_pos * high * (1 - high) / tau_h + lam_neg * low * (1 - low) / tau_l
    h = 1e-6
    assert (g(s + h, **settings) - g(s - h, **settings)) / (2 * h) == pytest.approx(analytic, rel=1e-6, abs=1e-9)


HIGH, LOW, NONE = (1 + 0.2 * sigmoid((s - 0.95) / 0.02) - 0.2 * sigmoid((0.4 - s) / 0.05) for s in (1.0, 0.2, 0.0))
JUDGED = [
    # keys, scores, variant, rewards
    ("aab.", [1.0, 0.2, 1.0, 0.5], "judged(lam_fmt=0)", [0.5 * HIGH, 0.5 * LOW, 0.25 * HIGH, 0]),
    ("aab.", [1.0, 0.2, 1.0, 0.5], "judged", [0.5 * HIGH, 0.5 * LOW, 0.25 * HIGH, -0.5]),  # its own lam_fmt
    ("aab.", [None, 0.2, 1.0, None], "judged(lam_fmt=0)", [0.5, 0.5 * LOW, 0.25 * HIGH, 0]),
    ("aab.", [None, 0.2, 1.0, 0.0], "judged(lam_fmt=0,unparsed='zero')", [0.5 * NONE, 0.5 * LOW, 0.25 * HIGH, 0]),
    ("aaab", [1.0, 0.2, None, 1.0], "judged(base='gated-frequency')", [0.75 * HIGH, 0.75 * LOW, 0.75, 0.25 * HIGH]),
    ("aaab", [1.0, 0.2, None, 1.0], "judged(base='gated-frequency',threshold=.7)", [HIGH, LOW, 1, 0]),
    ("aaab", [1.0, 0.2, None, 1.0], "judged(threshold=.7)", [0.75 * HIGH, 0.75 * LOW, 0.75, 0.25 * HIGH]),
    ("aa", [0.95, 0.4], "judged(lam_pos=.4,lam_neg=.1)", [1.2, 0.95]),
    ("aa", [0.9, 0.3], "judged(t_h=.9,t_l=.3)", [1.1, 0.9]),
    ("aa", [0.97, 0.35], "judged(tau_h=1e-4,tau_l=1e-4)", [1.2, 0.8]),
    ("a", [1.0], "judged", [HIGH]),
    ("...", [1.0, 0.0, None], "judged(lam_fmt=0)", [0, 0, 0]),
    ("aab.", [1.0, 0.2, 0.6, 0.4], "judge-only", [1, 0.2, 0.6, 0.4]),
    ("aab.", [1.0, None, 0.5, None], "judge-only", [1, 0.75, 0.5, 0.75]),
    ("aab.", [1.0, None, 0.5, None], "judge-only(unparsed='zero')", [1, 0, 0.5, 0]),
    ("ab", [None, None], "judge-only", [0, 0]),
    ("a", [0.0], "judge-only", [0]),
]


@pytest.mark.parametrize("keys, scores, variant, expected", JUDGED)
def test_judged_rewards_by_hand(keys, scores, variant, expected):
    assert reward(judged_group(keys, scores), variant) == pytest.approx(
        expected, abs=1e-5 if "=." in variant else 1e-15
    )


def test_what_was_not_judged_says_how_to_judge_it():
    group = judged_group("ab", [1.0, 0.5], uid="u/7")
    del group["responses"][1]["judge"]
    for variant in ("judged", "judge-only"):
        with pytest.raises(ValueError, match="u/7: no judge scores.*python judge.py --rollouts DIR --out JUDGED"):
            reward(group, variant)


def test_the_released_recipe_by_hand():
    """clip(gated-frequency g - .5 [not well-formed], 0, 1), an unparsable judgement scoring 0."""
    group = judged_group(
        "aaaaaaaaab", [1.0, 1.0, None, 0.2, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    )  # p(m) = .9: the gate is open
    for i in (1, 2, 9):
        group["responses"][i]["text"] = f"\\boxed{{{group['responses'][i]['key']}}}"
    # 1.18 - .5 before clipping: the other order would give 1 - .5
    expected = [1, HIGH - 0.5, NONE - 0.5, LOW, 1, 1, 1, 1, 1, 0]
    assert reward(group, presets.PRESETS["self-judge-code"]["reward"]) == pytest.approx(expected, abs=1e-15)
    assert HIGH - 0.5 > 0.68


@pytest.mark.parametrize("keys", ["a", "aaaa", "....", "abcd", "aab."])
@pytest.mark.parametrize("variant", rewards.REWARDS)
def test_every_variant_gives_every_group_finite_floats(keys, variant):
    group = judged_group(keys, [None, 0.0, 1.0, 0.5][: len(keys)])
    got = reward(group, variant)
    assert len(got) == len(keys) and all(type(r_i) is float and math.isfinite(r_i) for r_i in got)
    for estimator in rewards.ADVANTAGES:
        assert len(advantage(got, estimator)) == len(keys)
    order = [*range(len(keys))][::-1]
    turned = group | {"responses": [group["responses"][i] for i in order]}
    assert variant == "random" or reward(turned, variant) == [got[i] for i in order]


def viewed(first: str, second: str, **fields) -> dict:
    """A group whose first responses saw the plain picture and whose others saw a view of it."""
    group = group_of(first + second, image="images/a.png", **fields)
    for response in group["responses"][len(first) :]:
        response["view"] = "scaled"
    return group


@pytest.mark.parametrize(
    ("first", "second", "label"),
    [
        ("aaaa", "abbb", "a"),  # 2 · 1 · 1/4 / (5/4) = .4; b in one view only: 0
        ("aaaac", "bbb.c", "c"),  # the majority is in one view only; c: 2 · 1/5 · 1/5 / (2/5) = .2
        ("aaaabb", "abb...", "b"),  # a, with 5 votes: 2 · 4/6 · 1/6 / (5/6) = 4/15; b, with 4: 2/6 twice, hence 5/15
        ("aab.", "abb.", None),  # 2 · 2/4 · 1/4 / (3/4) = 1/3 each
        ("aaabbbb...", "aaaaaabbbb", None),  # 2 · .3 · .6 / .9 = .4, and .4 exactly
        ("a...", "b..a", "a"),
        ("aa", "bb", None),
        ("aa", "..", None),
        ("..", "..", None),
    ],
)
def test_two_views_by_hand(first, second, label):
    group = viewed(first, second)
    assert reward(group, "two-view") == [float(key == label) for key in first + second]
    turned = group | {"responses": group["responses"][::-1]}
    assert reward(turned, "two-view") == reward(group, "two-view")[::-1]


def test_two_views_need_two_or_no_picture():
    assert reward(group_of("aab."), "two-view") == [1, 1, 0, 0]  # without a picture each is like the other: majority
    for group in (group_of("aab.", image="images/a.png"), viewed("", "aab.")):
        with pytest.raises(ValueError, match="shapes/train/000001: its responses saw 1 view .*--view faded"):
            reward(group, "two-view")


def test_supervised_grades_the_text_against_gold(monkeypatch):
    group = group_of(["7", "8", None, "7"])
    assert reward(group, "supervised") == [1, 0, 0, 1]
    asked = []
    monkeypatch.setattr(answers, "is_correct", lambda *arguments: asked.append(arguments) or True)
    reward(group_of(["B"], gold="B", choices=["1", "2"]), "supervised")
    assert asked == [("<think>hm</think>\\boxed{B}", "B", ["1", "2"])]
    with pytest.raises(ValueError, match="shapes/train/000009: no gold"):
        reward(group_of(["7"], gold=None, uid="shapes/train/000009"), "supervised")


def test_random_is_a_fair_coin_keyed_by_seed_step_uid_and_index():
    def coins(seed=0, step=0, uid="u", n=2000):
        return reward(group_of(["a"] * n, step=step, uid=uid), "random", seed=seed)

    base = coins()
    assert set(base) == {0.0, 1.0} and coins() == base
    for n in (1, 7):
        assert coins(n=n) == base[:n]  # the coin of a response does not depend on the size of its group
    for other in (coins(seed=1), coins(step=1), coins(uid="v")):
        agree = sum(a == b for a, b in zip(base, other, strict=True))
        assert abs(agree - 1000) < 4 * math.sqrt(500)  # sd of 2000 fair coins is sqrt(500)
        assert abs(sum(other) - 1000) < 4 * math.sqrt(500)
    assert coins(step=1, uid="1") != coins(step=11, uid="")  # the parts of the key cannot run together


def test_random_is_the_same_in_another_process():
    group = group_of(["a"] * 64, step=3)
    code = "import json, sys, rewards; print(json.dumps(rewards.reward(json.load(sys.stdin), 'random(seed=5)')))"
    environment = os.environ | {"PYTHONHASHSEED": "99"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(group),
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert json.loads(done.stdout) == reward(group, "random", seed=5)


def test_the_format_penalty_is_subtracted_once_from_any_variant():
    group = judged_group("77.", [1.0, 0.5, None])
    group["responses"][1]["text"] = "\\boxed{7}"  # no <think>: not well-formed, like the abstention
    assert reward(group, "majority", lam_fmt=0.5) == [1, 0.5, -0.5]
    for variant in rewards.REWARDS:
        plain, fined = reward(group, variant, lam_fmt=0), reward(group, f"{variant}(lam_fmt=.25)")
        assert [a - b for a, b in zip(plain, fined, strict=True)] == pytest.approx([0, 0.25, 0.25], abs=1e-15)


def test_clipping_comes_after_the_format_penalty():
    group = judged_group("77.", [1.0, 1.0, 0.5])
    group["responses"][1]["text"] = "\\boxed{7}"
    assert reward(group, "majority(lam_fmt=.25,clip=True)") == [1, 0.75, 0]
    assert reward(group, "self-certainty", clip=True) == [1, 1, 1]
    assert reward(group, "self-certainty", clip=True, lam_fmt=2.5) == pytest.approx([1, 0.6, 0.6])
    assert reward(group, "negative-entropy", clip=True) == [0, 0, 0]
    assert reward(group, "negative-entropy", clip=False) == [-0.21] * 3


@pytest.mark.parametrize(
    "keys, variant, skipped",
    [
        ("aab.", "confident-majority(tau=.51)", True),
        ("aabb", "confident-majority", True),  # .5, but a tie
        ("....", "confident-majority(tau=0)", True),
        ("aab.", "confident-majority", False),
        ("aab.", "majority(min_share=.5,max_share=.5)", False),
        ("aab.", "majority(min_share=.51)", True),
        ("aab.", "majority(max_share=.49)", True),
        ("aabb", "frequency(min_share=.5)", False),  # the share is that of the most frequent keys, tied or not
        ("....", "frequency(min_share=.01)", True),
        ("....", "frequency(max_share=0)", False),
        ("aaaa", "random(max_share=.99)", True),
        ("aaab", "self-certainty(max_share=.7,lam_fmt=1)", True),
    ],
)
def test_which_groups_are_skipped(keys, variant, skipped):
    group = group_of(keys)
    assert (bind_reward(variant)(group) is None) is skipped
    [scored] = score([group], variant, "energy", 0)
    assert scored.get("skipped") is (True if skipped else None)
    if skipped:
        assert reward(group, variant) == [0.0] * 4


@pytest.mark.parametrize("estimator", rewards.ADVANTAGES)
def test_a_skipped_group_has_no_advantage_under_any_estimator(estimator):
    groups = [group_of("aab."), group_of("abcd", uid="v"), group_of("aaaa", uid="w")]
    scored = score(groups, "majority(lam_fmt=.5)", estimator, 0, min_share=0.5, max_share=0.75)
    assert ["skipped" in group for group in scored] == [False, True, True]
    for group in scored[1:]:
        assert [(r["reward"], r["advantage"]) for r in group["responses"]] == [(0.0, 0.0)] * 4
        shards.validate(group, "scored")
    assert [r["reward"] for r in scored[0]["responses"]] == [1, 1, 0, -0.5]
    assert [r["advantage"] for r in scored[0]["responses"]] == advantage([1, 1, 0, -0.5], estimator)
    again = score(scored, "majority(lam_fmt=.5)", estimator, 0)
    assert again == score(groups, "majority(lam_fmt=.5)", estimator, 0) and "skipped" not in again[1]
    assert "skipped" in scored[1]  # scoring makes copies


def test_a_variant_that_returns_none_skips(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda group: None if group["uid"] == "v" else [2.0, 0.0])
    scored = score([group_of("ab"), group_of("ab", uid="v")], "mine(lam_fmt=1,clip=True)", "energy", 0)
    assert [[r["reward"] for r in group["responses"]] for group in scored] == [[1, 0], [0, 0]]
    assert [group.get("skipped") for group in scored] == [None, True]


CLOSED = [
    # mean .5, deviations +-.5, sample variance 4 * .25 / 3 = 1/3
    ("group-norm", [1, 0, 0, 1], [s * 0.5 / (math.sqrt(1 / 3) + 1e-6) for s in (1, -1, -1, 1)]),
    ("group-norm(eps=.5)", [1, 0, 0, 1], [s * 0.5 / (math.sqrt(1 / 3) + 0.5) for s in (1, -1, -1, 1)]),
    ("mean", [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
    ("rloo", [1, 0, 0, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),  # 1 - (0 + 0 + 1) / 3
    ("rloo", [3, 0], [3, -3]),
    ("energy", [1, 0, 0, 1], [x - math.log(2 * math.e + 2) for x in (1, 0, 0, 1)]),
    ("energy(beta=2)", [1, 0, 0, 1], [x - math.log(2 * math.exp(2) + 2) for x in (2, 0, 0, 2)]),
    ("energy-centred", [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
    ("energy-centred(beta=3)", [1, 0, 0, 1], [1.5, -1.5, -1.5, 1.5]),
    ("energy", [0.1] * 5, [-math.log(5)] * 5),  # no signal, and yet not 0, as printed
    ("energy", [1000, 0], [0, -1000]),  # exp(1000) overflows, its log-sum-exp does not
    ("energy", [-1000, -1000], [-math.log(2)] * 2),
]


@pytest.mark.parametrize("estimator, r, expected", CLOSED)
def test_advantages_in_closed_form(estimator, r, expected):
    assert advantage(r, estimator) == pytest.approx(expected, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("estimator", rewards.ADVANTAGES)
def test_a_group_of_one_has_no_advantage(estimator):
    assert advantage([0.7], estimator) == [0.0]
    assert advantage([], estimator) == []


@pytest.mark.parametrize("estimator", ["group-norm", "mean", "rloo", "energy-centred"])
def test_equal_rewards_give_exactly_zero(estimator):
    for value, n in itertools.product((0.1, 1 / 3, 0.7, 1e-9), range(2, 17)):
        assert advantage([value] * n, estimator) == [0.0] * n


@pytest.mark.parametrize("estimator", rewards.ADVANTAGES)
def test_the_order_of_the_responses_changes_no_bit(estimator):
    draw = random.Random(1)
    r = [draw.random() for _ in range(10)]
    expected = dict(zip(r, advantage(r, estimator), strict=True))
    for _ in range(20):
        draw.shuffle(r)
        assert advantage(r, estimator) == [expected[r_i] for r_i in r]


def test_energy_is_a_log_probability_and_centring_takes_it_to_energy_centred():
    r = [0.9, 0.1, 0.4, 0.4]
    printed = advantage(r, "energy", beta=2)
    assert max(printed) < 0 and math.fsum(map(math.exp, printed)) == pytest.approx(1, rel=1e-14)
    mu = math.fsum(printed) / 4
    assert [a - mu for a in printed] == pytest.approx(advantage(r, "energy-centred", beta=2), rel=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", rewards.ADVANTAGES)
def test_rewards_that_are_not_finite_are_refused(estimator, bad):
    with pytest.raises(ValueError, match="finite"):
        advantage([0.0, bad], estimator)


def test_a_new_variant_works_by_name_everywhere(tmp_path, monkeypatch):
    def shortness(group, *, scale: float = 1.0):
        return [scale / len(response["token_ids"]) for response in group["responses"]]

    monkeypatch.setitem(rewards.REWARDS, "shortness", shortness)
    monkeypatch.setitem(rewards.ADVANTAGES, "raw", lambda r: r)

    group = group_of(["7", None])
    assert reward(group, "shortness") == reward(group, "shortness", scale=1) == [1 / 3, 1 / 3]
    assert reward(group, "shortness(scale=3, lam_fmt=.5)") == [1, 0.5]
    [scored] = score([group], "shortness(scale=6)", "raw", seed=0)
    assert [response["advantage"] for response in scored["responses"]] == [2, 2]
    write_rollouts(tmp_path / "in", steps=1)
    main(Config(rollouts=tmp_path / "in", out=tmp_path / "out", reward="shortness(scale=3)", advantage="raw"))
    assert {r["advantage"] for g in shards.ShardReader(tmp_path / "out") for r in g["responses"]} == {1.0}


def test_a_variant_that_answers_wrongly_is_caught(monkeypatch):
    for wrong in ([1.0], [1.0, math.nan], [1.0, 2.0, 3.0]):
        monkeypatch.setitem(rewards.REWARDS, "mine", lambda group, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="reward 'mine' of shapes/train/000001: .*expected 2 finite"):
            reward(group_of("ab"), "mine")


def test_score_adds_two_fields_and_touches_nothing_else():
    groups = [group_of(["a", "a", "b", None]), group_of(["c"], uid="v", extra=[1])]
    groups[0]["responses"][0]["judge"] = {"score": 0.5, "parsed": True}
    before = copy.deepcopy(groups)
    scored = score(iter(groups), "majority", "mean", 0)
    assert groups == before
    assert [[r["reward"] for r in g["responses"]] for g in scored] == [[1, 1, 0, 0], [1]]
    assert [[r["advantage"] for r in g["responses"]] for g in scored] == [[0.5, 0.5, -0.5, -0.5], [0]]
    for group in scored:
        shards.validate(group, "scored")
        for response in group["responses"]:
            del response["reward"], response["advantage"]
    assert scored == before


def test_the_seed_of_the_run_reaches_variants_that_draw_unless_one_is_given():
    groups = [group_of(["a"] * 32)]

    def coins(variant, seed):
        return [r["reward"] for r in score(groups, variant, "mean", seed)[0]["responses"]]

    assert coins("random", 3) == reward(groups[0], "random", seed=3) != coins("random", 4)
    assert coins("random(seed=3)", 4) == coins("random", 3)
    assert coins("majority", 3) == coins("majority", 4)


def test_summary_by_hand():
    groups = [group_of(["a", "a", "b", None]), group_of(["a", "b", "c", "d"]), group_of(["a", "a", "a", "a"])]
    totals = summary(iter(score(groups, "majority", "group-norm", 0)))
    assert totals == pytest.approx({
        "groups": 3, "skipped": 0, "responses": 12, "signal": 1 / 3, "majority_share": (0.5 + 0.25 + 1) / 3,
        "distinct": (2 + 4 + 1) / 3, "abstention_share": 1 / 12, "reward_mean": 0.5, "reward_std": 0.5,
    })  # fmt: skip
    assert totals == summary(score([group | {"gold": None} for group in groups], "majority", "group-norm", 0))
    with pytest.raises(ValueError, match="no groups"):
        summary([])


def test_summary_leaves_the_rewards_of_skipped_groups_out():
    groups = [group_of("aab."), group_of("abcd"), group_of("aaaa")]
    totals = summary(score(groups, "majority", "energy", 0, min_share=0.5))
    assert totals == pytest.approx({
        "groups": 3, "skipped": 1, "responses": 12, "signal": 1 / 3, "majority_share": (0.5 + 0.25 + 1) / 3,
        "distinct": (2 + 4 + 1) / 3, "abstention_share": 1 / 12, "reward_mean": 6 / 8, "reward_std": math.sqrt(3 / 16),
    })  # fmt: skip
    totals = summary(score(groups[:2], "majority", "energy", 0, min_share=0.9))
    assert (totals["skipped"], totals["signal"], totals["reward_mean"], totals["reward_std"]) == (2, 0, 0.0, 0.0)
    assert totals["majority_share"] == 0.375 and totals["abstention_share"] == 1 / 8


def test_scoring_ten_thousand_groups_takes_seconds():
    draw = random.Random(0)
    groups = [group_of([draw.choice("abcd") for _ in range(8)], uid=f"u/{i}") for i in range(10_000)]
    start = time.process_time()
    score(groups, "gated-frequency", "group-norm", 0)
    assert time.process_time() - start < 5


def write_rollouts(folder, steps=2, seed=11, per_shard=4, group_size=8):
    draw = random.Random(0)
    for step in range(steps):
        groups = []
        for i in range(per_shard):
            name = shards.save_image(folder, Image.new("RGB", (4, 4), (step, i, 0)))
            keys = [draw.choice(["1", "2", None]) for _ in range(8)]
            groups.append(group_of(keys, step=step, uid=f"u/{step}/{i}", image=name))
        shards.write_shard(shards.shard_path(folder, step), groups)
    if seed is not None:
        config = {"group_size": group_size, "steps": steps, "out": folder}
        manifests.write(folder, stage="rollout", config=config, seed=seed, model="org/model")


def stage(tmp_path, **settings):
    return main(Config(rollouts=tmp_path / "rollouts", out=tmp_path / "scored", **settings))


def test_the_command_scores_a_folder(tmp_path):
    source, out = tmp_path / "rollouts", tmp_path / "scored"
    write_rollouts(source)
    command = [sys.executable, rewards.__file__, "--rollouts", source, "--out", out, "--reward", "random"]
    done = subprocess.run([*command, "--advantage", "energy(beta=2)"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = dict(line.split() for line in done.stdout.splitlines()[1:])
    assert table["groups"] == "8" and table["responses"] == "64"

    rollouts, scored = list(shards.ShardReader(source)), list(shards.ShardReader(out))
    assert [path.name for path in shards.list_shards(out)] == ["step-000000.jsonl", "step-000001.jsonl"]
    assert scored == score(rollouts, "random", "energy(beta=2)", seed=11)  # the seed of the rollouts' manifest
    assert float(table["reward_mean"]) == pytest.approx(summary(scored)["reward_mean"], abs=1e-4)
    assert (out / "images").is_symlink()
    assert shards.open_image(out, scored[5]["image"]).getpixel((0, 0)) == (1, 1, 0)
    manifest = manifests.read(out)
    assert manifest["stage"] == "rewards" and manifest["seed"] == 11 and manifest["config"]["reward"] == "random"
    assert manifest["model"] == {"name": "org/model", "fingerprint": "hub:org/model"} and manifest["adapter"] is None


def test_the_seed_given_goes_before_the_manifest_and_without_any_it_is_said(tmp_path, capsys):
    write_rollouts(tmp_path / "rollouts", seed=None)
    stage(tmp_path, reward="random")
    assert "no seed" in capsys.readouterr().err
    groups = list(shards.ShardReader(tmp_path / "rollouts"))
    assert list(shards.ShardReader(tmp_path / "scored")) == score(groups, "random", "group-norm", seed=0)
    main(Config(rollouts=tmp_path / "rollouts", out=tmp_path / "b", reward="random", seed=5))
    assert list(shards.ShardReader(tmp_path / "b")) == score(groups, "random", "group-norm", seed=5)


def test_resuming_keeps_whole_shards_and_regenerates_the_rest(tmp_path, monkeypatch):
    write_rollouts(tmp_path / "rollouts", steps=4)
    first = stage(tmp_path)
    whole = {path: path.read_bytes() for path in shards.list_shards(tmp_path / "scored")}
    paths = list(whole)
    paths[1].unlink()
    paths[2].write_bytes(whole[paths[2]][:-9])
    os.utime(tmp_path / "rollouts" / paths[3].name, ns=(2**62, 2**62))  # regenerated after it was scored
    written, write = [], shards.write_shard
    monkeypatch.setattr(shards, "write_shard", lambda path, groups: (written.append(path), write(path, groups)))
    assert stage(tmp_path) == first
    assert written == paths[1:]
    assert {path: path.read_bytes() for path in paths} == whole


def test_the_command_skips_groups_by_their_majority_share(tmp_path):
    write_rollouts(tmp_path / "rollouts")
    groups = list(shards.ShardReader(tmp_path / "rollouts"))
    totals = stage(tmp_path, reward="frequency(min_share=.4)", max_share=0.6)
    scored = list(shards.ShardReader(tmp_path / "scored"))
    assert scored == score(groups, "frequency", "group-norm", 11, min_share=0.4, max_share=0.6)
    assert 0 < totals["skipped"] == sum("skipped" in group for group in scored) < 8
    with pytest.raises(shards.ShardError, match="max_share: 0.6 there, 0.7 now"):
        stage(tmp_path, reward="frequency(min_share=.4)", max_share=0.7)
    with pytest.raises(ValueError, match="min_share given inline and as an argument"):
        stage(tmp_path, reward="frequency(min_share=.4)", min_share=0.3)


def test_the_command_takes_a_function_from_a_file(tmp_path):
    write_rollouts(tmp_path / "rollouts")
    (tmp_path / "mine.py").write_text("def f(group, *, x=1.0):\n    return [x] * len(group['responses'])\n")
    spec = f"{tmp_path}/mine.py:f(x=2)"
    totals = stage(tmp_path, reward=spec)
    assert totals["reward_mean"] == 2 and stage(tmp_path, reward=spec) == totals
    (tmp_path / "mine.py").write_text("def f(group, *, x=1.0):\n    return [-x] * len(group['responses'])\n")
    with pytest.raises(shards.ShardError, match="reward_file: the file has changed"):
        stage(tmp_path, reward=spec)


def test_a_folder_takes_one_config(tmp_path):
    write_rollouts(tmp_path / "rollouts")
    stage(tmp_path)
    with pytest.raises(shards.ShardError, match="reward: 'majority' there, 'frequency' now"):
        stage(tmp_path, reward="frequency")
    with pytest.raises(shards.ShardError, match="seed: 11 there, 12 now"):
        stage(tmp_path, seed=12)
    for other in ({"seed": 12}, {"group_size": 10}):  # other rollouts under the same path
        write_rollouts(tmp_path / "rollouts", **other)
        with pytest.raises(shards.ShardError, match="rollouts_manifest"):
            stage(tmp_path, seed=11)
    (tmp_path / "rollouts").rename(tmp_path / "moved")
    write_rollouts(tmp_path / "moved", steps=3)
    totals = main(Config(rollouts=tmp_path / "moved", out=tmp_path / "scored"))  # the same elsewhere, and a step more
    assert totals["groups"] == 12
    assert (tmp_path / "scored" / "images").resolve() == tmp_path / "moved" / "images"  # the link had come to dangle


def test_what_cannot_work_fails_before_anything_is_written(tmp_path):
    write_rollouts(tmp_path / "rollouts")
    with pytest.raises(ValueError, match="--out is --rollouts"):
        main(Config(rollouts=tmp_path / "rollouts", out=tmp_path / "x" / ".." / "rollouts"))
    for settings in ({"reward": "majorty"}, {"advantage": "energy(b=1)"}):
        with pytest.raises(ValueError):
            stage(tmp_path, **settings)
    with pytest.raises(shards.ShardError, match="no shards"):
        main(Config(rollouts=tmp_path / "nowhere", out=tmp_path / "scored"))
    assert not (tmp_path / "scored").exists()


def test_importing_needs_no_torch():
    code = "import sys, rewards; from upt.groups import shards\n"
    code += "assert 'torch' not in sys.modules and 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_reward_sees_gold_only_where_it_says_so(monkeypatch):
    def cheat(group):
        return [float(response["key"] == group["gold"]) for response in group["responses"]]

    monkeypatch.setitem(rewards.REWARDS, "cheat", cheat)
    group = {"uid": "g", "gold": "2", "choices": None, "responses": [{"key": key, "text": ""} for key in "23"]}
    with pytest.raises(ValueError, match=r"reads group\['gold'\].*cheat.needs_gold = True"):
        rewards.reward(group, "cheat")
    cheat.needs_gold = True
    assert rewards.reward(group, "cheat") == [1.0, 0.0]


def test_a_function_is_known_by_what_it_does():
    def power(n):
        return lambda group, scale=n: [scale * p**2 for p in group]

    first, same = power(2), power(2)
    assert variants.code_digest(first) == variants.code_digest(same) != variants.code_digest(power(3))
    assert variants.code_digest(first) != variants.code_digest(lambda group, scale=2: [scale * p**3 for p in group])
