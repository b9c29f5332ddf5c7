"""Gold answers: the answer in a cell, and which option it means. For evaluation and diagnostics, never for training.

With options a gold is a letter, an option's text, an option's own label, or its number. Whether whole numbers are
numbers of options, from 0 or from 1, is decided over all golds of the set, in all its splits:

    numbers     nearly all golds are whole and within 0 … n options, and at most half of these are an option's text;
                from 0 if one is 0, from 1 if one is n
    texts       nearly all golds name an option otherwise
    an error    neither, both bases or none: nothing is guessed
"""

import re
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

from upt.answers import answer_key, extract_answer
from upt.data import chat
from upt.data.choices import Options, lettered
from upt.data.columns import is_nothing, unwritten
from upt.errors import DataError

NEARLY, HALF = 0.9, 0.5  # shares of the golds
_KEYS = ("ground_truth", "answer", "value", "text", "content", "target", "label")
# `2`, `(2)`, `2.`, `Option 2`; pandas makes 2 of a column with gaps 2.0.
_WHOLE = re.compile(r"(?:(?:option|choice)\s*)?[(\[]?(\d{1,2})(?:\.0|[.)\]:])?", re.I)
_HASHES = re.compile(
    r"^[ \t]*####[ \t]*(\S[^\n]*)\s*\Z", re.M
)  # GSM8K's: the solution, and a last line with the answer
LONG = 5  # words that make an answer a sentence
_WRITTEN = re.compile(r"\s*(?:\[\s*[\"'{]|\{\s*[\"'])")  # not [1, 2], an answer as it stands


def gold_of(cell, names: Sequence[str] | None = None) -> str | None:
    """The answer in a cell, without <answer> tags; None for none, and for several that differ.

    `names` are those of the classes that a cell of whole numbers counts. Of a mapping (verl's `reward_model`) it is the
    ground truth, of a chat what the assistant's turn ends in.
    """
    if isinstance(cell, str) and _WRITTEN.match(cell):
        cell = unwritten(cell)
    if is_nothing(cell):
        return None
    if turns := chat.turns(cell):
        return final_answer(chat.words(turns[-1][1])) if turns[-1][0] in chat.ASSISTANT else None
    if isinstance(cell, dict):
        return gold_of(next((cell[key] for key in _KEYS if not is_nothing(cell.get(key))), None))
    if isinstance(cell, list | tuple):
        found = {gold_of(part, names) for part in cell}
        return found.pop() if len(found) == 1 else None
    if names and type(cell) is int and 0 <= cell < len(names):
        return names[cell]
    text = str(cell)
    tags = re.findall(r"<answer>(.*?)</answer>", text, re.I | re.S)
    return _after_hashes(tags[-1] if tags else text) or None


def _after_hashes(text: str) -> str:
    last = _HASHES.search(text)
    return (last[1] if last else text).strip()


def final_answer(reply: str) -> str | None:
    """What a demonstration ends in: its box or <answer>, else all that it says after its thoughts."""
    found = extract_answer(reply)
    return _after_hashes(reply.rpartition("</think>")[2] if found is None else found) or None


def meant(gold: str, options: Options | None, base: int | None) -> str | None:
    """A gold with an option's own label or number turned into the letter A, B, …; every other one as it is.

    None for a letter that is no label among options whose labels are letters with gaps.
    """
    if options is None:
        return gold
    label = gold.strip("().: ").casefold()
    own = [label.casefold() for label in options.labels or ()]
    if label in own:
        return ascii_uppercase[own.index(label)]
    if own and len(label) == 1 and label.isalpha() and all(len(each) == 1 and each.isalpha() for each in own):
        return None
    whole = _WHOLE.fullmatch(gold)
    if base is not None and whole and 0 <= int(whole[1]) - base < len(options.texts):
        return ascii_uppercase[int(whole[1]) - base]
    return gold


def is_whole(gold: str) -> bool:
    """Whether a gold may be the number of an option."""
    return _WHOLE.fullmatch(gold) is not None


def base_of(where: str, found: Iterable[tuple[str, str, Options | None]]) -> tuple[int | None, str]:
    """0 or 1 where golds, given as (uid, gold, options), are numbers of options counted from there, else None; and
    what to say of it.

    Of a gold that is not whole the options are not asked for. Raises DataError for golds that can be read in several
    ways.
    """
    total = whole = named = 0
    first, last, odd = {}, {}, None  # what has been seen of 0 and of n, by uid
    for uid, gold, options in found:
        if gold == "-1":  # an answer that the owners keep
            continue
        total += 1
        number = _WHOLE.fullmatch(gold) if options else None
        if number is None or meant(gold, options, None) != gold or int(number[1]) > len(options.texts):
            continue
        whole += 1
        if answer_key(gold, options.texts) is not None:
            named += 1
        else:
            odd = odd or f"{gold} of {uid}"
        if int(number[1]) == 0:
            first[uid] = gold
        elif int(number[1]) == len(options.texts):
            last[uid] = gold
    if odd is None or (whole - named) <= (1 - NEARLY) * total:
        return None, f"golds that are whole numbers are read as texts of options: {named}" if named else ""
    fix = "Write golds as letters; or take the column out, training needs none"
    if whole < NEARLY * total or named > HALF * whole:
        raise DataError(
            f"{where}: {whole - named} of {total} golds with options are numbers that are no option's text, such as "
            f"{odd}, and {total - whole + named} are something else: are they numbers of options or not? {fix}"
        )
    if bool(first) == bool(last):
        seen = f"both 0 ({next(iter(first))}) and the number of options ({next(iter(last))})" if first else (
            "neither 0 nor the number of options"
        )  # fmt: skip
        raise DataError(f"{where}: golds are numbers of options, such as {odd}, with {seen}: from 0 or from 1? {fix}")
    base = 0 if first else 1
    both = f", {named} that are an option's text as well" if named else ""
    return base, f"golds are numbers of options, counted from {base}{both}"


def hardly_met(gold: str, options: Options | None, text: str) -> str | None:
    """Why a response will hardly meet a gold, though it can; None for one that it may well."""
    if options is not None:
        return None
    if re.fullmatch(r"\(?[A-H][).]?", gold.strip()) and not lettered(text):
        return "letters without options"
    is_long = len(re.findall(r"(?<![\\\w])[^\W\d_]{2,}", gold)) >= LONG and re.search(r"[.!?]\s|\n|.{41}", gold, re.S)
    return "whole sentences" if is_long else None


def unmet(gold: str, options: Options | None) -> str | None:
    """Why no response can ever meet a gold that `meant` gave; None if one can."""
    if answer_key(gold, options.texts if options else None) is not None:
        return None
    short = repr(gold if len(gold) <= 40 else f"{gold[:37]}...")
    return f"{short} names none of its {len(options.texts)} options" if options else f"{short} has no key"
