r"""Rules that find the final answer of a free-text response, for benchmarks whose owners let a large model do it.

A response is read once (`read`); sentences that call something incorrect are left out. Each function tries its rules in
order and gives what the first one found and its name, or "none".

    letter   the response, its first or its last line is one · the last behind "the answer is", "I choose", "so it is",
             in a box or called correct · the only one in brackets, in bold or as a label · the last behind "option"
    chosen   a letter or choice by the first two of these · the first or the last line is a choice · a letter · none if
             a number is stated that is no choice · yes or no: the word at the start, else no if the first sentence
             negates or compares the other way round than the question · the last sentence that names a choice or gives
             its value · the last that names one apart from endings and small words
    number   the value of the box · the first behind the last "the answer is" · the first line · the last sentence with
             one in bold, headings aside, or that concludes · that of "There are 3 …" at the start · the last

What is named behind "not" or "than" is denied. Of several numbers those that say of what, when or how come second: 7 of
9, 7 in 2019, 7 (5 + 2). The "A" of "A banana" is an article. Time is linear in the text; its last MAX_CHARS are read.
"""

import re
from typing import NamedTuple

from upt.answers import answer_key, extract_answer, value_of

MAX_CHARS = 50_000
LETTERS = "ABCDEFGH"
_MAX_TRIED = 200  # sentences, from the end
# Reading: $12$, \(12\), 12{,}345, "B. guava" as one sentence.
_MATH = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!]|[\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_STEP = re.compile(r"(?m)^[0-9]{1,2}[.)] ")
_SENTENCE_END = re.compile(r"(?m)(?<=[.!?])(?<!^[A-H]\.) |\n")
_INCORRECT = re.compile(r"(?i)(?!.*(?:answer is|is correct)\b).*\b(?:is|are) (?:also )?(?:wrong|(?:in|not )correct)\b")
# Letters: what an answer stands behind, letters that are set off, denied and praised, and one at the start of a phrase.
_STATED = re.compile(
    r"(?im)\b(?:ans(?:wer)?|(?:the|correct|right|best|final|answer) (?:option|choice|letter))"
    r"(?: (?:to|for|that|which) [^.:\n]{1,80}?)?[*\"]{0,2}(?: (?:is|would be|should be)\b:?| ?[:=]| [-–—](?= )|\n)"
    r"|答案(?:是|为)?[:：]?|\\boxed|<answer>"
)
_PICKED = re.compile(
    rf"{_STATED.pattern}|\b(?:choose|chose|select|pick|go with)\b|选"
    r"|\b(?:it(?:['’]s| is| must be)|so|thus|hence|therefore),?(?-i:(?= \([A-H]\)| [A-H](?:[.;]|$)))"
)
_MARKED = re.compile(
    r"(?m)\*\*\(?([A-H])\)?[.:]?\*\*|\*\*\(?([A-H])[.):](?= )|^[-#> ]*([A-H])(?:[.):](?= |$)|$)"
    r"|(?<!\w)\[([A-Ha-h])\]|\( ([A-H]) \)|\\(?:text|textbf|mathrm|mathbf)\{\(?([A-H])\)?\}"
)
_NOT = r"(?:\b(?:no|not|without|cannot|nor|neither|than|unlike|instead of)|n['’]t)(?: be)?"
_DENIED = re.compile(rf"(?i:{_NOT}(?: option)? )(?:\([A-Ha-h]\)|[A-H]\b)(?:,? but (?:rather )?)?")
_PRAISED = re.compile(r"(?:(\([A-H]\))[^(\n]{0,80}?|\b([A-H])) is (?:the )?(?=correct|best|answer|right(?! angle))")
_FIRST = re.compile(
    r"(?:[\s:,{\"'“‘`-]|\\\w+\{|\b(?i:the|option|choice|letter|answer|therefore|thus|most likely|likely|indeed|but)\b)*"
    r"(?:\(([A-Ha-h])\)|([a-h])(?=[.)}]|$)|([B-H]\b|A\b(?! (?!(?:because|since|as|is|and|but|with|for)\b)[a-z])))"
    r"(?!['’]|-\w| ?[=+^]|(?:, ?|,? (?:and|or|&) | ?-> ?)\(?[A-H]\b\)?(?:[,.;)}]|$| and| or))"  # one of several is none
)
_ALONE = re.compile(r"[(\"'`]?([A-Ha-h])[).:\"'`]{0,2}")
_BRACKETED = re.compile(r"(?<![\w)])\(([A-Ha-h])\)")
_OPTION = re.compile(r"\b(?i:option|choice|answer) ?\(?([A-H])\b(?!['’]s|-\w)")
# Choices.
_NEGATED = re.compile(r"(?i)\b(?:not|no|cannot)\b|n't\b")
_OTHERS = re.compile(r"(?i)\bother (?!hand\b).*")
_COMPARED = {"fewer": -1, "less": -1, "smaller": -1, "more": 1, "greater": 1, "larger": 1}
_POLES = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}
_ENDING = re.compile(r"(?<=[a-z]{3})(?:es|ed|ing|s|e)\b|\b(?:an?|the|its?|is|be|will|would|may|likely|also|of|in|and) ")
# Numbers: in words and digits, 3/4, 1.2 \times 10^3; those that only say of what, when or how; what points at one.
_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_WORDS += [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")] + ["twenty"]
_WORD = re.compile(rf"(?i)\b(?:{'|'.join(_WORDS)})\b")
_MINUS = re.compile(r"(?i)(?<![0-9] )\b(?:minus|negative) (?=\.?[0-9])")
_DIGITS = re.compile(
    r"(?<![\w./])(?:\\[dt]?frac ?\{ ?)?(-?[0-9]{1,15})(?:/| ?\} ?\{ ?)([0-9]{1,15})(?![\w/]|\.[0-9])"
    r"|(?<![\w.^])(?<!\^\{)(-?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+))"
    r"(?:[eE]([+-]?[0-9]{1,3})\b| ?(?:\\times|\\cdot|[×x*]) ?10 ?\^ ?\{?(-?[0-9]{1,3})\b)?"
)
_ANY = rf"(?:[0-9][0-9,.]{{0,15}}|{'|'.join(_WORDS)})"
_YEAR = r"\*{0,2}(?:1[89]|20)[0-9]{2}\b"
_ASIDE = re.compile(
    rf"(?i)\([^()]{{0,200}}\)|\b({_ANY}) of (?:the |all )?{_ANY}|\b[0-9]+(?:st|nd|rd|th)\b"
    rf"|\b(?:not|than|out of|compared (?:to|with))(?: (?:the|all|only))? {_ANY}"
    rf"|\b(?:in|since|during|from|between|until)(?: the)?(?: year)? {_YEAR}(?:(?: and| to|-) ?{_YEAR})?"
)
_EQUALS, _IS = re.compile(r"=|≈|\\approx"), re.compile(r"=|≈|\\approx|\b(?:is|are|equals)\b|: ")
_COMPOUND = re.compile(rf"{_IS.pattern}|[0-9] ?[-–] ?[0-9]")  # "5-6" is a range and not -1
_BOLD = re.compile(r"\*\*([^*]{1,200})\*\*")
_HEADING = re.compile(r"(?i)(?:step|part|figure|question|case) ?\b|[0-9]+[.)] |.*:\s*$")
_CONCLUDES = re.compile(r"(?i)\W*(?:therefore|so|thus|hence|in conclusion|in total|in summary|finally|consequently)\b")
_COUNT = re.compile(rf"(?i)there (?:is|are|was|were) ([0-9]+|{'|'.join(_WORDS)})\b(?!\.[0-9])")


class Reading(NamedTuple):
    """A response made ready: `text` is its sentences, one a line."""

    text: str
    sentences: list[str]


def read(response: str) -> Reading:
    text = _THOUSANDS.sub(",", _MATH.sub("", response[-MAX_CHARS:].replace("−", "-")))
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    text = re.sub(r"(:\*{0,2}) ?\n\s*", r"\1 ", text)  # what a colon announces belongs to its sentence
    text = _STEP.sub("", text) if len(_STEP.findall(text)) > 1 else text
    sentences = [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]
    sentences = [part for part in sentences if not _INCORRECT.match(part)]
    return Reading("\n".join(sentences), sentences)


def letter(reading: Reading, letters: str = LETTERS) -> tuple[str, str]:
    """The one of `letters` that a response names as its answer, "" for none, and the rule."""
    place, method = _stated(reading.text, letters)
    if place is not None:
        return letters[place], method
    text = _marked(reading.text)
    if len(marked := set("".join(_BRACKETED.findall(text)).upper()) & set(letters)) == 1:
        return marked.pop(), "bracket"
    optional = [found for found in _OPTION.findall(text) if found in letters]
    return (optional[-1], "letter") if optional else ("", "none")


def chosen(reading: Reading, choices: tuple[str, ...], question: str) -> tuple[int | None, str]:
    """The place of the choice that a response takes, None for none, and the rule."""
    text, sentences = reading
    letters = LETTERS[: len(choices)]
    place, method = _stated(text, letters, choices)
    if place is not None:
        return place, method
    for end, step in ((0, 1), (-1, -1)) if sentences else ():
        place, beside = _same(sentences[end], choices), _same(sentences[(end + step) % len(sentences)], choices)
        if place is not None and beside != place + step:  # else the options are listed
            return place, "bracket" if _BRACKETED.match(_marked(sentences[end])) else "exact"
    found, method = letter(reading, letters)
    if found:
        return letters.index(found), method
    if all(_value(choice, 0) for choice in choices) and number(reading)[1] in ("box", "stated"):
        return None, "none"  # the number is none of them
    poles = [_POLES.get(choice.lower()) for choice in choices]
    if set(poles) == {"yes", "no"} and sentences:
        if first := re.match(r"\W{0,9}(yes|no|true|false)\b", text.lower()):
            return poles.index(_POLES[first[1]]), "polarity"
        if not _named(text, choices):
            more = [sum({_COMPARED.get(word, 0) for word in part.lower().split()}) for part in (sentences[0], question)]
            denies = _NEGATED.search(sentences[0]) or more[0] * more[1] < 0
            return poles.index("no" if denies else "yes"), "polarity"
    last = sentences[: -_MAX_TRIED - 1 : -1]
    for sentence in last:
        place, method = _taken(sentence, choices, -1)
        if place is not None:
            return place, method
    stems = tuple(_ENDING.sub("", choice.lower()) for choice in choices)
    named = next(filter(None, (_named(_ENDING.sub("", sentence.lower()), stems) for sentence in last)), None)
    return (named[-1], "stems") if named else (None, "none")


def number(reading: Reading) -> tuple[str, str]:
    """The number that a response gives for its answer, in decimals, "" for none, and the rule."""
    text, sentences = reading
    if (boxed := extract_answer(text)) and (value := _value(boxed, 0)):
        return value, "box"
    for said in statements(text, 200):
        said = said.lstrip("\n *:").partition("\n")[0]
        which = -1 if re.match(r"(?!There|It )[A-Z]", said) else 0  # a sentence ends in its number
        if value := _value(said, which):
            return value, "stated"
    if sentences and (value := _measured(sentences[0])):
        return value, "exact"
    last = sentences[: -_MAX_TRIED - 1 : -1]
    for sentence in last:
        if value := _in_bold(_ASIDE.sub(r"\1", sentence)):
            return value, "bold"
        if _CONCLUDES.match(sentence) and (value := _value(sentence, -1)):
            return value, "conclusion"
    if value := _in_bold(text):
        return value, "bold"
    if sentences and (count := _COUNT.match(sentences[0])):
        return numbers(count[1])[0], "count"
    value = next(filter(None, (_value(sentence, -1) for sentence in last)), "")
    return value, "last" if value else "none"


def statements(text: str, width: int) -> list[str]:
    """What follows "the answer is" and its like, so many characters each, the last first."""
    return [text[match.end() : match.end() + width] for match in reversed(list(_STATED.finditer(text))[-20:])]


def numbers(text: str) -> list[str]:
    """Numbers of a text in digits, as `float` reads them; if there are none, those in words."""
    found = []
    for over, under, digits, *powers in _DIGITS.findall(_MINUS.sub("-", text)):
        value = str(int(over) / (int(under) or 1)) if under else digits.replace(",", "")
        found.append(value + "".join(f"e{power}" for power in powers if power))
    return found or [str(_WORDS.index(word.lower())) for word in _WORD.findall(text)]


def _marked(text: str) -> str:
    """The text with letters in bold, at the start of a line or set off otherwise as (A), without those it denies."""
    text = _MARKED.sub(lambda match: f"({match[match.lastindex]})", text).replace("**", "")
    return _PRAISED.sub(r"answer is \1\2, ", _DENIED.sub("", text))


def _stated(text: str, letters: str, choices: tuple[str, ...] = ()) -> tuple[int | None, str]:
    """The place of the letter that the first or the last line is, else of the letter or choice behind the last cue."""
    marked, boxed = _marked(text), _marked(extract_answer(text) or "")[:150]
    ends = (_ALONE.fullmatch(line) for line in (marked.partition("\n")[0], marked.rpartition("\n")[2]))
    if len(alone := {end[1].upper() for end in ends if end}) == 1 and (found := alone.pop()) in letters:
        return letters.index(found), "letter"
    for cue in reversed(list(_PICKED.finditer(marked))[-20:]):
        said = marked[cue.end() : cue.end() + 150].lstrip("\n").partition("\n")[0]
        said = boxed if cue[0] in ("\\boxed", "<answer>") else said
        if (first := _FIRST.match(said)) and (found := first[first.lastindex].upper()) in letters:
            return letters.index(found), "letter"
        if choices and (place := _taken(said, choices, 0)[0]) is not None:
            return place, "stated"
    return None, "none"


def _taken(said: str, choices: tuple[str, ...], which: int) -> tuple[int | None, str]:
    """The place of the choice that a phrase is, names (of several the first or the last, 0 or -1) or gives in value."""
    if (place := _same(_EQUALS.split(said)[-1], choices)) is not None:
        return place, "named"
    if named := _named(said, choices):
        return named[which], "named"
    value = float(_value(said, which) or "nan")
    equal = [place for place, choice in enumerate(choices) if float(_value(choice, 0) or "nan") == value]
    return (equal[0] if len(equal) == 1 else None), "value"


def _same(said: str, choices: tuple[str, ...]) -> int | None:
    """The place of the choice that a phrase is, by text, value or label; a lone letter may be a name in the text."""
    said = said.strip(" :*#.-")
    key = None if _ALONE.fullmatch(said) else answer_key(said, choices)
    return ord(key) - ord("A") if key and len(key) == 1 else None


def _named(text: str, choices: tuple[str, ...]) -> list[int]:
    """Places of the choices that a text names and does not deny, in its order; none within a longer one."""
    places = {choice.lower().strip().rstrip("."): place for place, choice in reversed(list(enumerate(choices)))}
    wanted = [re.escape(name) for name in sorted(places, key=len, reverse=True) if name and not _ALONE.fullmatch(name)]
    pattern = rf"({_NOT} (?:the |an? )?)??(?<![\w.])({'|'.join(wanted) or '(?!)'})(?!\w|\.[0-9])"
    found = re.findall(pattern, _OTHERS.sub("", text).lower())
    return [places[name] for denied, name in found if not denied]


def _value(text: str, which: int) -> str:
    """The number of a phrase in decimals, "" for none; of several the first or the last (0 or -1)."""
    mark, bare = _IS if which else _EQUALS, _ASIDE.sub(r"\1", text)
    for part in (mark.split(bare)[-1], mark.split(text)[-1], bare, text):
        if found := [measured] if (measured := _measured(part)) else numbers(part):
            return found[which]
    return ""


def _measured(text: str) -> str:
    """A phrase that is a number or closed form, with its unit or not, in decimals; "" for any other."""
    said = "" if len(text) > 200 or _COMPOUND.search(text) else text.lstrip(" *:#").rstrip(" *.:#")
    key = answer_key(said) or ""
    value = value_of(key) if len(key) < 300 else None
    return "" if value is None else str(int(value) if value == int(value) else float(value))


def _in_bold(text: str) -> str:
    return _value("; ".join(bold for bold in _BOLD.findall(text) if not _HEADING.match(bold)), -1)
