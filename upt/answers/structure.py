"""What an answer is made of: several values, an inequality, an equation, a tuple, a matrix, or one quantity."""

import re

from upt.answers.algebra import algebra_key, split_products
from upt.answers.closed_forms import MAX_DEPTH, number_key, unit_of
from upt.answers.latex import is_number, text_key
from upt.answers.units import are_units, is_unit

_OPENING, _CLOSING = ("(", "[", "{", r"\{", r"\begin"), (")", "]", "}", r"\}", r"\end")
_EQUALS = ("=", r"\approx", r"\in")
_ORDERS = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}  # read from the other side
_NOT_IN_NAMES = re.compile(
    r"[0-9+\-*/^<>!|&:]|\\(?:frac|sqrt|pi|pm|le|ge|ne|infty|cup|cap|ln|log|lg|exp|lfloor|lceil|begin|not|neg|notin"
    r"|\{|\\)(?![A-Za-z])"
    r"|\\?\b(?:arc)?(?:sin|cos|tan|cot|sec|csc) (?:[a-z]|\\(?:theta|alpha|beta|phi))(?: |$)"  # says nothing of x
    r"|\b(?:ln|log|lg|exp|max|min) "
)
_NUMBERED = re.compile(r"_ \{[^{}]*\}|(?<=\\angle) [0-9]+")  # x_{1}, \angle 1
_ROOT = re.compile(r"x _ \{ [12] \}")
_DENIALS = {"not", "no", "never", "without", "不", "没有", "不是", "非"}
_SIBLINGS = ("abcd", "xyz", "mn", "pq", "uvw", "ijk")  # letters that a relation is between
_COMPUTED = (*(rf"\{name}" for name in "log ln lg sin cos tan cot sec csc binom".split()), "!", "|")
_MATRICES = ("matrix", "pmatrix", "bmatrix", "smallmatrix", "array")


def key_of(tokens: list[str], depth: int = 0) -> str | None:
    """Key of an answer without choices, None for one of no content."""
    if not tokens or depth > MAX_DEPTH:
        return text_key(tokens)
    for read in (_several, _ordered, _equal, _enclosed, _matrix, _union, _point, _either_sign):
        if key := read(tokens, depth + 1):
            return key
    return _quantity(tokens) or text_key(tokens)


def parts_of(tokens: list[str]) -> list[list[str]]:
    """What stands between commas, semicolons and "and"; empty parts are left out."""
    return [part for part in _split(tokens, (",", ";", "and"))[0] if part]


def symbols_of(tokens: list[str]) -> set[str] | None:
    """The letters of an answer that is one expression; None for words, names, lists, relations and what is unclear."""
    unclear = {",", ";", ":", "and", "or", "_", "'", *_EQUALS, *_ORDERS} - {"_" if r"\log" in tokens else ""}
    if unclear & {*tokens} or _is_name(tokens) or _is_dashed(tokens):
        return None
    if not _quantity(tokens) and not {*_COMPUTED} & {*tokens}:
        return None
    letters = {token for token in split_products(tokens) if token.isalpha() and not is_unit(token)}
    folded = {letter.casefold() for letter in letters}
    if len(folded) < len(letters) or any(len(letter) > 1 or letter == "f" for letter in letters):
        return None
    return letters | {"°"} if {*_COMPUTED} & {*tokens} and "°" in tokens else letters


def quantity_key(tokens: list[str]) -> str | None:
    """Key of a number with units, of which a single letter may be one."""
    return None if _is_dashed(tokens) or _numbered(tokens) else number_key(tokens, letters=True)


def _quantity(tokens: list[str]) -> str | None:
    """Key of a number or formula with its units."""
    return None if _is_dashed(tokens) else number_key(tokens) or algebra_key(tokens)


def _is_dashed(tokens: list[str]) -> bool:
    """True for what dashes join without a difference: 3-5 may be a range or a score, 3-1-2 an order, A-B-C a way.

    Three numbers and more with slashes between them are a date.
    """
    plain = [token for token in tokens if token != "°"]
    plain = plain[plain[:1] == ["-"] :]
    joint = "".join(plain[1:2])
    count = next((i for i, t in enumerate(plain) if (t != joint if i % 2 else not is_number(t))), len(plain))
    if joint in ("-", "/") and count > (2 if joint == "-" else 4) and are_units(plain[count:]):
        return True
    names = all(name.isalpha() and name.isupper() for name in plain[::2])
    return names and len(plain) > 4 and {*plain[1::2]} == {"-"}


