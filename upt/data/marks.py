"""Marks: what stands in a question's text for a picture. `<image>`, `<image_1>`, `<|image_pad|>`, `![](a.png)`, …

Marks are taken out of the text, for in it Qwen's own would be counted as places for visual features. Some name the
picture's path, which then is the question's picture if no column has one.
"""

import re
from typing import NamedTuple

EXTENSIONS = r"\.(?:png|jpe?g|jpe|jfif|webp|gif|bmp|tiff?|p[bgpn]m|avif|jp2|j2k|jpx)"
_WORD = r"(?:image|img|picture|pic|photo|figure)"
_OPEN, _CLOSE = r"(?:[<＜]|&lt;)[ \t]{0,4}\|?", r"\|?[ \t]{0,4}(?:[>＞]|&gt;)"
_START = rf"{_OPEN}(?:(?:{_WORD}|vision|media)[ _-]?(?:start|begin)|(?:start|begin)[ _-]of[ _-]{_WORD}){_CLOSE}"
_END = rf"{_OPEN}(?:(?:{_WORD}|vision|media)[ _-]?end|end[ _-]of[ _-]{_WORD}){_CLOSE}"
_PAD = rf"{_OPEN}(?:{_WORD}|vision|media)[ _-]?pad{_CLOSE}"
_MARKS = (
    # <img>a.png</img>
    rf"<(?P<tag>{_WORD})>\s{{0,40}}(?P<tagged>[^<>\s]*|[^<>\n]{{0,400}}{EXTENSIONS})\s{{0,40}}</(?P=tag)>",
    rf"[<\[]{_WORD}[ \t]?[:=](?P<colon>[^<>\[\]\n]{{1,400}}{EXTENSIONS})[ \t]{{0,4}}[>\]]",  # <image: a.png>
    r"<(?:img|image)\b[^<>]*?\bsrc\s*=\s*(?:\"(?P<double>[^\"<>]*)\"|'(?P<single>[^'<>]*)'|"
    r"(?P<bare>[^\s<>\"']+)(?![^\s<>\"']))[^<>]*>",
    r"!\[[^\[\]\n]*\]\([ \t]*(?P<markdown>(?:[^()\s]|\([^()\s]*\))+|(?:[^()\n\"]|\([^()\n]*\))*" + EXTENSIONS + r")"
    r"(?:[ \t]+\"[^\"\n]*\")?[ \t]*\)",
    r"\\includegraphics\s*(?:\[[^\[\]\n]*\])?\s*\{(?P<latex>[^{}\n]*)\}",
    # As models have it, expanded to as many places as a picture takes, too.
    rf"{_START}(?:\s*(?:{_PAD}|{_OPEN}{_WORD}{_CLOSE}))*(?:\s*{_END})?",
    rf"(?:{_PAD})+(?:{_END})?|{_END}",
    r"<img>(?:<IMG_CONTEXT>)+</img>|(?:<IMG_CONTEXT>)+",
    rf"{_OPEN}(?:im_patch|(?:{_WORD}|media)[ _-]?(?:here|placeholder|(?:soft_)?token)){_CLOSE}",
    r"(?P<around><figure>(?=\s*<img\b)|</figure>)",  # of a picture that has its own mark
    rf"{_OPEN}{_WORD}s?[ _:#-]{{0,8}}(?P<angle>\d{{0,4}})[ \t]{{0,4}}/?{_CLOSE}",
    r"\[(?:image|img|picture)[ _:#-]{0,8}(?P<square>\d{0,4})\]",
    # Not \text{image}.
    rf"(?<![\w\\^{{}}])\{{{{1,2}}[ \t]{{0,4}}{_WORD}[ _:#-]{{0,8}}(?P<curly>\d{{0,4}})[ \t]{{0,4}}\}}{{1,2}}",
    rf"(?m:^)\({_WORD}[ _:#-]{{0,8}}(?P<round>\d{{0,4}})\)",  # elsewhere in a line it is prose
    r"<img\b[^<>]*>",
)
# The blanks before a mark are matched from the first on, or a long row of them would be tried from each.
PLACEHOLDER = re.compile(rf"(?:(?<![ \t])[ \t]+)?(?:{'|'.join(_MARKS)})[ \t]*", re.I)
_PATHS, _NUMBERS = (
    ("tagged", "colon", "double", "single", "bare", "markdown", "latex"),
    ("angle", "square", "curly", "round"),
)
VIDEO = re.compile(
    r"<\|?(?:video|audio)s?(?:_(?:pad|token))?(?:[ _]?\d*)\|?>|<\|(?:video|audio)_(?:bos|eos|pad)\|>", re.I
)


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
    if not any(sign in text for sign in "<＜&[\\{("):  # what every mark has one of
        return _clean(text), Marks()
    numbers, paths = [], []

    def out(mark: re.Match) -> str:
        if mark["around"]:
            return " "
        number = next((mark[name] for name in _NUMBERS if mark[name]), "")
        numbers.append(str(int(number)) if number else "")
        paths.extend(mark[name].strip() for name in _PATHS if mark[name])
        return " "

    return _clean(PLACEHOLDER.sub(out, text)), Marks(tuple(numbers), tuple(paths))


def _clean(text: str) -> str:
    """Without half characters, which no tokenizer takes, and blanks around it."""
    return text.encode(errors="ignore").decode().strip()
