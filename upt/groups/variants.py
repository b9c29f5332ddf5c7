"""Named variants: a spec such as "judged(lam_pos=.4,t_h=.9)" -> a function and its settings, checked at start-up.

    name                       a row of the table: REWARDS or ADVANTAGES
    name(setting=value,...)    with settings, which are the function's keyword arguments; values are Python literals
    my/rewards.py:name(x=.1)   the same from a file of your own, which needs no row

A setting must be like its default (a number, a bool, a string) and as its annotation says, where that is a Literal or
has a range (upt/ranges.py). Whatever is wrong with a spec is a SettingError here, before a model is loaded.
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin

from upt.errors import SettingError, suggest
from upt.ranges import Amount, Share, outside, range_of

COMMON = {"lam_fmt": 0.0, "clip": False, "min_share": 0.0, "max_share": 1.0}  # settings that every reward has
KINDS = {"lam_fmt": Amount, "min_share": Share, "max_share": Share}

_SPEC = re.compile(r"\s*((?:[^()'\"]+\.py:)?[^\W\d][\w-]*)\s*(?:\((.*)\))?\s*", re.DOTALL)
_PIECE = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|.", re.DOTALL)  # a quoted string or one character


def parse_variant(spec: str) -> tuple[str, dict]:
    """ "gated-frequency(threshold=.9,lam_fmt=.5)" -> ("gated-frequency", {"threshold": 0.9, "lam_fmt": 0.5}).

    Syntax only, the same for rewards and advantages. Of "my.py:name(x=.1)" the name is "my.py:name".
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise SettingError(
            f"{spec!r} is no variant; write name, name(setting=value,...) or FILE.py:name(setting=value,...), "
            "e.g. 'majority(lam_fmt=.5)'"
        )
    try:
        call = ast.parse(f"f({(match[2] or '').strip()})", mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise SettingError(f"{spec!r}: cannot read its settings ({error}); write name(setting=value,...)") from error
    keywords = call.keywords if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else [None]
    names = {keyword and keyword.arg for keyword in keywords}
    if None in names or call.args or len(names) < len(keywords):
        raise SettingError(f"{spec!r}: each setting needs its name, once; write name(setting=value,...)")
    settings = {}
    for keyword in keywords:
        try:
            settings[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError) as error:
            value = ast.unparse(keyword.value)
            raise SettingError(f"{spec!r}: {keyword.arg}={value} is no number or quoted string") from error
    return match[1].strip(), settings


def is_from_file(spec: str) -> bool:
    """Whether a variant is a function in a file of the user's."""
    return ":" in parse_variant(spec)[0]


def split_variants(text: str) -> list[str]:
    """ "majority,judged(lam_pos=.4,t_h=.9) random" -> ["majority", "judged(lam_pos=.4,t_h=.9)", "random"].

    Commas and white space part specs, unless they stand in parentheses or quotes.
    """
    parts, depth = [""], 0
    for piece in _PIECE.findall(text):
        if piece in ("'", '"'):
            raise SettingError(f"{text!r}: a quote {piece} is not closed")
        depth += (piece == "(") - (piece == ")")
        if depth < 0:
            raise SettingError(f"{text!r}: a ) has no ( before it")
        if depth == 0 and (piece == "," or piece.isspace()):
            parts.append("")
        else:
            parts[-1] += piece
    if depth:
        raise SettingError(f"{text!r}: a ( is not closed")
    return [part for part in parts if part]


@functools.cache
def _execute(path: Path, mtime_ns: int) -> ModuleType:
    """The module in a file. `mtime_ns` is part of the cache's key: an edited file is executed again."""
    name = f"_variants_{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        # Compiled here because exec_module caches bytecode by the second: of two edits in one it would miss the later.
        exec(spec.loader.source_to_code(path.read_bytes(), str(path)), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise SettingError(f"{path} fails to import: {type(error).__name__}: {error}") from error
    return module


def _from_file(path: Path, name: str) -> Callable:
    if not path.is_file():
        raise SettingError(f"{path}: no such file; write the path from {Path.cwd()}, or an absolute one")
    module = _execute(path.resolve(), path.stat().st_mtime_ns)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        public = [key for key in own if inspect.isfunction(getattr(module, key)) and not key.startswith("_")]
        raise SettingError(f"{path} has no function {name!r}; it has: {', '.join(public) or 'none'}")
    function = getattr(module, name)
    if not callable(function):
        raise SettingError(f"{path}: {name} is {function!r:.60}, expected a function")
    return function


def find(kind: str, table: dict[str, Callable], spec: str) -> Callable:
    """The function that a spec names, in `table` or in a file; `kind` is what messages call it ("reward")."""
    name = parse_variant(spec)[0]
    path, _, function = name.rpartition(":")
    if path:
        return _from_file(Path(path).expanduser(), function)
    if name not in table:
        near, known = suggest(name, table), ", ".join(table)
        raise SettingError(f"no {kind} is called {name!r}{near}; there are: {known}; one of your own: FILE.py:NAME")
    return table[name]


def source_digest(spec: str) -> str | None:
    """SHA-256 of the file that a spec takes its function from; None for a row of the table."""
    path = parse_variant(spec)[0].rpartition(":")[0]
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest() if path else None


def code_digest(function: Callable) -> str:
    """SHA-256 of what a function does: of its code and defaults, not of where it is written."""

    def of(code) -> list:
        constants = [of(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]
        return [code.co_code.hex(), code.co_names, constants]

    said = [of(function.__code__), repr(function.__defaults__), repr(function.__kwdefaults__)]
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _expected(value, default, annotation) -> str | None:
    """What a setting should have been; None if `value` is that."""
    if get_origin(annotation) is Literal:
        legal = get_args(annotation)
        return None if value in legal else " or ".join(map(repr, legal))
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "True or False"
    if range := range_of(annotation):
        kind, word = (int, "a whole number") if get_args(annotation)[0] is int else (int | float, "a number")
        number = isinstance(value, kind) and not isinstance(value, bool)
        return None if number and not outside(value, annotation) else f"{word} {range}"
    if isinstance(default, int | float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        return None if number else f"the like of {default!r}"
    return None if not isinstance(default, str) or isinstance(value, str) else f"the like of {default!r}"


def bind(
    kind: str, table: dict[str, Callable], spec: str, settings: dict, common: dict | None = None
) -> tuple[Callable, dict]:
    """The function that `spec` names and its settings in full: defaults, `settings`, and those inline in the spec.

    `common`: settings that every function of the table has, and their defaults, which a function may declare anew.
    """
    function, inline = find(kind, table, spec), parse_variant(spec)[1]
    named = [
        p for p in inspect.signature(function).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if not named:
        raise SettingError(f"{kind} {spec!r} takes no argument, expected the group or the rewards as its first")
    own = {p.name: p for p in named[1:]}
    known = (common or {}) | {name: p.default for name, p in own.items()}
    for setting, value in [*settings.items(), *inline.items()]:
        if setting not in known:
            near = suggest(setting, known)
            raise SettingError(
                f"{kind} {spec!r} has no setting {setting!r}{near}; it has: {', '.join(known) or 'none'}"
            )
        if expected := _expected(
            value, known[setting], own[setting].annotation if setting in own else KINDS.get(setting)
        ):
            raise SettingError(f"{kind} {spec!r}: {setting} is {value!r}, expected {expected}")
    if twice := sorted({*settings} & {*inline}):
        raise SettingError(f"{kind} {spec!r}: {', '.join(twice)} given inline and as an argument; give it once")
    bound = known | settings | inline
    if missing := [name for name, value in bound.items() if value is inspect.Parameter.empty]:
        raise SettingError(f"{kind} {spec!r} needs the setting {missing[0]!r}, which has no default")
    return function, bound


def finite(values, size: int, what: str) -> list[float]:
    """What a variant returned, as floats; SettingError unless they are `size` finite numbers."""
    try:
        values = [*map(float, values)]
    except (TypeError, ValueError) as error:
        raise SettingError(f"{what}: {values!r:.200}, expected {size} finite numbers ({error})") from error
    if len(values) != size or not all(map(math.isfinite, values)):
        raise SettingError(f"{what}: {values!r:.200}, expected {size} finite numbers")
    return values


def band(config) -> dict[str, float]:
    """min_share and max_share of a Config where they are given, so that those inline in its reward hold otherwise."""
    return {name: getattr(config, name) for name in ("min_share", "max_share") if getattr(config, name) != COMMON[name]}
