"""The page on a run in a headless browser, on which nothing may go wrong, and which may ask nothing of anybody."""

import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import report
from tests.extras import extra, missing
from tests.test_report import HOSTILE, group_of, parts
from tests.test_shards import make_group
from upt.groups import shards
from upt.groups.shards import save_image
from upt.run import locking


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, by Playwright: `make test-extras` installs it."""
    api = extra("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        missing("no Chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser):
    """From a file to its page in the browser; nothing may go wrong in it, and it may ask nothing of anybody."""
    contexts, wrong = [], []

    def go(path: Path, width: int = 1200, scheme: str = "light", address: str = ""):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        shown = context.new_page()
        shown.on("pageerror", lambda error: wrong.append(str(error)))
        shown.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        shown.on(
            "request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
        )
        shown.goto(path.absolute().as_uri() + address)
        shown.wait_for_selector("html[data-ready]")
        return shown

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def expect():
    """Playwright's assertions on what is to come: they wait for it, and fail if it does not."""
    api = extra("playwright.sync_api")
    api.expect.set_options(timeout=30_000)  # ms
    return api.expect


def load_again(shown, script: str):
    """Run a script that loads the page again; what it gives, once the new page is there."""
    with shown.expect_event("load"):
        given = shown.evaluate(script)
    shown.wait_for_selector("html[data-ready]")
    return given


def rewritten(run: Path, folder: Path, texts: list[str]) -> Path:
    """A copy of a run that has these texts wherever models, data and settings put any: in its last groups and its
    held-out questions one text each, and all of them as the first group's responses."""
    copy = shutil.copytree(run, folder)
    path = shards.shard_path(copy / "rollouts", 2)
    first, *_ = shards.read_shard(path)
    whole = [
        {"text": text, "key": text, "judge": {"score": None, "parsed": False, "judgements": [text]}} for text in texts
    ]
    responses = [first["responses"][0] | said for said in whole]
    groups = [first | {"responses": responses}]
    for response, text in zip(responses, texts):
        asked = {"uid": text, "question": text, "choices": [text] * 30, "gold": text}
        groups.append(first | asked | {"responses": [response]})
    shards.write_shard(path, groups)
    for name in ("before", "after"):
        scores = json.loads((copy / f"{name}.json").read_text())
        row = scores["rows"][0]
        said = [row["responses"][0] | {"text": text, "key": text, "correct": name == "after"} for text in texts]
        asked = [{"uid": text, "question": text, "kind": text, "gold": text, "choices": [text]} for text in texts]
        scores["rows"] = [row | {"responses": [r] + said} | of for r, of in zip(said, asked)]
        (copy / f"{name}.json").write_text(json.dumps(scores))
    manifest = json.loads((copy / "manifest.json").read_text())
    names = ("model", "adapter", "init_adapter", "quantize", "data", "reward", "advantage")
    manifest["config"] |= dict(zip(names, texts))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


MARKUP = "script, [onerror], [onload], [onclick], svg, iframe, [href^=javascript], [data-a]"
LOOSE = """() => {  // texts that are too long, or whose marks of direction could reach what follows
  const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), found = [];
  while (walk.nextNode()) {
    const text = walk.currentNode.data, parent = walk.currentNode.parentElement;
    const box = parent.closest("bdi, [dir=auto]");
    const isolated = box && ["isolate", "plaintext"].includes(getComputedStyle(box).unicodeBidi);
    if (text.length > 3010) found.push(`${text.length} characters in ${parent.outerHTML.slice(0, 80)}`);
    if (/[\u202a-\u202e\u2066-\u2069]/.test(text) && !isolated) found.push(parent.outerHTML.slice(0, 80));
  }
  for (const node of document.querySelectorAll("[aria-label], [alt], [title], option")) {
    const said = ["aria-label", "alt", "title"].map((name) => node.getAttribute(name) || "");
    if (node.localName === "option") said.push(node.textContent);
    const isLoose = (text) => text.length > 310 || /[\u202a-\u202e\u2066-\u2069]/.test(text);
    found.push(...said.filter(isLoose).map((text) => `${text.length}: ${text.slice(0, 60)}`));
  }
  return found;
}"""


OUTSIDE = """() => {  // what of a formula can be seen outside of its box
  const found = new Set();
  for (const box of document.querySelectorAll(".text, .question")) {
    box.scrollIntoView({ block: "center" });
    const of = box.getBoundingClientRect();
    for (const node of box.querySelectorAll("math, math *")) {
      const { left, right, top, bottom } = node.getBoundingClientRect();
      for (const [x, y] of [[left + 1, top + 1], [right - 1, bottom - 1], [(left + right) / 2, (top + bottom) / 2]]) {
        const isInside = of.left <= x && x <= of.right && of.top <= y && y <= of.bottom;
        if (!isInside && box.contains(document.elementFromPoint(x, y))) found.add(node.localName);
      }
    }
  }
  return [...found].sort();
}"""


