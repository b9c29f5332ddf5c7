"""`shapes` and `shapes-hard`: the embedded data sets. Small pictures, questions about them, and worked answers.

Six kinds of question, each needing something read from the picture and most needing one step of arithmetic:

    count        how many shapes have a colour
    sum          how many shapes have one colour or another
    difference   how many more shapes have one colour than another
    bars         the sum of two bars of a chart
    angle        the third angle of a triangle from two that are written in it
    length       a segment from its two written parts

Everything is drawn from one integer seed. A picture belongs to exactly one split, decided by a hash of what is in it,
so no picture is shared between `warmup` (70 %), `train`, `validation` and `test` (10 % each) whatever the seeds, and
no picture occurs twice in one set. The warm-up set is apart from the rest so that label-free training only ever sees
pictures that no label was given for.

`shapes-hard` asks the same of pictures that `shapes` never draws, and has no warm-up split: what a model gains on it,
no label has taught.

    grid         six to nine of the cells hold a shape, each of them off the middle, so that neighbours may touch
    bars         each bar is further off the middle of its third
    triangle     the two numbers are in the first or second row instead of the third, and below them a flat triangle
    segment      the two numbers are in the first or third row instead of the second, where the segment is

    python -c "from upt.data import shapes; shapes.questions('test', seed=0, size=8)[0].image.save('x.png')"
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

from PIL import Image, ImageDraw, ImageFont

from upt.errors import DataError, suggest

SIDE = 84  # pixels: three by three visual tokens of 28 pixels each
BACKGROUND = (122, 116, 104)  # close to zero after CLIP normalisation, so that only what is drawn excites the encoder
WHITE = (255, 255, 255)
COLOURS = {"red": (230, 30, 30), "blue": (40, 70, 235), "green": (20, 170, 50), "yellow": (245, 215, 20)}
FORMS = ("circle", "square", "triangle")
QUESTIONS = {
    "count": "How many {} shapes are there?",
    "sum": "How many {} and {} shapes are there?",
    "difference": "How many more {} than {} shapes are there?",
    "bars": "What is the sum of the {} and {} bars?",
    "angle": "What is the third angle, in degrees?",
    "length": "How long is the whole segment?",
}
KINDS = tuple(QUESTIONS)
FIT = {"grid": ("count", "sum", "difference"), "bars": ("bars",), "triangle": ("angle",), "segment": ("length",)}
SIZES = {"warmup": 24000, "train": 4096, "validation": 512, "test": 512}
LIMITS = {"warmup": 40000, "train": 6000, "validation": 6000, "test": 6000}  # distinct pictures run out
# A picture's hash modulo 10 decides its split.
SPLIT_OF_BUCKET = ("warmup",) * 7 + ("train", "validation", "test")


@dataclass(frozen=True)
class Level:
    """What the pictures of a set may look like."""

    filled: float  # probability that a cell of a grid holds a shape
    bar_shifts: Sequence[int]  # pixels by which a bar stands off the middle of its third
    grid_shifts: Sequence[int] = ()  # pixels by which a shape stands off the middle of its cell, each way; (): none
    min_shapes: int = 0  # of a grid: one with fewer is thrown away
    moved: bool = False  # the two numbers of a triangle or a segment are in another row than ROWS


LEVELS = {
    "shapes": Level(filled=0.6, bar_shifts=range(-2, 3)),
    "shapes-hard": Level(filled=0.8, bar_shifts=(-4, -3, 3, 4), grid_shifts=(-2, 2), min_shapes=6, moved=True),
}
ROWS = {"triangle": 2, "segment": 1}  # where their two numbers are, counted from 0


@dataclass(frozen=True)
class Item:
    """One question. `scene` is what is drawn, `facts` what has to be read from it; the picture is drawn on access."""

    uid: str
    kind: str
    scene: tuple
    question: str
    names: tuple[str, ...]  # the colours asked about, in order
    facts: tuple[int, ...]  # the numbers to be read, in the order in which `worked` takes them

    choices = view = None

    @property
    def gold(self) -> str:
        return str(worked(self.kind, self.names, self.facts)[1])

    @property
    def image(self) -> Image.Image:
        return draw(self.scene)


class Items(Sequence):
    """The questions of one split, in a fixed order. Scenes are made at once, pictures when they are asked for."""

    def __init__(self, name: str, split: str, seed: int, size: int):
        self.items, seen = [], set()
        rng = random.Random(f"{name}/{split}/{seed}")
        while len(self.items) < size:
            kind = rng.choice(KINDS)
            scene = _scene(kind, rng, LEVELS[name])
            digest = blake2b(repr(scene).encode(), digest_size=8).digest()
            if digest in seen or SPLIT_OF_BUCKET[int.from_bytes(digest, "big") % 10] != split:
                continue
            seen.add(digest)
            self.items.append(Item(f"{name}/{split}/{len(self.items):06d}", kind, scene, *ask(kind, scene, rng)))
        self.uids = [item.uid for item in self.items]

    def stored(self) -> Iterator[dict]:
        """The questions as fingerprint.py takes them, with what is drawn in place of the picture."""
        return ({"question": i.question, "picture": repr(i.scene), "answers": i.gold} for i in self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def questions(split: str = "train", seed: int = 0, size: int | None = None, name: str = "shapes") -> Items:
    """The questions of a split of `name`, one of LEVELS: the same for the same seed and size.

    A larger size only appends. Raises DataError for a split that the set does not have and for more questions than
    there are pictures for.
    """
    splits = [split for split in SIZES if split != "warmup" or name == "shapes"]
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}: ask for one of {', '.join(splits)}{suggest(split, splits)}")
    size = SIZES[split] if size is None else size
    if not 0 < size <= LIMITS[split]:
        raise DataError(f"{name} makes 1 to {LIMITS[split]} questions for {split}, not {size}")
    return Items(name, split, seed, size)


def _scene(kind: str, rng: random.Random, level: Level) -> tuple:
    """A random picture that a question of this kind can be asked about; nothing in it is drawn quite the same twice."""
    if kind == "angle":
        numbers = 10 * rng.randrange(2, 9), 10 * rng.randrange(2, 9)
        return "triangle", *numbers, rng.randrange(10, 75), rng.randrange(-3, 4), *_row("triangle", rng, level)
    if kind == "length":
        numbers = rng.randrange(2, 10), rng.randrange(2, 10)
        return "segment", *numbers, rng.randrange(24, 61), rng.randrange(-3, 4), *_row("segment", rng, level)
    if kind == "bars":
        colours = rng.sample(sorted(COLOURS), 3)
        return "bars", *((colour, rng.randrange(1, 5), rng.choice(level.bar_shifts)) for colour in colours)
    palette = rng.sample(sorted(COLOURS), 3)
    while True:
        cells = [_cell(rng, level, palette) if rng.random() < level.filled else None for _ in range(9)]
        if sum(cell is not None for cell in cells) >= level.min_shapes:
            return "grid", *cells


def _cell(rng: random.Random, level: Level, palette: list[str]) -> tuple:
    shape = rng.choice(FORMS), rng.choice(palette)
    return (*shape, rng.choice(level.grid_shifts), rng.choice(level.grid_shifts)) if level.grid_shifts else shape


def _row(what: str, rng: random.Random, level: Level) -> list[int]:
    """The row of two numbers that are not in the one of `shapes`; nothing where they are."""
    return [rng.choice([row for row in range(3) if row != ROWS[what]])] if level.moved else []


def ask(kind: str, scene: tuple, rng: random.Random) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """A random question of a kind about a scene that is fit for it: (question, colours asked about, facts to read)."""
    number = _numbers(scene)
    names = []
    if kind == "bars":
        names = rng.sample(list(number), 2)
    elif kind not in ("angle", "length"):
        present = [name for name in number if number[name]]
        names = rng.sample(present if len(present) > 1 else sorted(COLOURS), 1 if kind == "count" else 2)
    if kind == "difference":
        names.sort(key=number.get, reverse=True)
    return QUESTIONS[kind].format(*names), tuple(names), _facts(scene, names)


def ask_else(item: Item, rng: random.Random) -> str | None:
    """A random question about an item's picture that asks for something else; None where there is no other."""
    if item.kind in ("angle", "length"):
        return None
    while True:
        kind = rng.choice(FIT[item.scene[0]])
        question, names, _ = ask(kind, item.scene, rng)
        if (kind, {*names}) != (item.kind, {*item.names}):
            return question


