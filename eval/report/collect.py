"""What the page shows of a run, from the files in its folder, as plain data.

A run in the making has what it has written so far. Groups are a part by themselves for each step, since there may be
very many: the page unpacks a part when it is looked at.
"""

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from eval import heldout
from upt import show
from upt.answers import answer_key
from upt.errors import SettingError, ShardError, suggest_path
from upt.files import known_json, read_json
from upt.groups import manifests, shards
from upt.groups.stats import FEW_NOTE, counted
from upt.groups.votes import abstentions, majority_key, majority_share
from upt.run import health, records

SPLIT = 0.5  # up to this share of its most frequent answer a group is split


def runs_in(path: Path) -> list[Path]:
    """The folder of a run, or those of the runs in it, as ablate.py leaves them. Raises SettingError for neither."""
    found = own_runs(path)
    if not found:
        inside = sorted({*path.glob("*"), *path.glob("*/seed-*")})
        found = [run for folder in inside for run in own_runs(folder)]
    if found:
        return found
    raise SettingError(f"{path}: no run of train_upt.py there; give the folder that was its --out{suggest_path(path)}")


def own_runs(folder: Path) -> list[Path]:
    """The folder of a run, of one in rounds those of its rounds; none for what is no run."""
    rounds = [inside for inside in sorted(folder.glob("round-*/run")) if is_run(inside)]
    return rounds or [folder] * is_run(folder)


def whole(run: Path) -> Path:
    """The folder that was a run's --out: of a round, that of all rounds."""
    return run.parents[1] if run.match("round-*/run") and is_run(run.parents[1]) else run


def home(paths: Sequence[Path]) -> Path:
    """The only one of some paths, or the folder that all of them are in."""
    several = [os.path.abspath(path if len(paths) == 1 else path.absolute().parent) for path in paths]
    return Path(os.path.commonpath(several))


def named(paths: Sequence[Path]) -> dict[Path, str]:
    """The runs in some paths, {folder: name}. Names stay when more runs come: they are relative to `home`."""
    runs = [Path(os.path.abspath(run)) for path in paths for run in runs_in(path)]
    return {run: label(run) if run == home(paths) else as_text(run.relative_to(home(paths))) for run in runs}


def title(paths: Sequence[Path], runs: Mapping[Path, str]) -> str:
    """What the page on the runs in some paths is called."""
    if [*runs] == [home(paths)]:
        return label(home(paths))
    return f"{as_text(home(paths).name)}: {len(runs)} run{'s' * (len(runs) > 1)}"


def label(run: Path) -> str:
    """A folder's path from here, or its name alone where it lies elsewhere or is here."""
    here = os.path.relpath(run)
    return as_text(run.name if here == "." or here.startswith("..") else here)