# ---- several values


def _several(tokens: list[str], depth: int) -> str | None:
    """2, 3; x=2 or x=3; x_1=2, x_2=3: the set of the values. x=1, y=2: a value for each name."""
    if numbers := _numbered(tokens):
        return _set_key(numbers)  # (1)(3): statements
    parts, joints = _split(tokens, (",", ";", "and", "or"))
    if {",", ";"} <= {*joints}:  # x=1,2; y=3,4
        parts, joints = _split(tokens, (";",))
    parts = [part for part, joint in zip(parts, [*joints, ""], strict=True) if part or joint not in ("and", "or")]
    if len(parts) < 2 or not all(parts):
        return None
    if parts[0][0].casefold() in ("both", "either") and len(parts[0]) > 1:
        del parts[0][0]
    if len({unit for unit in map(unit_of, parts) if unit}) > 1:
        return None  # 2 hours and 30 minutes are one time
    names = [_unknown(part, len(parts)) for part in parts]
    if "or" in joints and len({*names} - {None}) > 1:  # x=1, y=2 or x=3, y=4; x=1 or y=2
        cases = [case for case in _split(tokens, ("or",))[0] if case]
        keys = [key_of(case, depth) or "" for case in cases]
        if len(cases) < len(parts):
            return _set_key(keys)
        return " or ".join(sorted(f"{name}={key}" if name else key for name, key in zip(names, keys, strict=True)))
    keys = [key for part in parts for key in (_both_signs(part) or [key_of(part, depth) or ""])]
    if len(set(names)) > 1 and None not in names:
        return _assigned(names, keys) if len(keys) == len(parts) else None
    joint = "or" if "or" in joints else "and" if "and" in joints else ","
    if any(map(_is_name, parts)):  # the order of names or words may be the answer
        listed = {",", ";"} & {*joints}
        return ", ".join(keys) + " or" * (joint == "or") if listed else f" {joint} ".join(sorted(keys))
    if any(len(_split(part, tuple(_ORDERS))[0]) > 1 for part in parts):
        return f" {joint} ".join(sorted(keys)).replace(" , ", ", ")
    return _set_key([*dict.fromkeys(keys)] if joint == "or" else keys)


def _numbered(tokens: list[str]) -> list[str]:
    """The numbers of (1)(3)(4), where there are two or more."""
    groups = [tokens[i : i + 3] for i in range(0, len(tokens), 3)]
    found = len(groups) > 1 and all(len(g) == 3 and g[0] == "(" and g[2] == ")" and g[1].isdecimal() for g in groups)
    return [group[1] for group in groups] if found else []


def _assigned(names: list[str], keys: list[str]) -> str:
    """Values in the order of their names; of x, y and z without these, for they are a point."""
    pairs = sorted(zip(names, keys, strict=True))
    if [name for name, _ in pairs] in (["x", "y"], ["x", "y", "z"]):
        return f"({', '.join(key for _, key in pairs)})"
    pairs = pairs if len(set(names)) == len(names) else [*zip(names, keys, strict=True)]
    return ", ".join(f"{name.replace(' ', '')}={key}" for name, key in pairs)


def _set_key(keys: list[str]) -> str:
    if len(set(keys)) == len(keys) > 1:
        return f"{{{', '.join(sorted(keys))}}}"
    return ", ".join(sorted(keys))


def _unknown(tokens: list[str], count: int = 1) -> str | None:
    """The name of which `name = value` says the value; of x_{1} and x_{2}, where these are two, x: they are roots."""
    if _point(tokens, MAX_DEPTH):
        return tokens[tokens[0] == "点"]
    sides, _ = _split(tokens, ("=",))
    if len(sides) < 2 or not _is_name(sides[0]):
        return None
    name = " ".join(sides[0])
    return "x" if count == 2 and _ROOT.fullmatch(name) else name


