"""Held-out scores: the table, its paired intervals, worked out by hand."""

import numpy as np
import pytest

from eval import heldout


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