def understand(scene: tuple, question: str) -> tuple[str, tuple[str, ...], tuple[int, ...]] | None:
    """What a question asks of a scene, whoever wrote it: (kind, colours asked about, facts to read), as for `worked`.

    None for what is no question of `shapes`, or none that this scene answers: of another kind of picture, about one
    colour twice or a bar that is not there, or how many more there are of the rarer colour.
    """
    number = _numbers(scene)
    for kind in FIT[scene[0]]:
        match = re.fullmatch(QUESTIONS[kind].replace("?", r"\?").replace("{}", "(.+)"), question.strip())
        names = match.groups() if match else ()
        if match and len({*names}) == len(names) and {*names} <= {*number}:
            facts = _facts(scene, names)
            return None if kind == "difference" and facts[0] < facts[1] else (kind, names, facts)
    return None


def _numbers(scene: tuple) -> dict[str, int]:
    """What can be read of each colour: its shapes in a grid, or the height of its bar."""
    what, *parts = scene
    if what == "grid":
        return {name: sum(cell is not None and cell[1] == name for cell in parts) for name in sorted(COLOURS)}
    return {colour: height for colour, height, _ in parts} if what == "bars" else {}


def _facts(scene: tuple, names: Sequence[str]) -> tuple[int, ...]:
    number = _numbers(scene)
    return tuple(number[name] for name in names) if number else scene[1:3]