def test_hostile_text_is_text(run, tmp_path, opened, expect):
    named = "<b onclick=alert(1)> 50%#2? \u202e"
    folder = rewritten(run, tmp_path / named, HOSTILE)
    shown = opened(report.main(report.Config(runs=(folder,))))
    cards, texts = shown.locator("#cards .card"), HOSTILE
    cards.first.wait_for()
    assert cards.count() == 1 + len(HOSTILE)
    responses = cards.first.locator(".responses li")
    for i, text in enumerate(texts[:4]):
        assert responses.nth(i).locator(".text").first.text_content() == text
    # In each field of a group, what is no LaTeX stands as it is, if shortened.
    for i, text in enumerate(texts):
        card, short = cards.nth(1 + i), text if len(text) <= 160 else text[:80] + " … " + text[-80:]
        assert card.locator("h3 bdi").first.text_content() == short
        assert card.locator(".facts", has_text="gold").locator("bdi").first.text_content() == short
        assert card.locator(".responses .facts bdi").first.text_content() == short
        if i not in (4, 5, 7):
            fields = (".question", ".options li:first-child .text", ".responses .text", "details .text")
            assert [card.locator(field).first.text_content() for field in fields] == [text] * 4
        assert card.locator(".options li").count() == 26 and "and 4 more options" in card.text_content()
    picture = shown.locator("#cards img").first
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    assert shown.title() == named and shown.locator("h1 bdi").text_content() == named
    facts = shown.locator("#head td bdi").all_text_contents()
    assert texts[0] in facts[0] and texts[4] == facts[1]
    for move in ("lost", "gained"):  # the held-out questions, all of which were gained
        shown.locator("#move").select_option(move)
        expect(shown.locator("#answers .card")).to_have_count(len(HOSTILE) * (move == "gained"))
    tags = shown.locator("#answers .card .tag").all_text_contents()
    assert {*texts[:2]} <= {*tags} and max(map(len, tags)) < 150
    for details in shown.locator("details").all():
        details.evaluate("node => node.open = true")
    assert shown.evaluate(LOOSE) == []
    assert shown.locator("main").locator(MARKUP).count() == 0
    assert shown.evaluate(OUTSIDE) == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= 1200
    # What is long is whole when it is asked for, and folds again.
    fold = cards.first.get_by_role("button", name="all 1,000,000 characters").first
    fold.click()
    assert len(responses.nth(7).locator(".text").first.text_content()) == 1_000_000
    cards.first.get_by_role("button", name="less").click()
    assert len(responses.nth(7).locator(".text").first.text_content()) < 4000
    # A link to a card of such a name leads to it.
    links = [shown.locator("#cards .card").nth(1 + i).locator("h3 a").get_attribute("href") for i in range(7)]
    for link, text in zip(links, texts):
        shown.evaluate("link => (location.hash = link)", link)
        expect(shown.locator("#cards h3 bdi").first).to_have_js_property("textContent", text)


def test_hostile_tables_and_names_of_runs(run, tmp_path, opened, expect):
    folder = tmp_path / "ablate"
    names = [text.replace("/", "|").replace("\x00", "").encode("utf-8", "replace").decode() for text in HOSTILE[:7]]
    for name in names:
        shutil.copytree(run, folder / name / "seed-0")
    cells = [text.replace("|", " ").replace("\u2028", " ").encode("utf-8", "replace").decode() for text in HOSTILE]
    (folder / "table.md").write_text(f"## {cells[0]}\n| {' | '.join(cells)} |\n| {' | '.join(cells)} |\n")
    shown = opened(report.main(report.Config(runs=(folder,))))
    shown.locator("#cards .card").first.wait_for()
    assert shown.evaluate(LOOSE) == [] and shown.locator("main").locator(MARKUP).count() == 0
    heads = shown.locator("#head thead").first.locator("bdi").all_text_contents()
    assert heads[:5] == cells[:5]
    runs = shown.locator("#head tbody").nth(1).locator("th bdi").all_text_contents()
    assert sorted(runs) == sorted(f"{name}/seed-0" if len(name) < 150 else runs[i] for i, name in enumerate(names))
    shown.locator("#run").select_option(index=3)
    expect(shown.locator("#cards [data-card^='group 3 ']")).to_have_count(3)
    assert shown.locator("#run").input_value() == parts(folder / "report.html")["about"]["runs"][3]["name"]
    assert shown.title() == "ablate: 7 runs"


def test_latex_can_be_read(run, tmp_path, opened):
    texts = ["so $\\frac{1}{2}$ is \\boxed{\\sqrt{3}}", "a \\boxed{B} and $5 or $6", "\\[x^2\\]", "$\\frac{1$ stays"]
    money = ["A is $5, B is $7 or 8$ more", "A: $3, B: $4, C: 5$, or $x$", "$2 \\times 3$ and $7$ and $5 or 6$, $y$"]
    texts += money
    shown = opened(report.main(report.Config(runs=(rewritten(run, tmp_path / "r", texts),))))
    said = shown.locator("#cards .card").first.locator(".responses li > .text")
    said.first.wait_for()
    assert said.nth(0).locator("math mfrac").count() == 1 and said.nth(0).locator(".boxed math msqrt").count() == 1
    assert said.nth(1).text_content() == "a B and $5 or $6" and said.nth(1).locator(".boxed").text_content() == "B"
    assert said.nth(2).locator("math msup").count() == 1 and said.nth(3).text_content() == "$\\frac{1$ stays"
    # A dollar before a number is money, but where it is plainly a formula.
    assert [said.nth(i).locator("math").count() for i in (4, 5, 6)] == [0, 1, 3]
    assert said.nth(4).text_content() == money[0] and said.nth(5).text_content().startswith("A: $3, B: $4, C: 5$, or ")
    assert "$5 or 6$" in said.nth(6).text_content()


