"""The command line of a script: its Config as flags in groups, and its errors in one line.

    if __name__ == "__main__":
        cli.launch(main, Config)

A group is a dataclass that the Config is made of, called by its name; fields of the Config itself come last. A
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
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from upt.errors import Broken, Elsewhere, Lost, RunsFailed, Stopped, UserError, suggest, trouble
from upt.run import presets, processes
from upt.run.team import leave
from upt.run.typed import flag, meant

DEBUG = "--debug"
BY_MAKE = "UPT_BY_MAKE"  # in the environment of a command that make gives: the variables that its target takes
VARIABLES = {  # of the Makefile, by the flag that they become
    f"--{name}": name.upper()
    for name in "data model reward advantage steps seed rewards seeds out run image gpus".split()
} | {"--benchmark": "BENCH"}


def launch(
    main: Callable,
    config_class: type,
    arguments: Sequence[str] | None = None,
    sort: Callable[[list], list] = list,
    finished: Callable[..., bool] = lambda config: False,
) -> None:
    """Run `main` on the Config that the command line gives; `sort` may rewrite its words first.

    `finished(config)`: there is so little left to do that one process does it, whatever --gpus says.
    """
    arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    debug, voice, ours = DEBUG in arguments, sys.stderr, processes.is_ours()
    quiet()
    if processes.rank():  # the first one speaks
        sys.stdout = sys.stderr = open(os.devnull, "w")
    processes.end_with_parent()
    try:
        config = parse(config_class, sort([word for word in arguments if word != DEBUG]))
        if getattr(config, "gpus", 1) > 1 and not processes.is_started():
            if not finished(config):
                raise SystemExit(processes.run(config.gpus, [sys.executable, *sys.orig_argv[1:]]))
            config.gpus = 1
        main(config)
    except Stopped as stopped:
        raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (Elsewhere, Broken) as error:
        if debug or not error.expected:
            print(error.trace, end="", file=sys.stderr)
        print(f"error: {one_line(error)}{of_make(str(error), config_class)}", file=sys.stderr)
        raise SystemExit(processes.TOLD if ours else 2 if error.expected else 1) from None
    except Lost as error:
        if debug:
            traceback.print_exc(file=voice)
        if not ours:  # else who started it says which one has ended
            print(f"error: {one_line(error)}", file=voice)
        raise SystemExit(processes.LOST if ours else 2) from None
    except (UserError, OSError, RunsFailed) as error:
        if debug:
            sys.stderr = voice
            raise
        print(f"error: {one_line(error)}{of_make(str(error), config_class)}", file=voice)
        raise SystemExit(1 if isinstance(error, RunsFailed) else 2) from None
    except Exception:
        sys.stderr = voice  # what nobody expected is told by whomever it happens to
        raise
    finally:
        leave()


def one_line(error: Exception) -> str:
    """What an error says, on one line; of an OSError where, and what to do."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, trouble(error)) if part)
    return " ".join(str(error).split())


def of_make(text: str, config_class: type) -> str:
    """ " (make: RUN is --run, others go into ARGS)" on a script's own flags in a message, where make has started it."""
    taken, known = os.environ.get(BY_MAKE, "").split(), flags_of(config_class)
    named = [name for name in dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) if taken and name in known]
    said = [f"{VARIABLES[name]} is {name}" for name in named if VARIABLES.get(name) in taken]
    said += ["others go into ARGS"] * (len(said) < len(named))
    return f" (make: {', '.join(said)})" if said else ""


def quiet() -> None:
    """Keep back what libraries say and a user can do nothing about. A level that the user has set wins."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
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
        raise UserError(explained(config_class, arguments, plain(said.getvalue()))) from None
    return config_class(**{f.name: getattr(g, f.name) for g in vars(found).values() for f in fields(g)})


def explained(config_class: type, arguments: Sequence[str], message: str) -> str:
    """What is wrong with the flag that a message of tyro's is about, in our words; else the message as it is."""
    hints, docs = get_type_hints(config_class), documented(config_class)
    flags = {flag(f.name): f for f in fields(config_class)}
    about = next((word for word in re.findall(r"--[\w-]+", message) if word in flags), None)
    if about is None and message.startswith("Required options"):
        needed = " and ".join(f.name for f in fields(config_class) if f.default is MISSING)
        return f"give {needed}; --help says what they are"
    if about is None:
        return message
    name = flags[about].name
    written = [word.replace("_", "-") if word.startswith("--") else word for word in arguments]
    if not any(word.split("=")[0] == about for word in written):
        return f"{about} is missing: {docs.get(name, '')}"
    at = next(i for i, word in enumerate(written) if word.split("=")[0] == about)
    value = arguments[at].partition("=")[2] or (arguments[at + 1] if at + 1 < len(arguments) else "")
    allowed = (hints[name], *get_args(hints[name]))
    choices = [str(choice) for kind in allowed if get_origin(kind) is Literal for choice in get_args(kind)]
    kinds = {int: "a whole number", float: "a number", Path: "a path"}
    wanted = [text for kind, text in kinds.items() if kind in allowed]
    expected = f"one of {', '.join(choices)}" if choices else wanted[0] if wanted else "a value"
    if not value or value.startswith("--"):
        return f"{about} needs {expected if expected == 'a value' else f'a value: {expected}'}"
    return f"{about} {value}: expected {expected}{suggest(value, choices)}"