def _either_sign(tokens: list[str], depth: int) -> str | None:
    keys = _both_signs(tokens)
    return _set_key(keys) if keys else None


def _both_signs(tokens: list[str]) -> list[str]:
    """The two values of 1 ± 2, one of ± 0; none where there is no ±, or no value."""
    if tokens.count(r"\pm") != 1:
        return []
    at = tokens.index(r"\pm")
    keys = {_quantity([*tokens[:at], sign, *tokens[at + 1 :]]) for sign in "+-"}
    return [] if None in keys else sorted(keys)


# ---- relations


def _ordered(tokens: list[str], depth: int) -> str | None:
    """x > 3 and 3 < x are one inequality."""
    sides, relations = _split(tokens, tuple(_ORDERS))
    if len(sides) < 2 or not all(sides):
        return None
    keys = [key_of(side, depth) or "" for side in sides]
    if {*relations} <= {">", r"\ge"} or ({*relations} == {r"\ne"} and keys != sorted(keys)):
        keys, relations = keys[::-1], [_ORDERS[relation] for relation in relations[::-1]]
    return keys[0] + "".join(f" {relation} {key}" for relation, key in zip(relations, keys[1:], strict=True))


def _equal(tokens: list[str], depth: int) -> str | None:
    """The value in x = 5, f(2) = 5, S = 2·3 = 6, ≈ 5; an equation that says more, as AB = CD, by its sides."""
    sides, relations = _split(tokens, _EQUALS)
    if len(sides) > 1 and not sides[0]:
        return key_of(sides[1], depth) if len(sides) == 2 else None
    if len(sides) < 2 or not all(sides):
        return None
    if len(sides) == 2 and all(map(_is_bracket, sides)):  # (x, y) = (1, 2)
        names, parts = (_split(side[1:-1], (",", ";"))[0] for side in sides)
        if len(names) == len(parts) > 1 and all(map(_is_name, names)):
            return _assigned([" ".join(name) for name in names], [key_of(part, depth) or "" for part in parts])
    named = next((i for i, side in enumerate(sides[:-1]) if not _is_name(side)), len(sides) - 1)
    values = [number_key(side) for side in sides[named:]]
    if values[0] and (len(set(values)) == 1 or relations[named] == r"\approx"):
        return values[0]  # 1/2 = 0.5; the exact value of \sqrt{2} \approx 1.41
    if named == len(sides) - 1 and _names(sides[0], sides[-1]):
        return key_of(sides[-1], depth)
    if len(sides) == 2 and values[0] and _is_name(sides[1]):
        return values[0]  # 5 = x
    if {*relations} == {"="}:
        return "=".join(sorted(key_of(side, depth) or "" for side in sides))
    return None


def _is_name(tokens: list[str]) -> bool:
    r"""True for x, f(2), S_{1}, \angle ABC, the area: what a person writes in front of "= 5"."""
    applied = 1 + (tokens[1:2] == ["'"])
    if tokens and tokens[0] in tuple("fghFGHPE") and _is_bracket(tokens[applied:]):
        return True
    name = _NUMBERED.sub("", " ".join(tokens))
    if _NOT_IN_NAMES.search(name) or _DENIALS & {token.casefold() for token in tokens}:
        return False
    words = name.split()
    product = split_products(words) != words or sum(len(w) == 1 or w.isupper() for w in words if w.isalpha()) > 1
    return any(c.isalpha() for c in name) and not (product and _are_letters(words))  # xy = 6 is a curve


def _names(name: list[str], value: list[str]) -> bool:
    """Whether `name = value` only gives its value a name: x = 5 and S = πr², but not AB = CD or a = 2b."""
    symbols = {token for token in value if token[0] == "\\" or token.isalpha()} - {r"\frac", r"\sqrt", r"\pi", r"\pm"}
    if not symbols or _is_bracket(value) or _is_wordy(value):
        return True
    if _is_name(value):
        return False
    if "(" in name or "_" in name or _is_wordy(name):  # f(x), a_{n}, the area
        return True
    if len(name) > 1 or name[0].isupper():  # \angle A, AB, S
        return not any(symbol.isupper() or symbol in (r"\angle", r"\triangle") for symbol in symbols)
    siblings = next((group for group in _SIBLINGS if name[0] in group), name[0])
    return name[0] == "y" or (len(name[0]) == 1 and not {*"".join(symbols)} & {*siblings})