def worked(kind: str, names: tuple[str, ...], facts: tuple[int, ...]) -> tuple[str, int]:
    """The reasoning that follows from the facts as read, and its answer."""
    if kind == "count":
        return f"{facts[0]} {names[0]}", facts[0]
    a, b = facts
    if kind == "angle":
        return f"180-{a}-{b}={180 - a - b}", 180 - a - b
    if kind == "length":
        return f"{a}+{b}={a + b}", a + b
    sign, answer = ("-", a - b) if kind == "difference" else ("+", a + b)
    return f"{a} {names[0]} {sign} {b} {names[1]} = {answer}", answer


def draw(scene: tuple) -> Image.Image:
    """Render a scene, 84 x 84 RGB."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    pen = ImageDraw.Draw(image)
    what, *parts = scene
    if what == "grid":
        for index, cell in enumerate(parts):
            if cell is not None:
                form, colour, *shift = cell
                _shape(pen, form, colour, *_middle(index, *shift))
    elif what == "bars":
        for level in range(5):
            pen.line((4, 80 - 18 * level, 80, 80 - 18 * level), fill=WHITE)
        for index, (colour, height, shift) in enumerate(parts):
            x = 28 * index + 14 + shift
            pen.rectangle((x - 9, 80 - 18 * height, x + 9, 80), fill=COLOURS[colour])
    elif what == "triangle":
        a, b, apex, shift, *row = parts
        base, top = (_beside(*row) + 10, _beside(*row) - 8) if row else (52, 8)
        pen.line((2, base, apex, top + shift, 82, base, 2, base), fill=WHITE, width=2)
        _numbered(pen, (a, b), *row or [ROWS[what]])
    else:
        a, b, middle, shift, *row = parts
        y = (_beside(*row) if row else 66) + shift
        pen.line((2, y, 82, y), fill=WHITE, width=2)
        for x in (2, middle, 81):
            pen.line((x, y - 6, x, y + 6), fill=WHITE, width=2)
        _numbered(pen, (a, b), *row or [ROWS[what]])
    return image


def _middle(cell: int, right: int = 0, down: int = 0) -> tuple[int, int]:
    """The middle of one of the nine cells, or the point beside it, in pixels."""
    return 28 * (cell % 3) + 14 + right, 28 * (cell // 3) + 14 + down


def _beside(row: int) -> int:
    """The y of the middle of a row beside `row`: the middle one, or the last beside the middle one."""
    return 28 * (2 if row == 1 else 1) + 14


def _shape(pen: ImageDraw.ImageDraw, form: str, colour: str, x: int, y: int) -> None:
    box = (x - 12, y - 12, x + 12, y + 12)
    if form == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif form == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon((x, y - 13, x - 13, y + 12, x + 13, y + 12), fill=COLOURS[colour])


def _numbered(pen: ImageDraw.ImageDraw, numbers: tuple[int, int], row: int) -> None:
    for column, number in zip((0, 2), numbers, strict=True):
        pen.text(_middle(3 * row + column), str(number), fill=WHITE, font=_font(), anchor="mm")


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(22)
