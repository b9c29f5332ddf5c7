"""Marks: what stands in a question's text for a picture. `<image>`, `<image_1>`, `<|image_pad|>`, `![](a.png)`, …

Marks are taken out of the text, for in it Qwen's own would be counted as places for visual features. Some name the
picture's path, which then is the question's picture if no column has one.
"""

import re
from typing import NamedTuple

EXTENSIONS = r"\.(?:png|jpe?g|jpe|jfif|webp|gif|bmp|tiff?|p[bgpn]m|avif|jp2|j2k|jpx)"
_WORD = r"(?:image|img|picture|pic|photo)"
_MARKS = (
    rf"<(?P<tag>{_WORD})>\s*(?P<tagged>[^<>\s]*|[^<>\n]*{EXTENSIONS})\s*</(?P=tag)>",  # <img>a.png</img>
    r"<img\b[^<>]*?\bsrc\s*=\s*(?:\"(?P<double>[^\"<>]*)\"|'(?P<single>[^'<>]*)'|(?P<bare>[^\s<>\"']+))[^<>]*>",
    r"!\[[^\[\]\n]*\]\([ \t]*(?P<markdown>(?:[^()\s]|\([^()\s]*\))+|(?:[^()\n\"]|\([^()\n]*\))*" + EXTENSIONS + r")"
    r"(?:[ \t]+\"[^\"\n]*\")?[ \t]*\)",
    r"\\includegraphics\s*(?:\[[^\[\]\n]*\])?\s*\{(?P<latex>[^{}\n]*)\}",
    # As models have it, expanded to as many places as a picture takes, too.
    r"<\|vision_start\|>(?:\s*<\|image_pad\|>)*(?:\s*<\|vision_end\|>)?",
    r"(?:<\|image_pad\|>)+(?:<\|vision_end\|>)?|<\|vision_end\|>",
    r"<img>(?:<IMG_CONTEXT>)+</img>|(?:<IMG_CONTEXT>)+",
    r"<(?:imagehere|image_?placeholder|img_?placeholder|start_of_image|image_soft_token|\|?im_patch\|?)>",
    rf"<\|?{_WORD}[ _:#-]*(?P<angle>\d{{0,4}})\s*/?\|?>",
    r"\[(?:image|img|picture)[ _:#-]*(?P<square>\d{0,4})\]",
    r"<img\b[^<>]*>",
)
# The blanks before a mark are matched from the first on, or a long row of them would be tried from each.
PLACEHOLDER = re.compile(rf"(?:(?<![ \t])[ \t]+)?(?:{'|'.join(_MARKS)})[ \t]*", re.I)
_PATHS = ("tagged", "double", "single", "bare", "markdown", "latex")
VIDEO = re.compile(r"<\|?video(?:_pad)?(?:[ _]?\d*)\|?>|<\|(?:video|audio)_(?:bos|eos|pad)\|>", re.I)


class Marks(NamedTuple):
    """What the marks of a text say: each one's number, "" for none, and the paths that they name."""

    numbers: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    def __add__(self, other: "Marks") -> "Marks":
        return Marks(self.numbers + other.numbers, self.paths + other.paths)

    @property
    def count(self) -> int:
        """How many pictures they stand for: one number is one picture, wherever it is named again."""
        return self.numbers.count("") + len({*self.numbers} - {""})


def take_out(text: str) -> tuple[str, Marks]:
    """A text without marks, and its marks."""
    if not any(sign in text for sign in "<[\\"):  # what every mark has one of
        return _clean(text), Marks()
    numbers, paths = [], []

    def out(mark: re.Match) -> str:
        number = mark["angle"] or mark["square"]
        numbers.append(str(int(number)) if number else "")
        paths.extend(filter(None, (mark[name] for name in _PATHS)))
        return " "

    return _clean(PLACEHOLDER.sub(out, text)), Marks(tuple(numbers), tuple(paths))


def _clean(text: str) -> str:
    """Without half characters, which no tokenizer takes, and blanks around it."""
    return text.encode(errors="ignore").decode().strip()
