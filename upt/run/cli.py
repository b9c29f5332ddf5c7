"""The command line of a script: its Config as flags in groups, and its errors in one line.

    if __name__ == "__main__":
        cli.launch(main, Config)

A group is a dataclass that the Config is made of, called by its docstring; fields of the Config itself come last. A
mistake of the user's (errors.py), a file that can't be read or written, or a bad flag prints `error: …` and exits with
2, a run that was stopped with 128 + the signal. `--debug` shows the traceback.
"""

import ast
import contextlib
import inspect
import io
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from typing import Annotated, get_type_hints

from upt.errors import RunsFailed, Stopped, UserError, suggest
from upt.run import presets

DEBUG = "--debug"


def launch(main: Callable, config_class: type, arguments: Sequence[str] | None = None) -> None:
    """Run `main` on the Config that the command line gives."""
    arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    debug = DEBUG in arguments
    quiet()
    try:
        main(parse(config_class, [word for word in arguments if word != DEBUG]))
    except Stopped as stopped:
        raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, OSError, RunsFailed) as error:
        if debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, RunsFailed) else 2) from None


def one_line(error: Exception) -> str:
    """What an error says, on one line; of an OSError also where."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def quiet() -> None:
    """Keep back what libraries say and a user can do nothing about. A level that the user has set wins."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)


# ------------------------------------------------------------------------------------------------ flags of a Config


def parse(config_class: type, arguments: Sequence[str]):
    """The Config that these arguments give. Raises UserError for one that can't be read; `--help` prints and exits."""
    import tyro

    parser = make_dataclass("Arguments", [(g.__name__, g) for g in groups(config_class)])
    description = inspect.getdoc(sys.modules[config_class.__module__]) or ""
    said = io.StringIO()
    check_names(config_class, arguments)
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(
                parser,
                args=arguments,
                description=f"{description.partition(chr(10))[0]} (--debug shows where an error comes from.)",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(plain(said.getvalue())) from None
    return config_class(**{f.name: getattr(g, f.name) for g in vars(found).values() for f in fields(g)})


def groups(config_class: type) -> list[type]:
    """A dataclass for each group of flags, in the order of --help."""
    hints, docs = get_type_hints(config_class, include_extras=True), documented(config_class)
    owners = [c for c in reversed(config_class.__mro__) if is_dataclass(c)]
    found: dict[str, list] = {owner.__doc__: [] for owner in owners[:-1] if owner.__doc__ != LAST} | {LAST: []}
    for f in fields(config_class):
        owner = next(c for c in owners if f.name in vars(c).get("__annotations__", ()))
        if not f.metadata.get("hidden"):
            row = (f.name, Annotated[hints[f.name], argument(f, docs.get(f.name, ""))], default(f))
            found[LAST if owner is config_class else owner.__doc__].append(row)
    return [make_dataclass(title.replace(" ", "_"), rows) for title, rows in found.items() if rows]


def argument(f, doc: str):
    """What --help says of a field: its line, and the default that it really has."""
    import tyro

    known = [(label, table[f.name]) for label, table in TABLES.items() if f.name in table]
    if f.default is None and known:
        values = {repr(value) for _, value in known}
        shown = ", ".join(f"{value} {label}" for label, value in known)
        return tyro.conf.arg(help=doc, help_behavior_hint=f"(default: {known[0][1] if len(values) == 1 else shown})")
    return tyro.conf.arg(help=doc)


LAST = "run"  # the group that a Config's own fields belong to
TABLES = {"with the tiny model": presets.TINY, "with others": presets.REAL}


def default(f):
    """A field with the default of another."""
    if f.default_factory is not MISSING:
        return field(default_factory=f.default_factory)
    return field() if f.default is MISSING else field(default=f.default)


def documented(config_class: type) -> dict[str, str]:
    """The string under each field of a Config and of the classes that it is made of."""
    found = {}
    for owner in reversed(config_class.__mro__):
        if is_dataclass(owner):
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
            for this, after in zip(body, body[1:], strict=False):
                if isinstance(this, ast.AnnAssign) and isinstance(after, ast.Expr):
                    found[this.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


def check_names(config_class: type, arguments: Sequence[str]) -> None:
    """Raise UserError for the first flag that is none, with the nearest one that is."""
    known = {f"--{f.name.replace('_', '-')}" for f in fields(config_class) if not f.metadata.get("hidden")}
    known |= {f"--no-{flag[2:]}" for flag in known} | {"--help", "-h"}
    for word in arguments:
        name = word.split("=")[0].replace("_", "-")
        if re.match(r"--[a-zA-Z]", word) and name not in known:
            near = suggest(name, known)
            raise UserError(f"{name} is no setting{near or '; --help lists them'}")


def plain(box: str) -> str:
    """The message of tyro's framed error, without frame, colours and the pointer to --help."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("For full helptext", "Parsing error"))]
    return " ".join(kept) or "the command line can't be read; --help lists the settings"
