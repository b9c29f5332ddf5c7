"""The option that an answer names, by its letter, by its text or by both."""

from functools import lru_cache
from string import ascii_uppercase

from upt.answers.closed_forms import number_key
from upt.answers.latex import MAX_CHARS, clean, text_key, tokenize
from upt.answers.structure import key_of

_LABEL_WORDS = set(
    "the correct final right option options choice choices answer answers is are 选项 选 故选 选择 答案".split()
)
_FILLER = _LABEL_WORDS | {*"()[]{}.:,;/&*+", r"\{", r"\}", "and", "or", "both", "等"}
_MARKS = (")", "]", ".", ":")  # behind a letter, they make it a label
_DASHES = ("-", ",", "=")


def choice_key(tokens: list[str], choices: tuple[str, ...], multi: bool) -> str | None:
    """The letter of the option that the tokens name; with `multi` the sorted letters; None if that is not clear."""
    letters = ascii_uppercase[: len(choices)]
    if len(tokens) == 1 and tokens[0] in tuple(letters):
        return tokens[0]
    options = _options(choices)
    # The exact text comes before other letters (an option may read "AC" or "a"), the key after (5 m and 5 cm share it).
    if exact := options.reads(tokens):
        return exact
    if found := only_letters(tokens, letters):
        return found if multi or len(found) == 1 else None
    return _labelled(tokens, letters, options) or options.means(tokens)


def only_letters(tokens: list[str], letters: str = ascii_uppercase) -> str:
    """Sorted option letters of an answer that names nothing else (B, (b), Option B, A and C, AC), else ''."""
    named = [token for token in tokens if token.casefold() not in _FILLER]
    if len(named) == 1 and named[0].isupper() and len(set(named[0])) == len(named[0]):
        named = list(named[0])
    known = all(len(name) == 1 and name.upper() in letters for name in named)
    return "".join(sorted({name.upper() for name in named})) if known else ""


class _Options:
    """Texts and keys of a question's options; a label of the own ("B. 5" in second place) is no part of them."""

    def __init__(self, choices: tuple[str, ...]):
        tokens = [tokenize(clean(option)[:MAX_CHARS]) for option in choices]
        tokens = [_label(t, letter)[1] for t, letter in zip(tokens, ascii_uppercase, strict=False)]
        self.texts = [text_key(t) for t in tokens]
        # Where all options are numbers with units, a single letter behind one is a unit too.
        quantities = [number_key(t, letters=True) for t in tokens]
        self.quantities = all(quantities)
        self.keys = quantities if self.quantities else [key_of(t) for t in tokens]

    def reads(self, tokens: list[str]) -> str:
        """Letter of the option with this very text."""
        text = text_key(tokens)
        return ascii_uppercase[self.texts.index(text)] if text and text in self.texts else ""

    def means(self, tokens: list[str]) -> str | None:
        """Letter of the only option with this key, or None."""
        key = (self.quantities and number_key(tokens, letters=True)) or key_of(tokens)
        return ascii_uppercase[self.keys.index(key)] if key and self.keys.count(key) == 1 else None

    def fits(self, tokens: list[str]) -> str | None:
        return self.reads(tokens) or self.means(tokens)


@lru_cache(maxsize=1024)
def _options(choices: tuple[str, ...]) -> _Options:
    return _Options(choices)


def _label(tokens: list[str], letters: str) -> tuple[str, list[str]]:
    """Letter and text of `B. text`, `(B) text`, `B: text`, `Option B text`; ('', tokens) if no label leads."""
    start = next((i for i, token in enumerate(tokens) if token.casefold() not in _LABEL_WORDS | {":"}), 0)
    bracket = tokens[start : start + 1] in (["("], ["["])
    letter, *rest = tokens[start + bracket :] or [""]
    marked = bool(rest) and (rest[0] in _MARKS or rest[0][0] == ".")  # B.5: the dot went to the number
    while rest and rest[0] in _MARKS:
        del rest[0]
    if len(letter) != 1 or letter.upper() not in letters or not (marked or (start and not bracket)):
        return "", tokens
    return ("", tokens) if rest and rest[0].casefold() in ("and", "or", "&", ",", "=") else (letter.upper(), rest)


def _labelled(tokens: list[str], letters: str, options: _Options) -> str:
    """The letter that leads or ends an answer, if what stands beside it does not speak for another option."""
    if label := _label(tokens, letters)[0]:
        return label
    first, *rest = tokens or [""]
    if first in letters and first and rest:  # A 5 cm, A - 5 cm, A (5 cm)
        rest = rest[rest[0] in _DASHES :]
        bracketed = rest[:1] == ["("] and rest[-1] == ")"
        meant = options.fits(rest[1:-1] if bracketed else rest)
        return first if meant == first or (bracketed and meant is None) else ""
    if len(tokens) > 3 and tokens[-3] in ("(", "[") and tokens[-1] in (")", "]") and tokens[-2] in letters:  # 5 cm (A)
        return tokens[-2] if options.fits(tokens[:-3]) == tokens[-2] else ""
    return ""
