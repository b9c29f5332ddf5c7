"""A run in a notebook: its numbers as tables, its curves, single groups and held-out questions with their pictures.

    from upt import show
    show.metrics("runs/train")                     # a row a step
    show.curves("runs/a", "runs/b")
    show.group("runs/train", step=3, index=0)      # question, picture, responses, votes, rewards
    show.changed("runs/train")                     # held-out questions that training made right, or wrong
    show.compare("runs/a", "runs/b")               # held-out scores before and after

Tables are pandas', figures matplotlib's. A whole page on a run: report.py.
"""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from upt.errors import SettingError, ShardError, suggest_path
from upt.files import known_json
from upt.groups import manifests, shards
from upt.groups.votes import counts, majority_key
from upt.run import records

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from PIL.Image import Image

CURVES = tuple(records.CURVES)[:6]
SCORES = ("mean", "greedy", "maj", "pass", "length", "entropy", "majority_share", "abstentions")
CHARACTERS = 2000  # of a text that are shown
SHORT = 160  # of a name, a key
OPTIONS = 26  # of a question


class Html:
    """What a notebook shows as HTML, and everything else as text."""

    def __init__(self, html: str, text: str):
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return printable(self.text)


def metrics(run: Path | str) -> "DataFrame":
    """metrics.jsonl as a table, a row a step; nested values as `seconds.rollout`. Raises SettingError for no run."""
    import pandas

    rows = records.steps(folder_of(run))
    return pandas.json_normalize(rows).set_index("step") if rows else pandas.DataFrame()