def as_text(path: Path | str) -> str:
    """A path that may be shown and be part of an address: bytes that are no text are written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_run(path: Path) -> bool:
    """Whether a folder is that of a training run."""
    try:
        return manifests.read(path)["stage"] == "train"
    except ShardError:  # none, or one that cannot be read
        return False


def tables_in(path: Path) -> list[dict]:
    """The tables of table.md in a folder of runs, as ablate.py writes it: {"title", "rows" of cells}, head first."""
    file, found, title = path / "table.md", [{"rows": []}], ""
    for line in file.read_text("utf-8", errors="replace").splitlines() if file.is_file() else ():
        if not line.startswith("|"):
            title = line.lstrip("# ") if line.startswith("#") else title
            found.append({"title": title, "rows": []})
        elif not set(line) <= set("|-: "):
            found[-1]["rows"].append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return [table for table in found if table["rows"]]


def overview(folder: Path, name: str, running: bool = False) -> dict:
    """Everything about a run but its groups and its held-out answers. `running`: a process works on it."""
    manifest, summary = read_json(folder / "manifest.json"), known_json(folder / "summary.json")
    config, rows, end = manifest["config"], records.steps(folder), (summary or {}).get("end", {})
    seconds = (summary or {}).get("seconds") or _added(row.get("seconds", {}) for row in rows)
    done, where = rows[-1]["step"] + 1 if rows else 0, shlex.quote(os.path.relpath(folder))
    scores, after = latest(folder, config["steps"])
    compared = table(known_json(folder / "before.json"), known_json(scores))
    return {
        "name": name,
        "variant": re.sub(r"(^|/)seed-\d+$", "", name) or config["reward"],
        "config": config,
        "begun": f"{datetime.fromtimestamp(manifests.begun(folder)):%Y-%m-%d %H:%M}",
        "machine": manifest.get("machine"),
        "versions": {name: version for name, version in manifest.get("versions", {}).items() if version},
        "state": ended(end, config["steps"]) if summary else unfinished(rows, config["steps"], running),
        "finished": summary is not None,
        "running": running and summary is None,
        "steps": done,
        "seconds": seconds,
        "command": f"python train_upt.py --resume --out {shlex.quote(os.path.relpath(whole(folder)))}",
        "again": f'python -m eval.heldout --run {where}\npython ask.py --run {where} --image PICTURE "…"',
        "alarms": {row["step"]: row["alarms"] for row in rows if row.get("alarms")},
        "left_out": {row["step"]: row["left_out"] for row in rows if row.get("left_out")},
        "asked": max((row["groups"] + row.get("left_out", 0) for row in rows if "groups" in row), default=None),
        "curves": curves(rows),
        "held_out": held_out_scores(folder, rows, end.get("steps", config["steps"])),
        "after": after,
        "table": compared,
        "note_on_scores": FEW_NOTE if any("*" in row["questions"] for row in compared) else "",
    }


def _added(several: Iterator[dict[str, float]]) -> dict[str, float]:
    total = Counter()
    for seconds in several:
        total.update(seconds)
    return dict(total)


def curves(rows: list[dict]) -> dict:
    """{"step": […], name: […]} over the steps that were not left out; "seconds NAME" of each stage."""
    rows = [row for row in rows if row.get("groups")]
    stages = sorted({stage for row in rows for stage in row.get("seconds", ())})
    found = {name: [row.get(name) for row in rows] for name in records.CURVES}
    found |= {f"seconds {stage}": [row.get("seconds", {}).get(stage) for row in rows] for stage in stages}
    kept = {name: values for name, values in found.items() if any(value is not None for value in values)}
    return {"step": [row["step"] for row in rows]} | kept


def unfinished(rows: list[dict], planned: int, running: bool) -> str:
    """How far a run is that is not finished, by the lines of its steps."""
    if not rows:
        return "before its first step" + " now" * running
    done = f"step {rows[-1]['step'] + 1} of {planned}"
    if running:
        return f"running, {done} is made"
    why = ": its updates were not finite" if health.has_diverged(rows) else ""
    return f"stopped after {done}{why}"


def ended(end: dict, planned: int) -> str:
    """How a run has ended, by its summary."""
    made = end.get("steps", planned)
    said = "finished" if made == planned else f"ended after {made} of {planned} steps"
    chosen = end.get("adapter_step", made)
    return said if chosen == made else f"{said}, with the adapter after {chosen}"


def held_out_scores(folder: Path, rows: list[dict], steps: int) -> dict:
    """{score: [[steps made, value], …]} of the evaluations so far; the last one is after `steps`."""
    found: dict[str, list] = {}
    at = [(0, {k: v["value"] for k, v in _scores(folder / "before.json").items()})]
    at += [(row["step"], row["held_out"]) for row in rows if row.get("held_out")]
    at += [(steps, {k: v["value"] for k, v in _scores(folder / "after.json").items()})]
    for steps, scores in at:
        for name in heldout.GOLD_METRICS:
            if name in scores:
                found.setdefault(name, []).append([steps, scores[name]])
    return found


def _scores(path: Path) -> dict[str, dict]:
    found = known_json(path) or {}
    return {name: found[name] for name in heldout.NAMES if name in found}


def latest(folder: Path, planned: int) -> tuple[Path, str]:
    """The file of a run's last held-out scores, and after how many of the planned steps they are; "" for none yet."""
    path, during = folder / "after.json", sorted((folder / records.HELD_OUT).glob("step-[0-9]*.json"))
    if path.is_file() or not during:
        return path, "after" * path.is_file()
    return during[-1], f"after {int(during[-1].stem.removeprefix('step-'))} of {planned} steps"


