"""Variants by name: what a spec may say, and what is said of one that cannot work."""

import math
import os
import re
import sys

import pytest

import rewards
from rewards import advantage, bind_advantage, bind_reward, reward
from tests.test_shards import make_group
from upt.groups import variants
from upt.groups.variants import parse_variant, split_variants


def group_of(keys, **fields):
    return make_group(keys=tuple(keys), **fields)


def test_inline_settings():
    assert parse_variant("majority") == ("majority", {}) and parse_variant(" majority ( ) ") == ("majority", {})
    parsed = parse_variant("gated-frequency(threshold=.9, lam_fmt=-5e-1,)")
    assert parsed == ("gated-frequency", {"threshold": 0.9, "lam_fmt": -0.5})
    assert parse_variant("x(a='),(', b=[1, None], c=True)") == ("x", {"a": "),(", "b": [1, None], "c": True})


@pytest.mark.parametrize(
    "spec, name, settings",
    [
        ("my_rewards.py:mine", "my_rewards.py:mine", {}),
        (" a/b c/my_rewards.py:mine (x=.1) ", "a/b c/my_rewards.py:mine", {"x": 0.1}),
        ("../../r.v2.py:_f2(a='b.py:c', d=False)", "../../r.v2.py:_f2", {"a": "b.py:c", "d": False}),
        ("/abs/r.py:f", "/abs/r.py:f", {}),
        ("x(a='b.py:c')", "x", {"a": "b.py:c"}),
    ],
)
def test_a_file_and_its_settings(spec, name, settings):
    assert parse_variant(spec) == (name, settings)


@pytest.mark.parametrize(
    "spec",
    ["", "(a=1)", "x(1)", "x(a)", "x(a=)", "x(a=b)", "x(a=1", "x a=1", "x(a=1)(b=2)", "x(a=1, a=2)", "x(**{})",
     "x(a=__import__('os'))", "x(a=1) + y(b=2)", "x(a=1).y(b=2)", "x(a={[]: 1})", "r.py", "r.py:", "r:f", ".py:f",
     "r.py:f(1)", "r.py:f.g", "r.py:f(a=f)"],
)  # fmt: skip
def test_what_is_no_variant_is_a_clear_error(spec):
    with pytest.raises(ValueError, match="setting|literal|number"):
        parse_variant(spec)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("majority,judged(lam_pos=.4,t_h=.9) frequency", ["majority", "judged(lam_pos=.4,t_h=.9)", "frequency"]),
        ("majority", ["majority"]),
        (" a,\n b ,, c\t,", ["a", "b", "c"]),
        ("", []),
        (" , ", []),
        ("a(x=(1, 2), y=[3, 4]),b", ["a(x=(1, 2), y=[3, 4])", "b"]),
        ("a(x='), (', y=\"it's\") b(z='\\', (')", ["a(x='), (', y=\"it's\")", "b(z='\\', (')"]),
        ("dir/r.py:f(x=.1) r.py:g,h", ["dir/r.py:f(x=.1)", "r.py:g", "h"]),
    ],
)
def test_a_list_of_variants(text, parts):
    assert split_variants(text) == parts


