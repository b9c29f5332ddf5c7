"""The page as one HTML file: markup, style, script and data in it, pictures beside it or, if wished, in it too.

It asks nothing of any server: a content policy in its head forbids it, and it opens from disk. Groups and held-out
answers lie in it packed, a part for each step, base64 of gzip of JSON, and are unpacked when they are looked at.
"""

import base64
import gzip
import json
import os
import sys
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from eval import heldout
from eval.report import collect
from upt.files import write_whole
from upt.groups import shards
from upt.run.cli import one_line

NAME = "report.html"
POLICY = "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def asset(name: str) -> str:
    return files("eval.report").joinpath("assets", name).read_text("utf-8")


def as_json(value) -> str:
    """JSON that no HTML parser takes for a tag: `<` is escaped, and with it `</script>` and `<!--`."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def packed(value) -> str:
    """Base64 of gzip of JSON. The time is left out, so that the same run gives the same page."""
    return base64.b64encode(gzip.compress(json.dumps(value, separators=(",", ":")).encode("ascii"), mtime=0)).decode()


def part(name: str, text: str, kind: str = "text/plain") -> str:
    return f'<script type="{kind}" id="{name}">{text}</script>\n'


def label(run: Path) -> str:
    """A run's name: its path from here, or that of its folder where it lies elsewhere."""
    here = os.path.relpath(run)
    return run.name if here.startswith("..") else here


def at_end(run: Path) -> bool:
    """Write the page of a run that has ended; whether it is there. What hinders it is said, and stops nothing."""
    try:
        write(collect.runs_in(run), run / NAME)
    except Exception as error:  # the run is worth more than its page
        print(f"no page on the run: {one_line(error)}", file=sys.stderr)
        return False
    return True


def place(paths: Sequence[Path]) -> Path:
    """Where the page on these folders goes by itself: into the only one, else into the one that all are in."""
    if len(paths) == 1:
        return paths[0] / NAME
    return Path(os.path.relpath(os.path.commonpath([path.absolute().parent for path in paths]))) / NAME


def write(
    runs: Sequence[Path], out: Path, embed: bool = False, refresh: int = 0, tables: Sequence[list[list[str]]] = ()
) -> None:
    """Write the page on some runs to `out`, with `tables` on all of them, rows of cells with the head first.

    `embed`: pictures in the page. `refresh`: it loads itself again after so many seconds. Raises ShardError for a file
    of a run that cannot be read.
    """
    runs = [run.absolute() for run in runs]
    shared = Path(os.path.commonpath([run.parent for run in runs]))
    names = [str(run.relative_to(shared)) if len(runs) > 1 else label(run) for run in runs]

    def chunks():
        title = escape(names[0] if len(runs) == 1 else f"{shared.name}: {len(runs)} runs")
        again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
        head, tail = asset("page.html").split("<!-- data -->\n")
        for name, text in {
            "POLICY": POLICY,
            "TITLE": title,
            "REFRESH": again,
            "STYLE": asset("uPlot.min.css") + asset("page.css"),
        }.items():
            head = head.replace(f"<!-- {name} -->", text)
        yield head.encode()
        about = []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            found = collect.overview(run, name)
            source = collect.picture(run / "rollouts", out, embed)
            found["parts"] = []
            for path in shards.list_shards(run / "rollouts"):
                step = int(path.stem.removeprefix("step-"))
                found["parts"].append(step)
                yield part(f"groups-{i}-{step}", packed(collect.groups(path, source))).encode()
            rows = collect.changed(run, collect.picture(run / heldout.FOLDER, out, embed))
            found["answers"] = len(rows)
            yield part(f"answers-{i}", packed(rows)).encode()
            about.append(found)
        yield part(
            "about", as_json({"runs": about, "names": collect.CURVES, "tables": tables}), "application/json"
        ).encode()
        for name in ("uPlot.iife.min.js", "katex.min.js", "page.js"):
            yield f"<script>{asset(name)}</script>\n".encode()
        yield tail.encode()

    write_whole(out, chunks())