def table(before: dict | None, after: dict | None) -> list[dict]:
    """Scores before and after with their intervals, and the paired difference once both are there."""
    rows = []
    for name in heldout.NAMES if before else ():
        if name in before:
            questions = counted(before["graded" if name in heldout.GOLD_METRICS else "questions"])
            row = {"name": name, "questions": questions, "before": heldout.cell(before[name], name)}
            if after and name in after:
                row["after"] = heldout.cell(after[name], name)
                row["difference"] = heldout.cell(heldout.difference(before, after, name), name, "+")
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------------- groups


def picture(folder: Path, page: Path, embed: bool) -> Callable[[str | None], str | None]:
    """From the name of a picture in `folder` to what the page's <img> has as source."""

    def source(relative: str | None) -> str | None:
        if relative is None:
            return None
        if not embed:
            return quote(os.fsencode(os.path.relpath(folder / relative, page.parent)))
        return show.source_of(shards.open_image(folder, relative))

    return source


def groups(path: Path, source: Callable[[str | None], str | None]) -> list[dict]:
    """The groups of a shard: what can be read of them, and by which they are found."""
    return [shown(group, source) for group in shards.read_shard(path)]


def shown(group: dict, source: Callable[[str | None], str | None]) -> dict:
    """One group: question, picture, responses with key, reward, advantage and judgement, and what is noteworthy."""
    gold = None if group["gold"] is None else answer_key(group["gold"], group["choices"])
    majority = majority_key(group)
    responses = [
        {
            "text": r["text"],
            "key": r["key"],
            "tokens": len(r["token_ids"]),
            "cut": r["finish"] == "length",
            "right": None if gold is None else r["key"] == gold,
        }
        | {name: r[name] for name in ("reward", "advantage", "judge", "view") if r.get(name) is not None}
        for r in group["responses"]
    ]
    return {
        "uid": group["uid"],
        "question": group["question"],
        "choices": group["choices"],
        "gold": group["gold"],
        "image": source(group["image"]),
        "majority": majority,
        "share": majority_share(group),
        "flags": flags(group, gold, majority),
        "responses": responses,
    }


def flags(group: dict, gold: str | None, majority: str | None) -> list[str]:
    """What one may want to look for: see FLAGS in assets/groups.js."""
    responses, found = group["responses"], []
    if gold is not None and majority not in (None, gold):
        found.append("wrong")
    if majority_share(group) <= SPLIT:
        found.append("split")
    if group.get("skipped"):
        found.append("skipped")
    if abstentions(group):
        found.append("abstained")
    if any(r["finish"] == "length" for r in responses):
        found.append("cut")
    graded = [r for r in responses if r.get("judge") and r["judge"]["score"] is not None]
    top = max((r["judge"]["score"] for r in graded), default=None)
    if majority is not None and graded and majority not in [r["key"] for r in graded if r["judge"]["score"] == top]:
        found.append("judge")
    return found


# ------------------------------------------------------------------------------------------------------------- held out


def changed(folder: Path, planned: int, source: Callable[[str | None], str | None]) -> list[dict]:
    """Held-out questions with their answers before and after; of a run in the making, after its last evaluation."""
    before, after = (records.answers(path) for path in (folder / "before.json", latest(folder, planned)[0]))
    return [
        {
            "uid": uid,
            "kind": old["kind"],
            "question": old["question"],
            "choices": old["choices"],
            "gold": old["gold"],
            "image": source(new["image"] or old["image"]),
            "before": old["responses"],
            "after": new["responses"],
        }
        for uid, old in before.items()
        if (new := after.get(uid))
    ]