@pytest.mark.parametrize(
    "text, message",
    [
        ("a(x=1, b", r"'a\(x=1, b': a \( is not closed"),
        ("a(x=(1), b", r"a \( is not closed"),
        ("a, b)", r"a \) has no \( before it"),
        (")a(", r"a \) has no \( before it"),
        ("a(x='1), b", "a quote ' is not closed"),
        ("a(x=\"it's), b", 'a quote " is not closed'),
    ],
)
def test_a_list_that_is_not_balanced(text, message):
    with pytest.raises(ValueError, match=message):
        split_variants(text)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reward(group_of("a"), "majorty"), "'majorty'.*majority, frequency, gated-frequency.*FILE.py:NAME"),
        (
            lambda: reward(group_of("a"), "majority(tie='first')"),
            "'tie'; did you mean 'ties'.; it has: lam_fmt, clip, min_.*ties",
        ),
        (
            lambda: reward(group_of("a"), "majority", seed=1),
            "'seed'; it has: lam_fmt, clip, min_share, max_share, ties",
        ),
        (lambda: reward(group_of("a"), "majority(lam_fmt=1)", lam_fmt=2), "lam_fmt given inline and"),
        (lambda: advantage([1, 2], "grpo"), "'grpo'.*group-norm, mean, rloo, energy, energy-centred"),
        (lambda: advantage([1, 2], "mean(beta=1)"), "'beta'; it has: none"),
        (lambda: bind_advantage("mean(min_share=.5)"), "'min_share'; it has: none"),
    ],
)
def test_unknown_names_and_settings_list_what_there_is(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "variant, message",
    [
        ("majority(ties='last')", "ties is 'last', expected 'none' or 'first'"),
        ("majority(ties=1)", "ties is 1, expected 'none' or 'first'"),
        ("majority(lam_fmt='big')", "lam_fmt is 'big', expected a number at least 0"),
        ("majority(lam_fmt=True)", "lam_fmt is True"),
        ("majority(clip=1)", "clip is 1, expected True or False"),
        ("gated-frequency(threshold=1e999)", "threshold is inf"),
        ("judged(base='foo')", "base is 'foo', expected 'frequency' or 'gated-frequency'"),
        ("judged(unparsed=None)", "unparsed is None, expected 'neutral' or 'zero'"),
        ("judge-only(unparsed='mean')", "unparsed is 'mean', expected 'neutral' or 'zero'"),
        ("judged(tau_h=0)", "tau_h is 0, expected a number above 0"),
        ("judged(tau_l='x')", "tau_l is 'x', expected a number above 0"),
        ("continuous-consistency(words=0)", "words is 0, expected a number above 0"),
        ("continuous-consistency(words=-1)", "words is -1"),
        ("dirichlet(alpha=0)", "alpha is 0, expected a number above 0"),
        ("majority(min_share=-.1)", "min_share is -0.1, expected a number from 0 to 1"),
        ("majority(max_share=1.1)", "max_share is 1.1, expected a number from 0 to 1"),
        ("majority(min_share=.6,max_share=.5)", "min_share is 0.6 and max_share 0.5"),
    ],
)
def test_a_setting_that_cannot_be_is_met_before_any_group(variant, message):
    with pytest.raises(ValueError, match=message):
        bind_reward(variant)


def test_a_setting_of_an_estimator_is_checked_too():
    with pytest.raises(ValueError, match="beta is True"):
        bind_advantage("energy(beta=True)")


