"""The page as one HTML file: markup, style, script and data in it, pictures beside it or, if wished, in it too.

It asks nothing of any server: a content policy in its head forbids it, and it opens from disk. Groups and held-out
answers lie in it packed, a part for each step, base64 of gzip of JSON, and are unpacked when they are looked at.
"""

import base64
import gzip
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from eval.report import collect
from upt.files import write_whole
from upt.run import records
from upt.run.cli import one_line

NAME = "report.html"
LIBRARIES = ("uPlot.iife.min.js", "katex.min.js")
SCRIPTS = (*LIBRARIES, "text.js", "view.js", "run.js", "curves.js", "groups.js", "changed.js", "start.js")
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


def at_end(run: Path) -> bool:
    """Write the page of a run that has ended, finished or not, or of the runs in a folder; whether it is there.

    What hinders it is said, and stops nothing.
    """
    try:
        runs = collect.named([run])
        write(runs, run / NAME, collect.title([run], runs), tables=collect.tables_in(run))
    except Exception as error:  # the run is worth more than its page
        print(f"no page on the run: {one_line(error)}", file=sys.stderr)
        return False
    return True


def place(paths: Sequence[Path]) -> Path:
    """Where the page on these folders goes by itself: into the only one, else into the one that all are in."""
    return (paths[0] if len(paths) == 1 else Path(os.path.relpath(collect.home(paths)))) / NAME


def write(
    runs: Mapping[Path, str],
    out: Path,
    title: str,
    embed: bool = False,
    refresh: int = 0,
    tables: Sequence[dict] = (),
    running: Collection[Path] = (),
) -> None:
    """Write the page on some runs, {folder: name}, to `out`, with `tables` on all of them, see `collect.tables_in`.

    `embed`: pictures in the page. `refresh`: it loads itself again after so many seconds. `running`: those of the runs
    that a process works on. Raises ShardError for a file of a run that cannot be read.
    """

    def chunks():
        head, tail = asset("page.html").split("<!-- data -->\n")
        for name, text in {
            "POLICY": POLICY,
            "TITLE": escape(title),
            "STYLE": asset("uPlot.min.css") + asset("page.css"),
        }.items():
            head = head.replace(f"<!-- {name} -->", text)
        yield head.encode()
        about = []
        for i, (run, name) in enumerate(runs.items()):
            found = collect.overview(run, name, run in running)
            home, shards, found["note"] = records.shards_of(run, found["config"])
            found["parts"] = [*shards]
            source = collect.picture(home, out, embed)
            for step, path in shards.items():
                yield part(f"groups-{i}-{step}", packed(collect.groups(path, source))).encode()
            rows = collect.changed(run, found["config"]["steps"], collect.picture(run / records.HELD_OUT, out, embed))
            found["answers"] = len(rows)
            yield part(f"answers-{i}", packed(rows)).encode()
            about.append(found)
        on_all = {"runs": about, "names": records.CURVES, "moves": records.MOVES, "tables": tables}
        if refresh:
            on_all |= {"refresh": refresh, "as_of": f"{datetime.now():%H:%M:%S}"}
        yield part("about", as_json(on_all), "application/json").encode()
        for name in SCRIPTS:
            yield f"<script>{asset(name)}</script>\n".encode()
        yield tail.encode()

    write_whole(out, chunks())