def _are_letters(tokens: list[str]) -> bool:
    """Whether tokens are letters and names of segments alone, not the area of ABC or m\\angle A."""
    return all(len(token) <= 3 or token.isupper() for token in tokens) and r"\angle" not in tokens


def _is_wordy(tokens: list[str]) -> bool:
    return any(len(token) > 2 and token.isalpha() and not token.isupper() for token in tokens)


# ---- brackets


def _enclosed(tokens: list[str], depth: int) -> str | None:
    if tokens[0] not in _OPENING[:4] or not _is_bracket(tokens):
        return None
    parts, _ = _split(tokens[1:-1], (",", ";"))
    if tokens[0] == r"\{" and all(map(_unknown, parts)) and len(parts) > 1:
        return _several(tokens[1:-1], depth)
    keys = [key_of(part, depth) or "" for part in parts]
    if tokens[0] == r"\{" or (tokens[0] == "{" and len(parts) > 1):
        return "{" + ", ".join(sorted(set(keys))) + "}"
    if len(parts) > 1 and all(parts):
        return tokens[0] + ", ".join(keys) + tokens[-1]
    return keys[0] if tokens[0] in "({" or tokens[1] == r"\begin" else None


def _matrix(tokens: list[str], depth: int) -> str | None:
    r"""A matrix by its cells, whatever brackets it is set in; rows of a system of equations are several values."""
    system = tokens[:2] == [r"\{", r"\begin"]
    tokens = tokens[system:]
    name = tokens[2] if tokens[0] == r"\begin" and len(tokens) > 8 else ""
    if not name or tokens[-4:] != [r"\end", "{", name, "}"] or tokens.count(r"\begin") > 1:
        return None
    body = tokens[4:-4]
    if name == "array" and body[0] == "{":
        body = body[body.index("}") + 1 :] if "}" in body else []
    rows = [row[: -1 if row[-1] in (",", ";", ".") else None] for row in _split(body, ("\\\\",))[0] if row]
    if (name == "cases" or system) and "&" not in body:
        return key_of([token for row in rows for token in (*row, ",")][:-1], depth)
    name = "matrix" if name in _MATRICES else name
    cells = [" & ".join(key_of(cell, depth) or "" for cell in _split(row, ("&",))[0]) for row in rows]
    return rf"\begin{{{name}}}" + r" \\ ".join(cells) + rf"\end{{{name}}}"


def _union(tokens: list[str], depth: int) -> str | None:
    parts, _ = _split(tokens, (r"\cup",))
    return r" \cup ".join(sorted(key_of(part, depth) or "" for part in parts)) if len(parts) > 1 else None


def _point(tokens: list[str], depth: int) -> str | None:
    """(1, 2) in A(1, 2) and 点A(1, 2)."""
    tokens = tokens[tokens[:1] == ["点"] :]
    start = 1 + (tokens[1:2] == ["'"])
    named = len(tokens) > 5 and len(tokens[0]) == 1 and tokens[0].isupper() and _is_bracket(tokens[start:])
    if not named or tokens[start] != "(" or not any(map(is_number, tokens)):
        return None
    return key_of(tokens[start:], depth) if len(_split(tokens[start + 1 : -1], (",",))[0]) > 1 else None


def _split(tokens: list[str], separators: tuple[str, ...]) -> tuple[list[list[str]], list[str]]:
    """Parts between the separators that stand in no bracket, and these separators."""
    parts, found, depth = [[]], [], 0
    for token in tokens:
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0 and token in separators:
            found.append(token)
            parts.append([])
        else:
            parts[-1].append(token)
    return parts, found


def _is_bracket(tokens: list[str]) -> bool:
    """True if the first token's bracket closes with the last, whatever their kinds: [1, 2) is an interval."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth <= 0:
            return 0 < i == len(tokens) - 1
    return False
