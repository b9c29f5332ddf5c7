r"""Where a response says its answer: the last balanced \boxed{}, else the last <answer>…</answer>. Linear in time."""

import re
from collections.abc import Sequence

# A backslash takes the next character with it (\{ is no brace), unless it begins \boxed.
_BOX_PART = re.compile(r"(?<=\\)boxed\s*\{|\\(?!boxed)[\s\S]|[{}]")
_FLAT_BOX = re.compile(r"\\boxed\s*\{([^{}\\]*)\}")
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


def _find_span(text: str) -> tuple[int, int] | None:
    """Where the content of the last balanced box lies (the one that opens last), else that of the last answer tags."""
    last = text.rfind("\\boxed")
    if last >= 0:
        if match := _FLAT_BOX.match(text, last):  # what nearly every response ends with, without a scan
            return match.span(1)
        opened, best = [], (-1, -1)
        for part in _BOX_PART.finditer(text):
            if part[0] == "}" and opened:
                best = max(best, (opened.pop(), part.start()))
            elif part[0][0] in "b{":
                opened.append(part.end() if part[0][0] == "b" else -1)
        if best[0] >= 0:
            return best
    start, found = None, None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            start, found = None, (start, tag.start())
    return found


def find_answer(text: str) -> str | None:
    """What stands in the last box or answer tags, as it is; None if there are none."""
    span = _find_span(text)
    return None if span is None else text[slice(*span)]


def extract_answer(text: str, choices: Sequence[str] | None = None) -> str | None:
    r"""The answer string of a whole response: its last balanced `\boxed{}`, else its last `<answer>…</answer>`.

    Of nested boxes the innermost counts; a box cut off by the length limit doesn't. None if there is nothing, if the
    last box is empty, or if `text` is no string. `choices` has no say here: extraction and keying are called alike.
    """
    found = find_answer(text) if isinstance(text, str) else None
    return (found.strip(" \t\r\n") or None) if found is not None else None


def before_answer(text: str) -> str:
    r"""What a response says before the `\boxed{` or `<answer>` whose content `extract_answer` gives.

    All of the text where that finds nothing; "" if `text` is no string.
    """
    if not isinstance(text, str) or extract_answer(text) is None:
        return text if isinstance(text, str) else ""
    start = _find_span(text)[0]
    return text[: text.rfind("\\boxed" if text[start - 1] == "{" else "<", 0, start)]


def is_well_formed(text: str) -> bool:
    r"""True if the whole response reads `<think>…</think>…\boxed{…}…` (format term of arXiv 2603.21289).

    The language of fullmatch(`<think>.*</think>.*\\boxed\{.*\}.*`) with dot matching newlines.
    """
    if not isinstance(text, str) or not text.startswith("<think>"):
        return False
    end = len("<think>")
    for mark in ("</think>", "\\boxed{", "}"):
        start = text.find(mark, end)
        if start < 0:
            return False
        end = start + len(mark)
    return True


def keeps_format(text: str, prompt: str) -> bool:
    """Whether a response has the format that a prompt style asks for.

    "think-boxed": it is well-formed. Any other style: it has an answer.
    """
    return is_well_formed(text) if prompt == "think-boxed" else extract_answer(text) is not None
