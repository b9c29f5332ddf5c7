"""README and docs: links lead somewhere, commands have flags that exist, what README shows of Python runs."""

import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import ablate
import rewards
from kernels.advantage import ADVANTAGES
from upt.run import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPT = re.compile(r"(?:^|\s)python (?:-m )?([\w./]+)((?: [^#`\n]*)?)")
NAMES = "train_upt rollout judge rewards synthesize warmup ablate export report ask check_data".split()
NAMES += [f"eval.{name}" for name in ("run", "runs", "score", "compare", "heldout", "synthetic")]
NAMES += [
    f"bench.{name}"
    for name in ("studies", "front_page", "judging", "kernels", "loop", "fullsize", "threads", "estimate")
]
CONFIGS = {name: importlib.import_module(name).Config for name in NAMES}
INDENTED = re.compile(r"(?:^    .*\n(?:\n(?=    ))*)+", re.M)


def test_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
        if target and not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]*)\)", text):
        if not target.startswith("http"):
            there = (page.parent / target if target else page).read_text()
            heads = [re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in headings(there)]
            assert anchor in heads, f"{target}#{anchor}"


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", text, re.M)


@pytest.mark.parametrize("page", ["README.md", "docs/rewards.md"])
def test_every_reward_and_its_settings_are_in_the_table(page):
    rows = [line.split("|")[1:-1] for line in (ROOT / page).read_text().splitlines() if line.startswith("| `")]
    found = {name: row for row in rows for name in re.findall(r"`([\w-]+)(?:\(.*?\))?`", row[0])}
    assert {*rewards.REWARDS} <= {*found}
    if page == "docs/rewards.md":
        assert {*ADVANTAGES} <= {*found}
        text = (ROOT / page).read_text()
        for name, function in {**rewards.REWARDS, **ADVANTAGES}.items():
            named = text if name == "judged" else found[name][-1]  # its settings take a paragraph
            assert all(setting in named for setting in [*inspect.signature(function).parameters][1:]), name


def test_every_page_is_reached_from_readme():
    named = set(re.findall(r"\(docs/([\w.]+)\)", (ROOT / "README.md").read_text()))
    assert {page.name for page in PAGES[1:]} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_flags_that_exist(page):
    for script, rest in SCRIPT.findall(page.read_text().replace("\\\n", " ")):
        config = CONFIGS.get(script.removesuffix(".py").replace("/", "."))
        if config and config is not ablate.Config:  # which passes flags on
            cli.check_names(config, re.findall(r"--[a-z][\w-]*", rest))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page):
    known = {f"--{f.name.replace('_', '-')}" for config in CONFIGS.values() for f in fields(config)}
    named = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())}
    others = {"--debug", "--help", "--repo-type", "--local-dir", "--multi-gpu", "--num-processes"}
    assert named <= known | others, named - known


def test_readme_notebook_runs_as_written(tiny, tmp_path, monkeypatch):
    blocks = [dedented(block) for block in INDENTED.findall((ROOT / "README.md").read_text())]
    (code,) = [block for block in blocks if "sys.path.insert" in block]
    small = f"model={tiny!r}, questions_per_step=2, group_size=2, max_new_tokens=4, eval_questions=0, lora_rank=2, "
    code = code.replace("path/to/upt", str(ROOT)).replace("Config(steps=4, ", f"Config(steps=1, {small}")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "runs/a/adapter").is_dir() and (tmp_path / "runs/b/summary.json").is_file()


def test_readme_reward_of_ones_own_runs_as_written(tmp_path):
    from tests.test_shards import make_group

    blocks = [dedented(block) for block in INDENTED.findall((ROOT / "README.md").read_text())]
    (code,) = [block for block in blocks if block.startswith("# mine.py")]
    (tmp_path / "mine.py").write_text(code.split("\nmake ")[0])
    assert rewards.reward(make_group(keys="aab"), f"{tmp_path}/mine.py:shy(power=3)") == pytest.approx(
        [8 / 27, 8 / 27, 1 / 27]
    )


def dedented(block: str) -> str:
    return re.sub(r"^    ", "", block, flags=re.M)


def test_there_is_one_version_of_trl():
    """The one that the tests install, and the example's."""
    (pinned,) = re.findall(r"^trl(==[\d.]+)$", (ROOT / "requirements-bench.txt").read_text(), re.M)
    for name in ("README.md", "train.py"):
        assert f'"trl[vllm]{pinned}"' in (ROOT / "examples/trl_multinode" / name).read_text()