MINE = """
from dataclasses import dataclass
from typing import Literal

@dataclass
class Weight:
    w: "float" = 2.0

def mine(group, *, x: float = 1.0, side: Literal["up", "down"] = "up", lam_fmt: float = 0.25):
    sign = 1 if side == "up" else -1
    return [sign * x * Weight().w * i for i in range(len(group["responses"]))]

def _hidden(group):
    return [0.0] * len(group["responses"])

def needs(group, *, scale):
    return [scale] * len(group["responses"])

def nothing():
    return []

def scalar(group):
    return 1.0

def anything(group, **settings):
    return [1.0] * len(group["responses"])

def halves(rewards, *, by: float = 2.0):
    return [r / by for r in rewards]

mine.needs_judge = True
needs.needs_gold = True
number = 7
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_a_function_of_a_file_is_a_variant(mine):
    group = group_of(["7", "8", None])  # the abstention is not well-formed: the file's own lam_fmt is taken off
    assert reward(group, "mine.py:mine") == reward(group, f"{mine}:mine", x=1) == [0, 2, 3.75]
    assert reward(group, "./mine.py:mine(x=.5,side='down',lam_fmt=0)") == [0, -1, -2]
    assert reward(group, "mine.py:mine(x=-1,clip=True)") == [0, 0, 0]
    assert reward(group, "mine.py:mine(min_share=.5)") == [0, 0, 0]  # p = 1/3
    assert reward(group, "mine.py:_hidden") == [0, 0, 0] and reward(group, "mine.py:needs(scale=3)") == [3, 3, 3]
    assert reward(group, "mine.py:anything") == [1, 1, 1]
    assert advantage([1, 3], "mine.py:halves(by=4)") == [0.25, 0.75] and advantage([1], "mine.py:halves") == [0]
    [scored] = rewards.score([group], "mine.py:mine(lam_fmt=0)", "mine.py:halves", 0)
    assert [response["advantage"] for response in scored["responses"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nowhere.py:f", "nowhere.py: no such file; write the path from /"),
        ("mine.py:other", r"mine.py has no function 'other'; it has: mine, needs, nothing, scalar, anything, halves$"),
        ("mine.py:number", "mine.py: number is 7, expected a function"),
        ("mine.py:mine(y=1)", "has no setting 'y'; it has: lam_fmt, clip, min_share, max_share, x, side$"),
        ("mine.py:mine(side='left')", "side is 'left', expected 'up' or 'down'"),
        ("mine.py:needs", "needs the setting 'scale', which has no default"),
        ("mine.py:anything(y=1)", "has no setting 'y'"),
        ("mine.py:nothing", "takes no argument, expected the group"),
        ("raises.py:f", r"raises.py fails to import: ZeroDivisionError: division by zero"),
        ("syntax.py:f", r"syntax.py fails to import: SyntaxError: .*line 2"),
        ("exits.py:f", "exits.py fails to import: SystemExit: 3"),
        ("empty.py:f", "empty.py has no function 'f'; it has: none"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_at_start_up(mine, spec, message):
    contents = {"raises": "def f(group): ...\n1 / 0", "syntax": "x = 1\ndef f(:", "exits": "raise SystemExit(3)",
                "empty": "from math import sin"}  # fmt: skip
    for name, text in contents.items():
        mine.with_name(f"{name}.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        bind_reward(spec)


def test_a_module_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "raises.py").write_text("1 / 0")
    before = {*sys.modules}
    for _ in range(2):
        with pytest.raises(ValueError, match="ZeroDivisionError"):
            bind_reward(f"{tmp_path}/raises.py:f")
    assert {*sys.modules} == before


def test_what_a_function_returns_is_checked(mine):
    with pytest.raises(ValueError, match="reward 'mine.py:scalar' of shapes/train/000001: 1.0, expected 1 finite"):
        reward(group_of("a"), "mine.py:scalar")


def test_a_file_is_executed_once_until_it_is_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path, log = tmp_path / "counted.py", tmp_path / "log"
    text = f"open({str(log)!r}, 'a').write('x')\nf = lambda group: [1.0]\nh = f\n"
    path.write_text(text)
    for spec in (f"{path}:f", f"{path}:h", f"{tmp_path}/../{tmp_path.name}/counted.py:f(lam_fmt=1)"):
        reward(group_of("a"), spec)
    assert log.read_text() == "x"
    stat = path.stat()
    path.write_text(text.replace("1.0", "2.0"))  # the same size, and by the clock of bytecode the same second
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns // 10**9 * 10**9 + (stat.st_mtime_ns + 10**9 // 2) % 10**9))
    assert reward(group_of("a"), f"{path}:f") == [2.0] and log.read_text() == "xx"
    assert sorted(os.listdir(tmp_path)) == ["counted.py", "log"]  # no bytecode beside it


def test_what_a_variant_needs(mine):
    judges = {name for name in rewards.REWARDS if rewards.needs_judge(name)}
    golds = {name for name in rewards.REWARDS if rewards.needs_gold(name)}
    views = {name for name in rewards.REWARDS if rewards.needs_view(name)}
    assert (judges, golds, views) == ({"judged", "judge-only"}, {"supervised"}, {"two-view"})
    assert rewards.needs_judge("judged(lam_fmt=.5)") and rewards.needs_judge("mine.py:mine(x=2)")
    assert not rewards.needs_judge("mine.py:needs(scale=1)") and rewards.needs_gold("mine.py:needs(scale=1)")
    with pytest.raises(ValueError, match="'judge'"):
        rewards.needs_judge("judge")


def test_the_digest_of_a_variants_file(mine):
    first = variants.source_digest("mine.py:mine(x=2)")
    assert re.fullmatch("[0-9a-f]{64}", first) and variants.source_digest(f"{mine}:needs") == first
    mine.write_text(MINE + "\n")
    assert variants.source_digest("mine.py:mine") != first
    assert variants.source_digest("judged(lam_fmt=.5)") is None


def test_finite_floats():
    assert variants.finite([1, True], 2, "x") == [1.0, 1.0]
    for wrong in ([1.0], [1.0, math.inf], [1.0, "a"], [1.0, None], 2.0, [1.0, [2.0]]):
        with pytest.raises(ValueError, match="x: .*expected 2 finite numbers"):
            variants.finite(wrong, 2, "x")
