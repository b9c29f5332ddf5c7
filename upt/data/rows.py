"""What a row of a data set says: question, choices, gold answer and picture, or why it can't be used."""

from contextlib import suppress
from dataclasses import dataclass
from string import ascii_uppercase

from upt.data import chat
from upt.data.choices import Options, options_of
from upt.data.columns import ANSWER, BROKEN, FOLDER, Columns, is_nothing, pick
from upt.data.golds import final_answer, gold_of, meant
from upt.data.images import decode
from upt.data.marks import VIDEO, Marks, take_out
from upt.data.pictures import Files, has_video, held, leaves, likely, same
from upt.data.questions import BadRow, Question


class Unseen(BadRow):
    """The row has a picture in a column that is not read."""

    def __init__(self, uid: str, column: str):
        super().__init__(uid, f"picture in a column that is not read: {column}, rename it to image")
        self.column = column


@dataclass(frozen=True)
class Layout:
    """How the rows of a set are read."""

    columns: Columns
    files: Files
    classes: list[str] | None = None
    """what the numbers in the column of answers stand for, where its type says so"""
    base: int | None = None
    """0 or 1 where golds are numbers of options, counted from there"""


@dataclass(frozen=True)
class Row:
    """A row whose picture, if it has one, is not opened yet."""

    text: str
    options: Options | None
    picture: bytes | str | None
    gold: str | None
    unread: bool
    """whether there is an answer that is no gold: a list of several, a mapping of something else"""
    follows: bool
    """whether it is the last of several questions in a chat"""


def question_of(uid: str, row: dict, layout: Layout) -> Question:
    """The question of a row.

    Raises BadRow for a row without text, without the picture that it announces, or with one that can't be used.
    """
    read = read_row(uid, row, layout)
    image = None
    if read.picture is not None:
        image = decode(uid, layout.files.read(uid, read.picture, row.get(FOLDER)))
    return Question(uid, read.text, read.options and read.options.texts, image, read.gold)


def read_row(uid: str, row: dict, layout: Layout) -> Row:
    """The same without a look at the picture. Raises BadRow."""
    if row.get(BROKEN):
        raise BadRow(uid, row[BROKEN])
    try:
        return _read(uid, row, layout)
    except RecursionError as error:
        raise BadRow(uid, "a cell is nested too deeply") from error


def _read(uid: str, row: dict, layout: Layout) -> Row:
    columns = layout.columns
    asked = _asked(uid, row.get(columns.question))
    if not asked.text:
        raise BadRow(uid, "no question text")
    options = options_in(uid, row, columns)
    marks = asked.marks + (options.marks if options else Marks())
    picture = _picture(uid, row, columns, marks, asked.pictures)
    cell = asked.reply if columns.answer is None else row.get(columns.answer)
    gold = final_answer(cell or "") if columns.answer is None else gold_of(cell, layout.classes)
    gold = None if gold is None else meant(gold, options, layout.base)
    unread = gold is None and not is_nothing(cell.strip() if isinstance(cell, str) else cell)
    return Row(asked.text, options, picture, gold, unread, asked.follows)


def _asked(uid: str, cell) -> chat.Asked:
    if turns := chat.turns(cell):
        return chat.asked(uid, turns)
    said = cell if isinstance(cell, str) else ""
    if video := VIDEO.search(said):
        raise BadRow(uid, f"video and audio are not supported: {video[0]}")
    return chat.Asked(*take_out(said), [])


def options_in(uid: str, row: dict, columns: Columns) -> Options | None:
    """The options of a row, in its columns of choices. Raises BadRow."""
    if columns.letters:
        texts = {letter: row.get(name) for letter, name in zip(ascii_uppercase, columns.letters)}
        return options_of(uid, {letter: text for letter, text in texts.items() if not is_nothing(text)})
    return options_of(uid, row.get(columns.choices))


def _picture(uid: str, row: dict, columns: Columns, marks: Marks, in_turns: list) -> bytes | str | None:
    """The one picture of a row: of its columns, else of the turns of its chat, else of the paths in its marks."""
    if any(not is_nothing(row.get(name)) for name in columns.videos):
        raise BadRow(uid, "video and audio are not supported")
    if video := next((name for name in (*columns.files, *columns.others) if has_video(row.get(name))), None):
        raise BadRow(uid, f"video and audio are not supported: column {video}")
    found = []
    for name in columns.pictures:
        cell = row.get(name)
        found += _others(uid, likely(cell, name), found) if found else held(uid, cell)
    found += [p for name in columns.numbered for p in held(uid, row.get(name))]
    found = found or next((held(uid, row[name]) for name in columns.files if likely(row.get(name))), [])
    found = found + _others(uid, likely(in_turns), found) if found else in_turns or held(uid, list(marks.paths))
    for name in columns.others:
        if _others(uid, likely(row.get(name), name), found):
            raise Unseen(uid, name)
    if not found and not marks.count and (name := next((n for n in columns.others if _announces(n, row.get(n))), None)):
        raise BadRow(uid, f"no image where a column that is not read announces one: {name}")
    if len(found) > 1:
        raise BadRow(uid, f"several images are not supported: {len(found)} in this row")
    if marks.count > len(found):
        what = "no image where the text announces one" if not found else "fewer images than the text announces"
        raise BadRow(uid, what if marks.count == 1 else f"{what}: {len(found)} for {marks.count} marks")
    return found[0] if found else None


def _others(uid: str, pictures: list, found: list) -> list:
    """The pictures that are none of those found."""
    return [picture for picture in pictures if not any(same(uid, picture, other) for other in found)]


def _announces(name: str, cell) -> bool:
    """Whether a column that is not read has marks; those of an answer may stand for pictures of its own."""
    if pick([name], ANSWER):
        return False
    with suppress(BadRow):
        if turns := chat.turns(cell):
            return chat.asked("", turns).marks.count > 0
    return any(take_out(leaf)[1].numbers for leaf in leaves(cell) if isinstance(leaf, str))
