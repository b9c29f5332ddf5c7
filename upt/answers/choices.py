"""The option that an answer names, by its letter, by its text or by both."""

import re
from functools import lru_cache
from string import ascii_uppercase

from upt.answers.closed_forms import unit_of
from upt.answers.latex import MAX_CHARS, clean, text_key, tokenize
from upt.answers.structure import key_of, parts_of, quantity_key
from upt.answers.units import measure

_LABEL_WORDS = {"the", "correct", "final", "right", "option", "options", "choice", "choices", "answer", "answers"}
_CHINESE = re.compile("[本题应该因此所以故则正确选择项是为的答案有都]+")
_FILLER = (
    _LABEL_WORDS
    | {"it", "therefore", "so", "thus", "hence", "i", "choose", "select", "only"}
    | {*"()[]{}.:,;/&*+|'", r"\{", r"\}", "and", "or", "both", "等", "以及"}
)
_SAID = {"correct", "right", "answer", "answers", "option", "options", "it"}  # beside these, "is" says nothing more
_DENIED = {"not", "no", "incorrect", "wrong", "false", "rejected", "neither", "nor", "except", "不", "错误", "错"}
_MARKS = (")", "]", ".", ":")  # behind a letter, they make it a label
_DASHES = ("-", ",", "=")
_TEN = ascii_uppercase[:10]  # where the options are not known


def choice_key(tokens: list[str], choices: tuple[str, ...], multi: bool) -> str | None:
    """The letter of the option that the tokens name; with `multi` the sorted letters; None if that is not clear."""
    letters = ascii_uppercase[: len(choices)]
    if tokens[:1] == ["<"] and tokens[-1] == ">":
        tokens = tokens[1:-1]
    if len(tokens) == 1 and tokens[0] in tuple(letters):
        return tokens[0]
    options = _options(choices)
    # The exact text comes before other letters (an option may read "AC" or "a"), the key after (5 m and 5 cm share it).
    if exact := options.reads(tokens):
        return exact
    if found := only_letters(tokens, letters):
        return found if len(found) == 1 or (multi and "or" not in tokens) else None
    labelled = _labelled(tokens, letters, options)
    if labelled is not None:
        return labelled if len(labelled) == 1 or (multi and labelled) else None
    if multi and len(parts := parts_of(tokens)) > 1:
        named = [options.fits(part) for part in parts]
        return "".join(sorted(set(named))) if all(named) else None
    return options.means(tokens)


def only_letters(tokens: list[str], letters: str = _TEN) -> str:
    """Sorted option letters of an answer that names nothing else (B, (b), Option B, A and C, AC), else ''."""
    said = _SAID & {token.casefold() for token in tokens}
    named = [token for token in tokens if not (_is_filler(token) or (said and token.casefold() in ("is", "are")))]
    if len(named) == 1 and named[0].isupper() and len(set(named[0])) == len(named[0]):
        named = list(named[0])
    known = all(len(name) == 1 and name.upper() in letters for name in named)
    return "".join(sorted({name.upper() for name in named})) if known else ""


def _is_filler(token: str) -> bool:
    return token.casefold() in _FILLER or _CHINESE.fullmatch(token) is not None


class _Options:
    """Texts and keys of a question's options; a label of their own ("B. 5" in second place) is no part of them."""

    def __init__(self, choices: tuple[str, ...]):
        tokens = [tokenize(clean(option)[:MAX_CHARS]) for option in choices]
        tokens = [_label(t, letter)[1] for t, letter in zip(tokens, ascii_uppercase, strict=False)]
        self.texts = [text_key(t) for t in tokens]
        keys, quantities = [key_of(t) for t in tokens], [quantity_key(t) for t in tokens]
        # Where all options are numbers with units, some of them a single letter, a letter is a unit in answers too.
        self.quantities = all(quantities) and quantities != keys
        self.keys = quantities if self.quantities else keys
        self.units = [measure(unit_of(t)) for t in tokens]

    def reads(self, tokens: list[str]) -> str:
        """Letter of the option with this very text."""
        text = text_key(tokens)
        return ascii_uppercase[self.texts.index(text)] if text and text in self.texts else ""

    def means(self, tokens: list[str]) -> str | None:
        """Letter of the only option with this key, and not of another measure; None without one."""
        key = (self.quantities and quantity_key(tokens)) or key_of(tokens)
        if not key or self.keys.count(key) != 1:
            return None
        place = self.keys.index(key)
        units = {measure(unit_of(tokens)), self.units[place]} - {""}
        return ascii_uppercase[place] if len(units) < 2 else None

    def fits(self, tokens: list[str]) -> str | None:
        return self.reads(tokens) or self.means(tokens)