def test_groups_are_found(run, tmp_path, opened, expect):
    copy = shutil.copytree(run, tmp_path / "r")
    named = []
    for step in range(3):
        keys = [("7", "7", "8", "9"), ("7", "7", "7", "7"), ("8", "8", "8", None)]
        groups = [
            make_group(uid=f"q{step}{i}", question=f"Question {step}{i}?", keys=of, gold="7", step=step, image=None)
            for i, of in enumerate(keys)
        ]
        named.append([group["uid"] for group in groups])
        judge = {"score": 0.5, "parsed": True, "judgements": [f"Sound reasoning in {step}"]}
        groups[1]["responses"][2]["judge"] = judge
        shards.write_shard(shards.shard_path(copy / "rollouts", step), groups)
    shown = opened(report.main(report.Config(runs=(copy,))))

    def there_are(*uids: str):
        expect(shown.locator("#cards h3 bdi")).to_have_text(uids)

    there_are(*named[2])
    shown.locator("#step").fill("0")
    there_are(*named[0])
    counts = ["all groups (3)", "majority wrong (1)", "split: half or less agree (1)", "skipped (0)"]
    assert shown.locator("#flag option").all_text_contents()[:4] == counts
    shown.locator("#flag").select_option("wrong")
    there_are("q02")
    shown.get_by_label("in every step").check()
    there_are("q02", "q12", "q22")
    shown.locator("#flag").select_option("")
    there_are(*sum(named, []))
    shown.locator("#order").select_option("least agreed first")
    there_are("q00", "q10", "q20", "q02", "q12", "q22", "q01", "q11", "q21")
    shown.locator("#search").fill("sound Reasoning in 2")  # what the judge wrote
    there_are("q21")
    shown.locator("#search").fill("QUESTION 11")
    there_are("q11")
    assert "1 of 9 groups" in shown.locator("#found").text_content()
    # A link to a card leads to it, here and from outside.
    shown.locator("#cards h3 a").click()
    there_are("q11", "q10", "q12")
    expect(shown).to_have_url(re.compile("uid=q11"))
    again = opened(copy / "report.html", address="#" + shown.url.split("#")[1])
    again.locator("#cards .card").first.wait_for()
    assert again.locator("#cards h3 bdi").first.text_content() == "q11"
    # By keyboard alone: an arrow moves the step.
    shown.locator("#step").focus()
    shown.keyboard.press("ArrowLeft")
    there_are("q00", "q02", "q01")  # still by agreement


def test_what_changed(run, tmp_path, opened, expect):
    copy = shutil.copytree(run, tmp_path / "r")
    verdicts = {"before": [0, 1, 0, 0], "after": [1, 0, 0, 1]}
    for name, right in verdicts.items():
        scores = json.loads((copy / f"{name}.json").read_text())
        for i, (row, x) in enumerate(zip(scores["rows"], right, strict=True)):
            row["responses"][0] |= {"correct": bool(x), "text": f"{name} {i}", "key": f"{name}-{i}"}
            row["kind"] = "odd" if i % 2 else "even"
            keys = {"before 0": "yes no", "after 0": "yes yes", "before 3": "yes yes", "after 3": "no maybe"}
            for response, key in zip(row["responses"][1:], keys.get(f"{name} {i}", "no no").split(), strict=True):
                response |= {"key": key, "correct": key == "yes"}
        (copy / f"{name}.json").write_text(json.dumps(scores))
    shown = opened(report.main(report.Config(runs=(copy,))))
    answers = shown.locator("#answers .card")
    after = answers.locator(".pair > div:last-child > .text")  # of each card
    answers.first.wait_for()
    assert "2 of 4 gained" in shown.locator("#moved").text_content() and answers.count() == 2
    assert answers.first.locator(".pair .text").all_text_contents()[0] == "before 3"
    assert ["✗ wrong", "✓ right"] == answers.first.locator("h4 span").all_text_contents()
    shown.locator("#kind").select_option("odd")
    expect(after).to_have_text(["after 3"])
    shown.locator("#move").select_option("lost")
    expect(after).to_have_text(["after 1"])
    cells = shown.locator("#kinds tbody tr").first.locator("td").all_text_contents()
    assert cells == ["2", "1", "0", "1", "0"]  # even: questions 0 and 2; gained, lost, missed, kept
    shown.locator("#kind").select_option("")
    shown.locator("#move").select_option("gained")
    # The samples of question 0 went from 1 to 2 right, of 2; those of question 3 from 2 to none: it changed more.
    expect(after).to_have_text(["after 3", "after 0"])
    facts = answers.first.locator(".pair .facts").all_text_contents()
    assert facts == ["2 samples: 2 × yes\u00a0✓", "2 samples: 1 × no\u00a0✗, 1 × maybe\u00a0✗"]
    shown.locator("#find").fill("AFTER 0")
    expect(after).to_have_text(["after 0"])
    assert "1 of 4 gained; those whose samples changed most come first." in shown.locator("#moved").text_content()
    # A card has a link of its own, and one to what training asked in the same words.
    shown.locator("#find").fill("")
    expect(answers).to_have_count(2)
    link = answers.nth(1).get_by_role("link", name="link").get_attribute("href")
    again = opened(copy / "report.html", address=link)
    again.locator("#answers .card").first.wait_for()
    assert again.locator("#answers .card").count() == 1 and again.evaluate("scrollY") > 500
    question = answers.first.locator(".question").text_content()
    answers.first.get_by_role("link", name="asked in training").click()
    asked = [g["question"] for path in shards.list_shards(run / "rollouts") for g in shards.read_shard(path)]
    expect(shown.locator("#found")).to_have_text(f"{asked.count(question)} of {len(asked)} groups")
    assert shown.locator("#search").input_value() == question and shown.locator("#everywhere").is_checked()


