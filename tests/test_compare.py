"""Comparing two models' scored responses: each figure by hand, the interval against the normal one, each error."""

import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from eval import compare
from eval.compare import bootstrap, maj_at, pass_at, sign_test

ROOT = Path(__file__).parents[1]


def line(uid, correct, sample=0, key="x", **categories) -> dict:
    return {"id": str(uid), "sample": sample, "key": "b", "correct": bool(correct), "method": "box", "vote_key": key,
            "categories": {name: list(values) for name, values in categories.items()}}  # fmt: skip


def write(path: Path, rows, **summary) -> Path:
    """A score file, and its summary if any field of that is given. A row that is text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    if summary:
        path.with_suffix(".summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def pair(tmp_path):
    """Files of ten questions with one response each. A has 1 to 4 right and B 2 to 10: six gained, one lost."""
    a = [line(i, i <= 4, subject=["even" if i % 2 == 0 else "odd"]) for i in range(1, 11)]
    b = [row | {"correct": row["id"] != "1"} for row in a]
    return write(tmp_path / "a/scores.jsonl", a), write(tmp_path / "b/scores.jsonl", b)


# ------------------------------------------------------------------------------------------------------ the figures


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1), (1, 0, 1), (3, 3, 1), (1, 6, 0.125), (6, 1, 0.125), (0, 6, 0.03125), (7, 1, 18 / 256)],
)
def test_the_sign_test_by_hand(gained, lost, p):
    assert sign_test(gained, lost) == pytest.approx(p, rel=1e-12)  # (6, 1): 2 (1 + 7) / 128


@pytest.mark.parametrize(
    ("k", "n", "c", "expected"),
    [(1, 4, 1, 0.25), (2, 4, 1, 0.5), (4, 4, 1, 1), (2, 4, 0, 0), (2, 4, 2, 5 / 6), (3, 4, 2, 1), (1, 1, 1, 1)],
)
def test_pass_at_k_by_hand(k, n, c, expected):
    assert pass_at(k, [True] * c + [False] * (n - c)) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at(2500, [True] + [False] * 4999) == 0.5  # C(5000, 2500) has 1,504 digits


@pytest.mark.parametrize(
    ("k", "votes", "expected"),
    [
        (3, "a+ a+ b-", 1),
        (3, "a- b+ a-", 0),
        (2, "a+ b-", 1 / 2),  # a tie
        (3, "a+ b- c-", 1 / 3),
        (4, "a+ b- a- b-", 1 / 4),  # a's responses are right by half, and a has half the vote
        (3, "0+ 0+ b-", 0),  # who names no answer does not vote
        (3, "0- 0- b+", 1),
        (2, "0+ 0+", 0),
        (2, "a+ a+ b- b-", 1 / 2),  # two blocks
        (2, "a+ b- a+ b- c-", 1 / 2),  # the last sample fills no block
        (2, "a+ a+ b- a+ a-", 3 / 4),
        (1, "a+ b- 0+ a+", 1 / 2),
    ],
)
def test_maj_at_k_by_hand(k, votes, expected):
    keys = [None if vote[0] == "0" else vote[0] for vote in votes.split()]
    assert maj_at(k, keys, [vote[1] == "+" for vote in votes.split()]) == pytest.approx(expected, rel=1e-12)


def test_the_interval_of_a_constant_is_that_constant():
    for constant in (0.0, -1.0, 1 / 3):
        assert bootstrap([constant] * 7) == {"value": constant, "low": constant, "high": constant}


@pytest.mark.parametrize("values", [(-1, 0, 1), range(2000)])
def test_the_interval_of_many_is_the_normal_one(values):
    x = np.random.default_rng(1).choice(
        np.asarray(values, dtype=float), 2000, p=None if len(values) > 3 else (0.1, 0.6, 0.3)
    )
    found, half = bootstrap(x), 1.959964 * x.std() / math.sqrt(len(x))
    assert found["value"] == pytest.approx(x.mean(), rel=1e-12)
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.04)
    assert (found["high"] + found["low"]) / 2 == pytest.approx(x.mean(), abs=0.05 * half)
    assert bootstrap(x) == found != bootstrap(x, seed=1)


def test_the_bootstrap_takes_bounded_memory():
    tracemalloc.start()
    bootstrap(np.arange(3000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20  # bytes; 10,000 resamples of 3,000 at once would be 240 MB


def test_ten_questions_by_hand(pair):
    found = compare.compare(*pair)
    assert (found["questions"], found["only_a"], found["only_b"]) == (10, 0, 0)
    assert (found["a"], found["b"], found["difference"]["value"]) == (0.4, 0.9, pytest.approx(0.5))
    assert (found["gained"], found["gained_ids"]) == (6, ["5", "6", "7", "8", "9", "10"])
    assert (found["lost"], found["lost_ids"]) == (1, ["1"])
    assert found["p"] == pytest.approx(0.125) and not found["significant"] and found["at_k"] == []
    odd, even = (found["categories"]["subject"][name] for name in ("odd", "even"))
    assert (odd["questions"], odd["a"], odd["b"]) == (5, 0.4, 0.8)
    assert (even["questions"], even["a"], even["b"]) == (5, 0.4, 1.0)
    # Of five draws, those that hit 6, 8 or 10 are Binomial(5, 3/5): P(0) = 1.0 %, P(0 or 1) = 8.7 %, P(5) = 7.8 %.
    assert even["difference"] == {"value": pytest.approx(0.6), "low": pytest.approx(0.2), "high": pytest.approx(1)}


def test_a_question_counts_under_each_of_its_values(tmp_path):
    rows = [line(1, 1, skills=["x", "y"]), line(2, 0, skills=["y"]), line(3, 1, skills=[]), line(4, 1)]
    skills = compare.compare(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows))["categories"][
        "skills"
    ]
    assert {value: (of["questions"], of["a"]) for value, of in skills.items()} == {"x": (1, 1), "y": (2, 0.5)}


def test_neither_the_order_of_lines_nor_one_sided_questions_matter(pair, tmp_path):
    a, b = pair
    other = write(tmp_path / "shuffled.jsonl", [*reversed(b.read_text().splitlines(True)), line(77, 1), line(78, 0)])
    found, again = compare.compare(a, b), compare.compare(a, other)
    assert again.pop("only_b") == 2 and found.pop("only_b") == 0 and again == found
    back = compare.compare(other, a)
    assert (back["only_a"], back["lost_ids"]) == (2, found["gained_ids"])


def test_several_samples(tmp_path):
    def question(uid, votes):
        keys = [None if vote[0] == "0" else vote[0] for vote in votes.split()]
        return [line(uid, vote[1] == "+", i, key) for i, (vote, key) in enumerate(zip(votes.split(), keys))]

    a = question(1, "a+ b- b- b-") + question(2, "a+ 0- a+ b-")
    b = question(1, "a+ b-") + question(2, "a+ a+")
    found = compare.compare(write(tmp_path / "a.jsonl", a[::2] + a[1::2]), write(tmp_path / "b.jsonl", b))
    assert (found["samples_a"], found["samples_b"], found["a"], found["b"]) == (4, 2, 0.375, 0.75)
    assert (found["gained"], found["lost"], found["p"]) == (2, 0, 0.5)
    one, two, four = found["at_k"]
    assert [row["k"] for row in found["at_k"]] == [1, 2, 4]
    assert (one["pass"]["a"], one["pass"]["b"], one["maj"]["a"]) == (0.375, 0.75, 0.375)
    assert two["pass"]["a"] == pytest.approx((1 / 2 + 5 / 6) / 2) and two["pass"]["b"] == 1
    assert (two["maj"]["a"], two["maj"]["b"]) == ((1 / 4 + 3 / 4) / 2, 3 / 4)
    assert two["maj"]["difference"]["value"] == 0.25
    assert (four["pass"]["a"], four["maj"]["a"]) == (1, 1 / 2)
    assert four["pass"]["b"] is four["pass"]["difference"] is four["maj"]["b"] is None
    printed = compare.report(found)
    assert "| maj@2 | 50.00 | 75.00 | +25.00 [" in printed and "| pass@4 | 100.00 |  |  |" in printed
    assert "exact sign test" in printed


def test_k_are_powers_of_two_and_the_number_of_samples(tmp_path):
    file = write(tmp_path / "a.jsonl", [line(1, 1, i) for i in range(6)])
    assert [row["k"] for row in compare.compare(file, file)["at_k"]] == [1, 2, 4, 6]


def test_equal_shares_of_different_numbers_are_neither_gained_nor_lost(tmp_path):
    a = write(tmp_path / "a.jsonl", [line(1, i < 1, i) for i in range(3)])
    b = write(tmp_path / "b.jsonl", [line(1, i < 4, i) for i in range(12)])
    found = compare.compare(a, b)
    assert (found["gained"], found["lost"], found["difference"]["value"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("gained", "lost", "says"),
    [
        (
            6,
            1,
            "The difference is not significant at 5 % (McNemar's exact test, p = 0.125): B gained 6 and lost 1 of 9 ",
        ),
        (
            6,
            0,
            "B is significantly better than A at 5 % (McNemar's exact test, p = 0.0312): B gained 6 and lost 0 of 9 ",
        ),
        (
            0,
            6,
            "B is significantly worse than A at 5 % (McNemar's exact test, p = 0.0312): B gained 0 and lost 6 of 9 ",
        ),
    ],
)
def test_the_last_sentence(gained, lost, says, tmp_path):
    a = [line(i, i < lost) for i in range(9)]
    b = [line(i, lost <= i < lost + gained) for i in range(9)]
    found = compare.compare(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b))
    assert compare.report(found).splitlines()[-1] == says + "questions."


def test_the_last_sentence_where_many_small_gains_stand_beside_great_losses(tmp_path):
    # Of ten samples each: nine questions gain one right sample, one loses all ten.
    a = [line(i, i == 9, sample) for i in range(10) for sample in range(10)]
    b = [line(i, i < 9 and sample == 0, sample) for i in range(10) for sample in range(10)]
    found = compare.compare(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b))
    assert found["p"] == pytest.approx(22 / 1024) and found["difference"]["value"] == pytest.approx(-0.01)
    assert "(exact sign test, p = 0.0215)" in compare.verdict(found)
    assert compare.verdict(found).endswith("gained 9 and lost 1 of 10 questions, though its accuracy is not higher.")


# ------------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"b\.jsonl holds no score"),
        (["\n"], r"b\.jsonl holds no score"),
        ([line(1, 1), '{"id": "2", "sam'], r"b\.jsonl:2 is no score: not JSON .Unterm"),
        (["[" * 100_000], r"b\.jsonl:1 is no score: not JSON"),
        (["[1]\n"], r"b\.jsonl:1 is no score: it is list, not an object"),
        ([line(1, 1) | {"id": 1}], r"b\.jsonl:1 is no score: .*id is 1, expected text"),
        ([line(1, 1) | {"sample": "0"}], r"b\.jsonl:1 is no score: .*sample is '0', expected a whole number"),
        ([line(1, 1) | {"correct": None}], r"b\.jsonl:1 is no score: .*correct is None, expected true or false"),
        ([line(1, 1) | {"vote_key": 7}], r"b\.jsonl:1 is no score: .*vote_key is 7, expected text or null"),
        ([line(1, 1) | {"categories": {"x": "y"}}], r"b\.jsonl:1 is no score: .*expected lists of texts by name"),
        ([line(1, 1), line(2, 1), line(1, 0)], r"b\.jsonl:3: question '1' has sample 0 already, in .*b\.jsonl:1"),
        ([line(1, 1), line(2, 1), line(2, 1, 1)], r"b\.jsonl: question '2' has 2 samples and question '1' has 1"),
        ([line(3, 1)], "no question in common"),
        ([line(1, 1, level=["1"])], "the categories of question '1' differ; score both with the same --data"),
    ],
)
def test_bad_files_are_refused(rows, message, tmp_path):
    a = write(tmp_path / "a.jsonl", [line(1, 1)])
    with pytest.raises(ValueError, match=message):
        compare.compare(a, write(tmp_path / "b.jsonl", rows))


@pytest.mark.parametrize("name", ["id", "sample", "correct", "vote_key", "categories"])
def test_a_missing_field_is_named(name, tmp_path):
    row = {field: value for field, value in line(2, 1).items() if field != name}
    with pytest.raises(ValueError, match=rf"a\.jsonl:2 is no score: it has no '{name}'"):
        compare.read_scores(write(tmp_path / "a.jsonl", [line(1, 1), row]))


def test_summaries_must_agree_where_both_are_there(tmp_path):
    ours = write(tmp_path / "a.jsonl", [line(1, 1)], benchmark="mathvision", protocol="ours", n=1)
    official = write(tmp_path / "b.jsonl", [line(1, 1)], benchmark="mathvision", protocol="official")
    with pytest.raises(
        ValueError, match="summaries say protocol ours and official; score both with the same --protocol"
    ):
        compare.compare(ours, official)
    vista = write(tmp_path / "c.jsonl", [line(1, 1)], benchmark="mathvista", protocol="ours")
    with pytest.raises(ValueError, match="summaries say benchmark mathvision and mathvista"):
        compare.compare(ours, vista)
    bare = write(tmp_path / "d.jsonl", [line(1, 1)])
    for one, other in ((ours, bare), (bare, ours), (ours, ours)):
        found = compare.compare(one, other)
        assert (found["benchmark"], found["protocol"]) == ("mathvision", "ours")
    assert compare.compare(bare, bare)["protocol"] is None
    for text in ("{", "[]"):
        bare.with_suffix(".summary.json").write_text(text)
        with pytest.raises(ValueError, match=r"d\.summary\.json is no summary"):
            compare.compare(ours, bare)


def test_folders_of_benchmarks(tmp_path, capsys):
    for side, names in (("a", ("wemath", "mathvision", "dynamath")), ("b", ("mathvision", "mathverse", "wemath"))):
        for name in names:
            write(tmp_path / side / name / "scores.jsonl", [line(1, side == "b")], benchmark=name, protocol="official")
    result = compare.main(compare.Config(tmp_path / "a", tmp_path / "b"))
    printed = capsys.readouterr()
    assert list(result["benchmarks"]) == ["mathvision", "wemath"]
    assert [found["gained"] for found in result["benchmarks"].values()] == [1, 1]
    assert "dynamath: only A has it" in printed.err and "mathverse: only B has it" in printed.err
    assert "mathvision, official protocol: 1 questions" in printed.out
    one = compare.Config(tmp_path / "a/wemath", tmp_path / "b/wemath/scores.jsonl")
    assert compare.main(one)["benchmarks"]["wemath"] == result["benchmarks"]["wemath"]
    with pytest.raises(ValueError, match="have no benchmark in common"):
        compare.main(compare.Config(tmp_path / "a/wemath", tmp_path / "b"))
    with pytest.raises(FileNotFoundError, match="expected a score file, a folder with scores.jsonl"):
        compare.main(compare.Config(tmp_path / "nowhere", tmp_path / "b"))


def held_out(path: Path, gold: str = "7", **right: list[int]) -> Path:
    """Held-out scores: for each question which responses are right, the greedy one first."""
    rows = [
        {"uid": uid, "kind": "count" if uid < "q3" else "sum", "greedy": float(of[0]), "question": "?", "gold": gold,
         "responses": [{"text": "…", "key": str(x), "correct": bool(x)} for x in of]}
        for uid, of in right.items()
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"greedy": {"value": 0}, "rows": [*rows, {"uid": "no gold", "kind": None}]}))
    return path


def test_held_out_answers_of_runs(tmp_path, capsys):
    a = held_out(tmp_path / "a/after.json", q1=[0, 1, 1], q2=[1, 1, 0], q3=[1, 0, 0])
    b = held_out(tmp_path / "b/after.json", q1=[1, 1, 1], q2=[0, 1, 0], q3=[1, 1, 0], q4=[1, 1, 1])
    found = compare.main(compare.Config(tmp_path / "a", tmp_path / "b"))["benchmarks"]
    greedy, samples = found["held-out, greedy"], found["held-out, samples"]
    assert (greedy["a"], greedy["b"], greedy["gained_ids"], greedy["lost_ids"]) == (2 / 3, 2 / 3, ["q1"], ["q2"])
    assert (samples["a"], samples["b"], samples["gained_ids"], samples["lost_ids"]) == (1 / 2, 2 / 3, ["q3"], [])
    assert greedy["only_b"] == 1 and samples["samples_a"] == 2
    assert greedy["categories"]["kind"]["count"]["questions"] == 2 and greedy["categories"]["kind"]["sum"]["a"] == 1
    # Files by themselves, and settings that differ, by the runs' manifests.
    for side, temperature in (("a", 1.0), ("b", 0.5)):
        (tmp_path / side / "manifest.json").write_text(json.dumps({"config": {"temperature": temperature}}))
    capsys.readouterr()
    again = compare.main(compare.Config(a, b))["benchmarks"]
    assert again["held-out, samples"] == samples | {"settings": {"temperature": [1.0, 0.5]}}
    assert "A and B were not made alike: temperature 1.0 and 0.5" in capsys.readouterr().out
    # Sets that are drawn by seed have other questions of the same names.
    other = held_out(tmp_path / "c/after.json", gold="8", q1=[0, 1, 1])
    with pytest.raises(ValueError, match="question 'q1' is another one in each; compare runs with the same --seed"):
        compare.main(compare.Config(a, other))
    # A run with benchmarks has both.
    for side in "ab":
        write(tmp_path / side / "benchmarks/wemath/scores.jsonl", [line(1, True)])
    assert len(compare.main(compare.Config(tmp_path / "a", tmp_path / "b"))["benchmarks"]) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"rows": [{"uid": "a", "kind": null, "greedy": 1.0}]}',
            "holds no answers .*'responses'.*; give the held-out",
        ),
        ('{"rows": [{"uid": "a"}]}', "has no question with gold"),
        ('["rows"]', "holds no answers"),
        ("{", "not JSON"),
    ],
)
def test_held_out_scores_without_answers_are_refused(text, message, tmp_path):
    (tmp_path / "after.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        compare.main(compare.Config(tmp_path, tmp_path))


def test_light_imports():
    program = "import sys, eval.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n"


def test_the_seed_reaches_the_interval(tmp_path, capsys):
    right = np.random.default_rng(0).random((2, 200, 5)) < 0.5
    a, b = (
        write(tmp_path / f"{side}.jsonl", [line(i, of[i, sample], sample) for i in range(200) for sample in range(5)])
        for side, of in zip("ab", right)
    )
    one, two, again = (compare.main(compare.Config(a, b, seed=seed))["benchmarks"]["scores"] for seed in (0, 1, 0))
    assert one == again and one["p"] == two["p"] and one["difference"] != two["difference"]
    for found in (one, two):  # pass@1 is the accuracy
        assert found["at_k"][0]["pass"]["difference"] == pytest.approx(found["difference"])


def test_end_to_end(pair, tmp_path):
    a, b = pair
    out = tmp_path / "new/compared.json"
    command = [sys.executable, "-m", "eval.compare", a.parent, b, "--out", out, "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    written, last = json.loads(out.read_text()), json.loads(lines[-1])
    assert (written["a"], written["b"], written["seed"]) == (str(a.parent), str(b), 3)
    assert written["benchmarks"] == {"scores": compare.compare(a, b, seed=3)}
    short = last["benchmarks"]["scores"]
    assert (short["gained"], short["lost"], short["p"]) == (6, 1, 0.125) and "gained_ids" not in short
    assert short.items() <= written["benchmarks"]["scores"].items()
    assert "| all |  | 10* | 40.00 | 90.00 | +50.00 [" in done.stdout
    assert "| subject | even | 5* | 40.00 | 100.00 | +60.00 [+20.00, +100.00] |" in done.stdout
    assert "gained: 6 (5, 6, 7, 8, 9, …)" in lines and "lost: 1 (1)" in lines
    assert "not significant" in lines[-3]


def test_the_owners_figures_and_settings_that_differ_are_shown(tmp_path, capsys):
    def side(name: str, score: float, prompt: str, **more) -> Path:
        (tmp_path / name).mkdir()
        made = {"config": {"prompt": prompt, "temperature": 0.0}}
        known = {
            "benchmark": "wemath",
            "protocol": "official",
            "metrics": {"strict": {"score": score}},
            "responses": made,
        }
        return write(tmp_path / name / "scores.jsonl", [line("1", True)], **known | more)

    a, b = side("a", 0.25, "boxed", extractor="rules"), side("b", 0.5, "official", extractor="model")
    found = compare.main(compare.Config(a, b))["benchmarks"]["wemath"]
    assert found["settings"] == {"prompt": ["boxed", "official"], "extractor": ["rules", "model"]}
    printed = capsys.readouterr().out
    assert "| strict score | 25.00 | 50.00 |" in printed
    assert "A and B were not made alike: prompt boxed and official, extractor rules and model" in printed
    same = compare.main(compare.Config(a, side("c", 0.25, "boxed", extractor="rules")))["benchmarks"]["wemath"]
    assert same["settings"] == {} and "not made alike" not in capsys.readouterr().out