def curves(*runs: Path | str, names: Sequence[str] = CURVES, smooth: int = 1) -> "Figure":
    """Curves of some metrics by step, a panel each and a line a run; `smooth`: means of the last so many steps."""
    tables = {str(run): metrics(run) for run in runs}
    there = [name for name in names if any(name in table and table[name].notna().any() for table in tables.values())]
    if not there:
        known = sorted({name for table in tables.values() for name in table})
        raise SettingError(f"none of {', '.join(names)} was measured; there are {', '.join(known) or 'no steps yet'}")
    figure = figure_of(figsize=(4 * min(len(there), 3), 2.6 * -(-len(there) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(there) // 3), min(len(there), 3), squeeze=False).flat
    for name, axes in zip(there, panels):
        for label, table in tables.items():
            if name in table:
                table[name].rolling(smooth, min_periods=1).mean().plot(ax=axes, label=label)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    for axes in list(panels):
        axes.set_visible(False)
    if len(tables) > 1:
        figure.axes[0].legend(fontsize="small")
    return figure


def group(run: Path | str, step: int = 0, index: int = 0, uid: str | None = None) -> Html:
    """A group of a run or of a folder of shards: the one at `index` of a step, or the one with a uid."""
    folder, steps = steps_of(run)
    if step not in steps:
        ends = [shards.shard_path("", at).stem for at in (min(steps), max(steps))] if steps else []
        there = f"there are {' to '.join(ends)}" if ends else "there are none"
        raise ShardError(f"{shards.shard_path(folder, step)}: no such shard; {there}{suggest_path(run)}")
    path = steps[step]
    groups = shards.read_shard(path)
    found = [g for g in groups if g["uid"] == uid] if uid is not None else groups[index : index + 1]
    if not found:
        named = f"uid {uid!r}" if uid is not None else f"index {index}"
        raise SettingError(f"{path}: no group of {named} among its {len(groups)}")
    return shown(found[0], folder)


def shown(group: dict, folder: Path | str | None = None) -> Html:
    """A group record as a card; `folder` is where its picture lies."""
    votes, majority = counts(group), majority_key(group)
    ordered = sorted(votes.items(), key=lambda pair: -pair[1])
    said = [part for key, count in ordered for part in (", ", f"{count} × ", shorter(key, SHORT))][1:] or ["no answer"]
    facts = ["votes: ", *said]
    if group["gold"] is not None:
        facts += ["; gold: ", shorter(group["gold"], SHORT)]
    judged = any("judge" in r for r in group["responses"])
    head = ["response", "answer", *(name for name in ("reward", "advantage") if name in group["responses"][0])]
    head += ["judge"] * judged
    rows = []
    for r in group["responses"]:
        row = [shorter(r["text"]), shorter(r["key"], SHORT) if r["key"] is not None else "–"]
        row += [f"{r[name]:+.3f}" for name in ("reward", "advantage") if name in r]
        row += [judged_as(r.get("judge"))] * judged
        rows.append((row, r["key"] is not None and r["key"] == majority))
    picture = picture_of(folder, group["image"])
    html = card(group["uid"], group["question"], group["choices"], picture, table(head, rows), facts)
    asked = shorter(group["uid"], SHORT), shorter(group["question"])
    return Html(html, "\n".join([*asked, "".join(facts), *(" | ".join(row) for row, _ in rows)]))


def changed(run: Path | str, what: str = "gained", limit: int = 5) -> Html:
    """Held-out questions by what became of their greedy answers: gained, lost, kept (right) or missed (wrong)."""
    if what not in records.MOVES:
        raise SettingError(f"{what!r}: expected one of {', '.join(records.MOVES)}")
    folder = folder_of(run)
    before, after = (records.answers(folder / f"{name}.json") for name in ("before", "after"))
    both = [(old, after[uid]) for uid, old in before.items() if uid in after]
    if not both:
        raise SettingError(f"{folder}: no held-out answers before and after; give a finished run with --eval-questions")
    pairs = [pair for pair in both if records.move(*pair)]
    if not pairs:
        raise SettingError(
            f"{folder}: its {len(both)} held-out questions have no gold, so none is right or wrong; their answers are "
            f"on the page that python report.py {folder} makes"
        )
    found = [pair for pair in pairs if records.move(*pair) == what]
    cards, texts = [], []
    for old, new in found[:limit]:
        rows = [
            ([name, shorter(row["responses"][0]["text"])], False) for name, row in (("before", old), ("after", new))
        ]
        picture = picture_of(folder / records.HELD_OUT, new["image"] or old["image"])
        asked = old["uid"], old["question"], old["choices"]
        cards.append(card(*asked, picture, table(["", "greedy answer"], rows), ["gold: ", shorter(old["gold"], SHORT)]))
        named = shorter(old["uid"], SHORT), shorter(old["question"])
        texts.append("\n".join([*named, *(" | ".join(row) for row, _ in rows)]))
    head = f"{what}: {len(found)} of {len(pairs)} held-out questions" + (f", the first {limit}" * (len(found) > limit))
    return Html(f"<p>{head}</p>{''.join(cards)}", "\n\n".join([head, *texts]))


def compare(*runs: Path | str) -> "DataFrame":
    """Held-out scores, a row a run: before, after and gain of each; shares from 0 to 1."""
    import pandas

    rows = {}
    for run in runs:
        folder = folder_of(run)
        before, after = (known_json(folder / f"{name}.json") or {} for name in ("before", "after"))
        rows[str(run)] = {
            (score, when): value
            for score in SCORES
            if score in before and score in after
            for when, value in (
                ("before", before[score]["value"]),
                ("after", after[score]["value"]),
                ("gain", after[score]["value"] - before[score]["value"]),
            )
        }
    table = pandas.DataFrame.from_dict(rows, orient="index")
    if len(table.columns):
        table.columns = pandas.MultiIndex.from_tuples(table.columns)
    return table


# --------------------------------------------------------------------------------------------------------------- pieces


def figure_of(**options) -> "Figure":
    """An empty figure that a notebook shows by itself, without pyplot and what it keeps open."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png", dpi=80)
            return buffer.getvalue()

    return Shown(**options)


def folder_of(run: Path | str) -> Path:
    folder = Path(run).expanduser()
    if not (folder / "manifest.json").is_file():
        raise SettingError(f"{folder}: no run there; give the folder that was its --out{suggest_path(folder)}")
    return folder


def steps_of(run: Path | str) -> tuple[Path, dict[int, Path]]:
    """Where the groups of a run, or of a folder of shards, lie, and the shard of each step."""
    if (Path(run) / "manifest.json").is_file() and (manifest := manifests.read(run))["stage"] == "train":
        return records.shards_of(Path(run).absolute(), manifest["config"])[:2]
    folder = shards.stage_folder(run)
    return folder, records.by_step(folder)


def judged_as(judge: dict | None) -> str:
    return "–" if judge is None or judge["score"] is None else f"{judge['score']:.2f}"


def printable(text: str) -> str:
    """Text of models and data as a terminal may have it: control characters but line breaks and tabs are escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def shorter(text: str, most: int = CHARACTERS) -> str:
    """The start and the end of a long text."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def isolated(text: str) -> str:
    """Text of models and data as HTML: no markup, and what turns its direction ends with it."""
    return f"<bdi>{escape(text.encode('utf-8', 'replace').decode())}</bdi>"  # half a surrogate pair is no character


def picture_of(folder: Path | str | None, relative: str | None) -> str:
    """The picture of a record as HTML; empty if there is none."""
    if folder is None or relative is None or not (Path(folder) / relative).is_file():
        return ""
    return embedded(shards.open_image(folder, relative))


def embedded(image: "Image | None") -> str:
    """An <img> that holds a picture, enlarged where it is tiny."""
    if image is None:
        return ""
    small = "image-rendering:pixelated;" if max(image.size) <= 160 else ""
    return f'<img alt="the question\'s picture" style="{small}width:12rem" src="{source_of(image)}">'


def source_of(image: "Image") -> str:
    """A picture as the address of an <img>."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]]) -> str:
    """Rows of cells; those that are marked stand out."""
    style = 'style="text-align:left;white-space:pre-wrap;vertical-align:top"'
    cells = "".join(f"<th {style}>{escape(name)}</th>" for name in head)
    lines = []
    for row, marked in rows:
        parts = (f"<b>{isolated(cell)}</b>" if marked else isolated(cell) for cell in row)
        lines.append("<tr>" + "".join(f"<td {style}>{part}</td>" for part in parts) + "</tr>")
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def card(uid: str, question: str, choices: Sequence[str] | None, picture: str, body: str, facts: Sequence[str]) -> str:
    """A question as HTML: `facts` is a line about it in pieces, of ours and of others; `body` goes over its width."""
    options = "".join(f"<li>{isolated(shorter(choice))}</li>" for choice in (choices or ())[:OPTIONS])
    asked = f"<p>{isolated(shorter(question))}</p>" + (f'<ol type="A">{options}</ol>' if options else "")
    left = f"<div>{picture}</div>" if picture else ""
    said = "".join(isolated(shorter(fact)) for fact in facts)
    right = f"<div><b>{isolated(shorter(uid, SHORT))}</b>{asked}<p>{said}</p></div>"
    return f'<div style="margin:1em 0"><div style="display:flex;gap:1.5em">{left}{right}</div>{body}</div>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }}
body {{ overflow-wrap: anywhere }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, said: Sequence[str], cards: Sequence[str]) -> str:
    """Some lines and cards as an HTML page that asks nothing of any server."""
    body = "\n".join([*(f"<p>{isolated(line)}</p>" for line in said), *cards])
    return PAGE.format(title=escape(title), body=body)