def test_answers_without_gold(run, tmp_path, opened):
    copy = shutil.copytree(run, tmp_path / "r")
    for name in ("before", "after"):
        scores = json.loads((copy / f"{name}.json").read_text())
        for i, row in enumerate(scores["rows"]):
            row["gold"] = None
            row["responses"] = [r | {"correct": None, "key": f"{name * (i == 2)}"} for r in row["responses"]]
        (copy / f"{name}.json").write_text(json.dumps(scores))
    shown = opened(report.main(report.Config(runs=(copy,))))
    labels = ["another answer (1)", "the same answer (3)"]
    assert shown.locator("#move option").all_text_contents() == labels
    assert shown.locator("#moved").text_content().endswith("before and after training: 1 of 4 another answer.")


def test_what_changed_so_far(run, tmp_path, opened):
    """Of a run in the making: after its last evaluation, and it says which that is."""
    begun = shutil.copytree(run, tmp_path / "begun")
    for name in ("summary.json", "after.json"):
        (begun / name).unlink()
    shown = opened(report.main(report.Config(runs=(begun,))))
    heads = shown.locator("#head thead th").all_text_contents()
    assert heads == ["held out", "questions", "before", "after 2 of 3 steps", "difference"]
    assert "* fewer than 30" in shown.locator("#head").text_content()
    assert "before training and after 2 of 3 steps: " in shown.locator("#moved").text_content()
    titles = shown.locator("#answers .card").first.locator("h4").all_text_contents()
    assert [title.split(" ✗")[0].split(" ✓")[0] for title in titles] == ["before", "after 2 of 3 steps"]
    both = opened(report.main(report.Config(runs=(run, begun), out=tmp_path / "both.html")), address="#changed-run=a")
    options = both.locator("#against option").all_text_contents()
    assert options[0] == "the same before training" and options[1].endswith("begun, after 2 of 3 steps")
    shutil.rmtree(begun / "held-out")
    shown = opened(report.main(report.Config(runs=(begun,))))
    assert shown.locator("#head thead th").all_text_contents() == ["held out", "questions", "before"]
    assert "Those after training come when it has ended." in shown.locator("#head").text_content()