@lru_cache(maxsize=1024)
def _options(choices: tuple[str, ...]) -> _Options:
    return _Options(choices)


def _label(tokens: list[str], letters: str) -> tuple[str, list[str]]:
    """Letter and text of `B. text`, `(B) text`, `B: text`, `Option B text`; ('', tokens) if no label leads."""
    leads = (t.casefold() in _LABEL_WORDS | {":"} or _CHINESE.fullmatch(t) for t in tokens)
    start = next((i for i, leading in enumerate(leads) if not leading), 0)
    bracket = tokens[start : start + 1] in (["("], ["["])
    letter, *rest = tokens[start + bracket :] or [""]
    marked = bool(rest) and (rest[0] in _MARKS or rest[0][0] == ".")  # B.5: the dot went to the number
    while rest and (rest[0] in _MARKS or _CHINESE.fullmatch(rest[0])):
        del rest[0]
    if len(letter) != 1 or letter.upper() not in letters or not (marked or (start and not bracket)):
        return "", tokens
    return ("", tokens) if rest and rest[0].casefold() in ("and", "or", "&") else (letter.upper(), rest)


def _labelled(tokens: list[str], letters: str, options: _Options) -> str | None:
    """The letters that label what an answer says: `B. text`, `B (text)`, `text (B)`, `A. text, C. text`.

    "" if it says no to them, or one of the texts is another option's; None where there is no label.
    """
    if found := _several_labels(tokens, letters):
        texts = [(letter, options.fits(text)) for letter, text in found]
        undecided = any(text[-1:] == ["or"] for _, text in found)
        denied = undecided or _DENIED & {token.casefold() for token in tokens}
        agree = all(meant in (None, letter) for letter, meant in texts)
        return "".join(sorted(dict(found))) if agree and not denied else ""
    label, rest = _label(tokens, letters)
    sure = bool(label)
    first = tokens[0] if tokens else ""
    if not label and first in tuple(letters) and len(tokens) > 1:  # A 5 cm, A - 5 cm, A (5 cm)
        label, rest = first, tokens[1:]
        rest = rest[rest[0] in _DASHES :]
        sure = tokens[1] == "(" and tokens[-1] == ")"
    end = tokens[-2:-1] if tokens[-1:] in ([")"], ["]"]) else tokens[-1:] if tokens[-2:-1] == [","] else []
    if not label and len(tokens) > 2 and end and end[0] in tuple(letters):  # 5 cm (A); 5 cm, A
        label, rest = end[0], tokens[: -3 if tokens[-1] in (")", "]") else -2]
    if not label:
        return None
    if rest[:1] == ["("] and rest[-1] == ")":
        rest = rest[1:-1]
    meant = options.fits(rest) if rest else label
    if meant is None:
        denied = _DENIED & {token.casefold() for token in rest}
        return "" if denied else label if sure else None
    return label if meant == label else ""


def _several_labels(tokens: list[str], letters: str) -> list[tuple[str, list[str]]]:
    """Letter and text of each of `A. 5, C. 15` or `(A) 5 (C) 15`; none where there are fewer than two labels."""
    starts = []  # (place of the label, place behind it, letter)
    for i, token in enumerate(tokens):
        bracketed = i > 0 and tokens[i - 1] in ("(", "[")
        behind = tokens[i + 1 : i + 2]
        closed = bool(behind) and (behind[0] in ((")", "]") if bracketed else (".", ":", ")")) or behind == ["("])
        glued = bool(behind) and behind[0][0] == "." and len(behind[0]) > 1
        if token in tuple(letters) and (closed or glued):
            starts.append((i - bracketed, i + 1 + (not glued and behind != ["("]), token))
    if len({letter for *_, letter in starts}) < 2 or starts[0][0] > 0:
        return []
    ends = [place for place, *_ in starts[1:]] + [len(tokens)]
    found = []
    for (_, begin, letter), end in zip(starts, ends, strict=True):
        text = tokens[begin:end]
        while text and text[-1] in (",", ";", "and", ":"):
            text.pop()
        found.append((letter, text[1:-1] if text[:1] == ["("] and text[-1] == ")" else text))
    return found