def groups(config_class: type) -> list[type]:
    """A dataclass for each group of flags, in the order of --help."""
    hints, bare = get_type_hints(config_class, include_extras=True), get_type_hints(config_class)
    docs = documented(config_class)
    owners = [c for c in reversed(config_class.__mro__) if is_dataclass(c)]
    found: dict[str, list] = {owner.__name__: [] for owner in owners[:-1] if owner.__name__ != LAST} | {LAST: []}
    for f in fields(config_class):
        owner = next(c for c in owners if f.name in vars(c).get("__annotations__", ()))
        if not f.metadata.get("hidden"):
            own = f.name in vars(config_class).get("__annotations__", ())
            says = argument(f, bare[f.name], docs.get(f.name, ""), {} if own else TABLES)
            row = (f.name, Annotated[hints[f.name], says], default(f))
            found[LAST if owner is config_class else owner.__name__].append(row)
    return [make_dataclass(name.lower(), rows) for name, rows in found.items() if rows]


def argument(f, hint, doc: str, tables: dict[str, dict]):
    """What --help says of a field: its line, and the default that it really has; `tables` fill in what is None."""
    import tyro

    kinds = [kind.__name__.upper() for kind in get_args(hint) if kind in (int, float, str, Path)]
    found = {"metavar": kinds[0]} if NoneType in get_args(hint) and len(kinds) == 1 else {}
    if f.default is None and any(f.name in table for table in tables.values()):
        values = [(str(table.get(f.name, "the snapshot's own")), label) for label, table in tables.items()]
        same = len({value for value, _ in values}) == 1
        shown = values[0][0] if same else ", ".join(f"{value} {label}" for value, label in values)
        found["help_behavior_hint"] = f"(default: {shown})"
    return tyro.conf.arg(help=doc, **found)


LAST = "Run"  # the group that a Config's own fields belong to
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


def flags_of(config_class: type) -> set[str]:
    """The flags that --help shows."""
    shown = [f for f in fields(config_class) if not f.metadata.get("hidden")]
    negated = {f"--no-{f.name.replace('_', '-')}" for f in shown if isinstance(f.default, bool)}
    return {flag(f.name) for f in shown} | negated


def check_names(config_class: type, arguments: Sequence[str]) -> None:
    """Raise UserError for the first flag that is none, with the nearest one that is, or whose path is empty."""
    known, hints = flags_of(config_class) | {"--help", "-h"}, get_type_hints(config_class)
    paths = {flag(name) for name, hint in hints.items() if Path in (hint, *get_args(hint))}
    for word, after in zip(arguments, [*arguments[1:], None], strict=False):
        name = word.split("=")[0].replace("_", "-")
        if re.match(r"--[a-zA-Z]", word) and name not in known:
            raise UserError(f"{name} is no setting{meant(name, known) or '; --help lists them'}")
        if name in paths and (word.partition("=")[2] if "=" in word else after) == "":
            raise UserError(f"{name} is empty: give a path")  # of which Path makes the current folder


def plain(box: str) -> str:
    """The message of tyro's framed error, without frame, colours and the pointer to --help."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    kept = [line for line in lines if line.strip("- ") and not line.startswith(("For full helptext", "Parsing error"))]
    if kept and kept[-1].startswith("Unrecognized options:"):
        word = kept[-1].partition(":")[2].strip("- ")
        return f"{word}: settings are written --name value, and a value with blanks in quotes"
    return " ".join(kept) or "the command line can't be read; --help lists the settings"