def test_curves_show_their_values(run, opened, expect):
    shown = opened(run / "report.html")
    figures = shown.locator("#plots figure")
    captions = figures.locator("figcaption").all_text_contents()
    assert {"held out, per cent", "reward", "entropy, nats", "majority share", "seconds of a step"} <= {*captions}
    chart = figures.nth(captions.index("entropy, nats"))
    chart.scroll_into_view_if_needed()
    rows = [json.loads(line)["entropy"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    for smoothing, value in ((1, rows[-1]), (3, sum(rows) / 3)):
        shown.get_by_label("Smoothing").fill(str(smoothing))
        over = chart.locator(".u-over")
        over.scroll_into_view_if_needed()
        for y in (20, 30):
            over.hover(position={"x": over.bounding_box()["width"] - 2, "y": y})
        expect(chart.locator(".u-legend")).to_contain_text(f"{value:.4f}")


def test_curves_are_gone_along_by_keys(run, tmp_path, opened, expect):
    for i in range(2):
        copy = shutil.copytree(run, tmp_path / "x" / f"r{i}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row | {"entropy": i + row["step"] / 10, "kl": [i, None, i + 2][row["step"]]} for row in rows]
        (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = opened(report.main(report.Config(runs=(tmp_path / "x",))))
    chart = shown.get_by_role("slider", name="entropy, nats")
    legend = shown.locator("#plots figure").filter(has_text="entropy, nats").locator(".u-legend")
    chart.focus()
    top = shown.evaluate("scrollY")
    assert chart.get_attribute("aria-valuetext") == "step 3: r0 0.2000, r1 1.2000"
    for key, step in (("ArrowLeft", 2), ("Home", 1), ("ArrowLeft", 1), ("End", 3), ("ArrowLeft", 2)):
        shown.keyboard.press(key)
        values = [f"{i + (step - 1) / 10:.4f}" for i in range(2)]
        assert chart.get_attribute("aria-valuetext") == f"step {step}: r0 {values[0]}, r1 {values[1]}"
        assert chart.get_attribute("aria-valuenow") == f"{step}"
        expect(legend).to_contain_text(values[1])  # as under the mouse
    assert shown.evaluate("scrollY") == top
    for key, name in (("ArrowDown", "r1"), ("ArrowDown", "r0"), ("ArrowUp", "r1")):
        shown.keyboard.press(key)
        assert chart.get_attribute("aria-valuetext").startswith(f"step 2: {name} ")
        shown.keyboard.press("Enter")
        expect(shown.locator("#run")).to_have_value(name)
        expect(shown.locator("#stepped")).to_have_text("2 of 3")
        chart.focus()
    # A step at which nothing was measured; keys that are the browser's; Enter before any other.
    chart = shown.get_by_role("slider", name="KL to the start, nats")
    chart.focus()
    said = []
    for key in ("Control+Home", "ArrowLeft", "ArrowDown", "ArrowLeft", "ArrowDown"):
        shown.keyboard.press(key)
        said.append(chart.get_attribute("aria-valuetext"))
    assert said == [
        "step 3: r0 2.0000, r1 3.0000", "step 2: no value", "step 2: no value", "step 1: r0 0.0000, r1 1.0000",
        "step 1: r1 1.0000, r0 0.0000",
    ]  # fmt: skip
    shown.locator("#run").select_option("r0")
    shown.get_by_label("Smoothing").fill("2")  # draws them anew
    chart.focus()
    shown.keyboard.press("Enter")
    expect(shown.locator("#run")).to_have_value("r1")
    expect(shown.locator("#stepped")).to_have_text("1 of 3")


def test_what_is_looked_at_stays_over_loading_again(run, tmp_path, opened, expect):
    begun = shutil.copytree(run, tmp_path / "begun")
    (begun / "summary.json").unlink()
    config = report.Config(runs=(begun,), out=begun / "report.html", watch=True, every=3600)
    with locking.holding(begun):
        assert report.make(config)
    shown = opened(begun / "report.html")
    assert "the run goes on" in shown.locator("#notice").text_content()
    shown.locator("#step").fill("1")
    shown.locator("#order").select_option("most agreed first")
    shown.locator("#smooth").fill("3")
    shown.locator("#move").select_option("missed")
    for words in ("what no card has", "?"):  # a search that has been waited for draws no cards later on
        shown.locator("#find").fill(words)
        expect(shown.locator("#answers .card")).to_have_count(4 * (words == "?"))
    shown.locator("#answers details").nth(3).locator("summary").click()
    taller = '<div style="height: 500px"></div><div id="plots"></div>'  # what is new since may stand further above
    text = (begun / "report.html").read_text()
    (begun / "report.html").write_text(text.replace('<div id="plots"></div>', taller))
    top = load_again(
        shown,
        """() => {  // as the page does by itself
      const top = () => document.querySelectorAll("#answers .card")[1].getBoundingClientRect().top;
      scrollTo(0, top() + scrollY + 30);
      remember();
      location.reload();
      return top();
    }""",
    )
    assert "step=2" in shown.url and "smooth=3" in shown.url and "move=missed" in shown.url
    assert shown.locator("#stepped").text_content() == "2 of 3" and shown.locator("#smoothed").text_content() == "3"
    assert shown.locator("#order").input_value() == "most agreed first" and shown.locator("#find").input_value() == "?"
    opened_now = shown.locator("#answers details").evaluate_all("nodes => nodes.map((node) => node.open)")
    assert opened_now.index(True) == 3 and sum(opened_now) == 1
    assert top < 0
    place = 'document.querySelectorAll("#answers .card")[1].getBoundingClientRect().top'
    shown.wait_for_function(f"top => Math.abs({place} - top) < 3", arg=top)
    # The same address elsewhere is the same view; a part of the page does not take it away.
    again = opened(begun / "report.html", address="#" + shown.url.split("#")[1])
    assert again.locator("#stepped").text_content() == "2 of 3"
    again.evaluate("() => addEventListener('hashchange', () => (window.went = true))")  # after the page's own
    again.get_by_role("link", name="Curves").click()
    again.wait_for_function("() => window.went")
    assert "step=2" in again.evaluate("location.hash") and again.locator("#stepped").text_content() == "2 of 3"
    # And it does load itself again, unless it is told not to.
    with locking.holding(begun):
        report.make(replace(config, every=1))
    quick = opened(begun / "report.html", address="#follow=no")
    quick.evaluate("() => (window.mine = true)")
    quick.wait_for_timeout(1300)  # longer than the second after which it would
    assert quick.evaluate("() => window.mine") is True
    with quick.expect_event("load"):
        quick.get_by_label("loads itself again").check()


@pytest.mark.parametrize(("address", "said"), [
    ("#uid=nobody&step=2", "to the group nobody, which is not in this step"),
    ("#step=99", "to step 99, which is not here"),
    ("#run=none&step=1", "to the run none, which is not here"),
])  # fmt: skip
def test_a_link_to_what_is_not_there_says_so(run, opened, expect, address, said):
    leave = {
        "slider": (lambda: shown.locator("#step").fill("1"), 3),
        "search": (lambda: shown.locator("#search").fill("?"), 3),
        "every step": (lambda: shown.get_by_label("in every step").check(), 9),
    }
    for choose, count in leave.values():
        shown = opened(run / "report.html", address=address)
        assert f"This link is {said}" in shown.locator("#found").text_content()
        assert shown.locator("#cards .card").count() == 0
        choose()
        expect(shown.locator("#cards .card")).to_have_count(count)
        assert "This link" not in shown.locator("#found").text_content()


def test_a_link_to_a_part_of_the_page(run, opened):
    shown = opened(run / "report.html", address="#changed")
    shown.wait_for_function("() => Math.abs(document.querySelector('#changed').getBoundingClientRect().top) < 30")
    assert abs(shown.locator("#changed").bounding_box()["y"]) < 30 < shown.evaluate("scrollY")


def test_groups_that_are_not_there_any_more(run, tmp_path, opened):
    copy = shutil.copytree(run, tmp_path / "r")
    shutil.rmtree(copy / "rollouts")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["config"]["from_shards"] = "runs/store"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    shown = opened(report.main(report.Config(runs=(copy,))))
    assert "those of runs/store, which is not there any more" in shown.locator("#note").text_content()
    assert "No groups yet" not in shown.locator("#groups").text_content()


def test_what_cannot_be_unpacked_is_said(run, tmp_path, browser, opened, expect):
    text = (run / "report.html").read_text()
    broken = run / "broken.html"
    broken.write_text(re.sub(r'(id="(?:groups-0-2|answers-0)">)[^<]{40}', r"\1" + "A" * 40, text))
    shown = opened(broken)
    for part in ("#cards", "#answers"):
        assert "the file is damaged: make the page again with report.py" in shown.locator(part).text_content()
    shown.locator("#step").fill("0")  # the others are whole
    expect(shown.locator("#cards .card")).to_have_count(3)
    context = browser.new_context()
    context.add_init_script("delete self.DecompressionStream")
    old = context.new_page()
    old.goto((run / "report.html").as_uri())
    old.wait_for_selector("html[data-ready]")
    assert "this browser is too old; Chrome and Edge 109, Firefox 113" in old.locator("#cards").text_content()
    # Half of the file, and no JavaScript at all.
    broken.write_text(text[: len(text) // 2])
    old.goto(broken.as_uri())
    assert "the file is incomplete or damaged" in old.locator("#loading").inner_text()
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto((run / "report.html").as_uri())
    assert "This page needs JavaScript" in plain.locator("main").inner_text()
    assert not plain.locator("#loading").is_visible()
    broken.unlink()


def contrast(a: str, b: str) -> float:
    """Of two colours #rgb or #rrggbb, by WCAG 2: (L1 + 0.05) / (L2 + 0.05)."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart_and_seen(run, tmp_path, opened, scheme):
    assert contrast("#fff", "#000000") == pytest.approx(21)
    copy = shutil.copytree(run, tmp_path / "r")
    group = group_of([str(i) for i in range(10)] + ["1"], text="so", image=None)
    shards.write_shard(shards.shard_path(copy / "rollouts", 2), [group])
    shown = opened(report.main(report.Config(runs=(copy,))), scheme=scheme)

    def colour(name: str) -> str:
        return shown.evaluate(f"() => getComputedStyle(document.documentElement).getPropertyValue('{name}').trim()")

    lines = [colour(f"--c{i}") for i in range(8)]
    assert len({*lines}) == 8
    for ink in (*lines, colour("--good"), colour("--bad"), colour("--warn"), colour("--quiet")):
        assert min(contrast(ink, colour("--page")), contrast(ink, colour("--card"))) >= 4, ink
    looks = shown.evaluate("() => [...Array(20).keys()].map((i) => JSON.stringify(looks(i)))")
    assert len({*looks}) == 20
    # Keys by the rank of their votes; those after the eighth are grey.
    found = shown.locator(".responses li").evaluate_all("nodes => nodes.map((node) => node.style.cssText)")
    assert "--c0" in found[1] and "--c0" in found[10] and "--c1" in found[0]
    assert len({*found}) == 9 and all("--quiet" in found[i] for i in (8, 9))


def test_runs_beside_each_other(run, tmp_path, opened, expect):
    """Two rewards, two seeds each: one colour a reward, and what one run answers beside another's."""
    folder = tmp_path / "ablate"
    for i, name in enumerate(("majority/seed-0", "majority/seed-1", "random/seed-0", "random/seed-1")):
        copy = shutil.copytree(run, folder / name)
        rows = [json.loads(line) | {"entropy": float(i)} for line in (run / "metrics.jsonl").read_text().splitlines()]
        (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        scores = json.loads((copy / "after.json").read_text())
        for j, row in enumerate(scores["rows"]):
            row["responses"][0] |= {"text": f"{name} says {j}", "correct": j < i}
        (copy / "after.json").write_text(json.dumps(scores))
        scores = json.loads((copy / "before.json").read_text())
        scores["rows"][3]["question"] += "!" * (i == 2)  # another question of the same name
        (copy / "before.json").write_text(json.dumps(scores))
    shown = opened(report.main(report.Config(runs=(folder,))))
    chart = shown.locator("#plots figure").filter(has=shown.locator("figcaption", has_text="entropy, nats"))
    legend = chart.locator(".u-legend .u-series:visible").all_text_contents()
    assert [text.split(":")[0].rstrip("–") for text in legend] == ["step", "majority, mean of 2", "random, mean of 2"]
    said = chart.get_by_role("slider", name="entropy, nats").get_attribute("aria-valuetext")
    assert said == "step 3: majority, mean of 2 0.5000, random, mean of 2 2.5000"
    # What changed, in another run, and beside another run.
    shown.locator("#changed-run").select_option("random/seed-1")
    shown.locator("#against").select_option("majority/seed-1")
    shown.locator("#move").select_option("gained")
    cards = shown.locator("#answers .card")
    expect(cards.first.locator(".pair > div > .text")).to_have_text(["majority/seed-1 says 1", "random/seed-1 says 1"])
    assert cards.count() == 2  # the one has question 0 right, the other 0, 1 and 2
    heads = cards.first.locator("h4").all_text_contents()
    assert heads == ["majority/seed-1 ✗ wrong", "random/seed-1 ✓ right"]
    assert "after one run and after the other: 2 of 4 gained" in shown.locator("#moved").text_content()
    expect(shown).to_have_url(re.compile("changed-run=random"))
    shown.locator("#against").select_option("random/seed-0")
    expect(shown.locator("#moved")).to_contain_text(" of 3 gained")  # the fourth is another question there
    shown.locator("#run").select_option("random/seed-0")
    expect(shown.locator("#cards h3 a").first).to_have_attribute("href", re.compile("^#run=random%2Fseed-0&"))
    # Runs that were asked other questions.
    for name in ("before", "after"):
        path = folder / "random" / "seed-1" / f"{name}.json"
        path.write_text(path.read_text().replace('"question": "', '"question": "? '))
    shown = opened(
        report.main(report.Config(runs=(folder,))), address="#changed-run=random/seed-1&against=random/seed-0"
    )
    shown.locator("#moved").filter(has_text="have no held-out question in common").wait_for()


def test_a_click_on_a_curve_leads_to_the_groups_of_its_run(run, tmp_path, opened, expect):
    """The nearest run of those that have the step; one of them has made but two of the three."""
    for i, (name, steps) in enumerate({"short": 2, "long": 3, "top": 3}.items()):
        copy = shutil.copytree(run, tmp_path / "x" / name)
        rows = [json.loads(line) | {"entropy": float(i)} for line in (run / "metrics.jsonl").read_text().splitlines()]
        (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:steps]))
        for step in range(steps, 3):
            shards.shard_path(copy / "rollouts", step).unlink()
    shown = opened(report.main(report.Config(runs=(tmp_path / "x",))), address="#run=short")
    chart = shown.locator("#plots figure").filter(has=shown.locator("figcaption", has_text="entropy, nats"))
    over = chart.locator(".u-over")
    size = over.bounding_box()
    clicks = [(0.02, 0.98, "short", 1), (0.98, 0.98, "long", 3), (0.98, 0.02, "top", 3), (0.98, 0.4, "long", 3)]
    for x, y, name, step in clicks:
        over.scroll_into_view_if_needed()
        over.click(position={"x": size["width"] * x, "y": size["height"] * y})
        expect(shown.locator("#run")).to_have_value(name)
        expect(shown.locator("#stepped")).to_have_text(f"{step} of 3")
        expect(shown.locator("#cards .card")).to_have_count(3)
        assert f"run={name}" in shown.locator("#cards h3 a").first.get_attribute("href")


def test_names_that_are_long_unfold(run, tmp_path, opened):
    names = ["judged(t_h=.9,t_l=.3)-dr-grpo-max-share-0.875-questions-per-step-64" + end for end in ("", "-b")]
    for name in names:
        shutil.copytree(run, tmp_path / "x" / name)
    shown = opened(report.main(report.Config(runs=(tmp_path / "x",))))
    shown.locator("#against").select_option(names[1])
    head = shown.locator("#answers .card").first.locator("h4").first
    head.get_by_role("button").wait_for()
    assert names[1] not in head.text_content()
    head.get_by_role("button").click()
    assert names[1] in head.text_content()


def test_a_comparison_that_grows(run, tmp_path, opened):
    """What is looked at and unfolded stays that of its run, though another one comes before it."""
    folder = tmp_path / "ablate"
    for name in ("majority/seed-0", "majority/seed-1"):
        shutil.copytree(run, folder / name)
    config = report.Config(runs=(folder,), out=folder / "report.html", watch=True, every=3600)
    with locking.holding(folder):
        report.make(config)
        shown = opened(folder / "report.html")
        shown.locator("#run").select_option("majority/seed-1")
        shown.locator("#head details", has_text="majority/seed-1").locator("summary").click()
        shutil.copytree(run, folder / "alike/seed-0")
        report.make(config)
    load_again(shown, "() => (remember(), location.reload())")
    assert shown.locator("#run option").count() == 3 and shown.locator("#run").input_value() == "majority/seed-1"
    assert shown.locator("#head details[open] summary").all_text_contents() == ["majority/seed-1"]


def test_a_run_of_one_step_has_points(run, tmp_path, opened):
    begun = shutil.copytree(run, tmp_path / "begun")
    first, *_ = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_text(first)
    shown = opened(report.main(report.Config(runs=(begun,))))
    drawn = shown.evaluate("""() => {  // pixels of the line's colour
      const figures = [...document.querySelectorAll("#plots figure")];
      const canvas = figures.find((node) => node.textContent.startsWith("entropy")).querySelector("canvas");
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      let count = 0;
      for (let i = 0; i < data.length; i += 4)
        if (data[i] === 0x09 && data[i + 1] === 0x69 && data[i + 2] === 0xda && data[i + 3] === 255) count++;
      return count;
    }""")
    assert drawn >= 10


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_it_can_be_used_by_all(run, tmp_path, opened, width, scheme):
    axe = extra("axe_playwright_python.sync_playwright")
    copy = shutil.copytree(run, tmp_path / "r")
    long = " + ".join(f"a_{{{i}}}" for i in range(width // 15))  # a formula, which does not wrap
    group = group_of(("7",), text=f"so \\[{long}\\] ends", question=f"${long}$", choices=["\\boxed{" + long + "}"])
    shards.write_shard(shards.shard_path(copy / "rollouts", 2), [group])
    before = json.loads((copy / "before.json").read_text())
    before["rows"][0]["kind"] = "kind " * 30
    (copy / "before.json").write_text(json.dumps(before))
    shown = opened(report.main(report.Config(runs=(copy,))), width, scheme)
    shown.locator("#cards .card").first.wait_for()
    shown.locator("#answers .card").first.wait_for()
    found = axe.Axe().run(shown).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []
    boxes = shown.locator("#cards .text, #cards .question")  # which are scrolled by themselves
    assert boxes.count() == 3
    assert all(box.evaluate("node => node.scrollWidth > node.clientWidth && !node.tabIndex") for box in boxes.all())
    assert shown.evaluate("document.documentElement.scrollWidth") <= width


def test_pictures_of_the_page(run, tmp_path, opened):
    """Those of docs/looking.md are made so: SCREENSHOTS_OF=runs/train make test-extras ARGS="-k pictures_of"."""
    of = os.environ.get("SCREENSHOTS_OF")
    made, folder = (Path(of) / "report.html", Path("docs")) if of else (run / "report.html", tmp_path)
    shown = opened(made, width=1000)
    shown.locator("#answers .card").first.wait_for()
    shown.locator("#flag").select_option("split" if of else "")
    places = {"page": "#scores", "curves": "#curves", "group": "#cards .card", "changed": "#answers .card"}
    for name, selector in places.items():
        place = shown.locator(selector).first
        place.scroll_into_view_if_needed()
        place.evaluate("node => Promise.all([...node.querySelectorAll('img')].map((image) => image.decode()))")
        place.screenshot(path=folder / f"{name}.png")
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_ten_thousand_groups_open_at_once(run, tmp_path, opened):
    copy = shutil.copytree(run, tmp_path / "r")
    picture = save_image(copy / "rollouts", Image.new("RGB", (56, 56), "red"))
    for step in range(20):
        text = " ".join(f"word{step}-{i}" for i in range(100))
        groups = [
            group_of(("7", "7", "8", "9"), text=text, uid=f"q{step}-{i}", step=step, image=picture) for i in range(500)
        ]
        shards.write_shard(shards.shard_path(copy / "rollouts", step), groups)
    made = report.main(report.Config(runs=(copy,)))
    start = time.monotonic()
    shown = opened(made)
    shown.locator("#cards .card").first.wait_for()
    assert "500 of 500 groups" in shown.locator("#found").text_content()
    assert shown.locator("#cards .card").count() == 20
    assert sorted(shown.evaluate("() => [...unpacked.keys()]")) == ["answers-0", "groups-0-19"]  # the rest stays packed
    open_in, start = time.monotonic() - start, time.monotonic()
    shown.get_by_label("in every step").check()
    shown.locator("#search").fill("word7-99")
    shown.locator("#found", has_text="500 of 10000 groups").wait_for()
    search_in = time.monotonic() - start
    print(f"{made.stat().st_size / 1e6:.1f} MB, open in {open_in:.1f} s, searched in {search_in:.1f} s")


def test_what_was_left_out_is_said(run, tmp_path, opened):
    copy = shutil.copytree(run, tmp_path / "r")
    rows = [json.loads(line) | {"left_out": n} for n, line in zip((2, 0, 1), (run / "metrics.jsonl").open())]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = opened(report.main(report.Config(runs=(copy,)))).locator("#head").text_content()
    assert "Left out: 2 questions of step 1, and some at 1 more steps" in head
    assert f"3 of {rows[0]['groups'] + 2} questions × " in head
