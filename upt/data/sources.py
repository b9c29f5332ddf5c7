"""One data set, from files or from the hub, as questions.

    files.py     where it lies, its files as tables
    splits.py    which rows are asked for, and their uids
    columns.py   which column says what
    rows.py      a row → a question, or why it is none: turns (chat.py), options (choices.py), pictures (marks.py,
                 pictures.py, images.py), gold answers (golds.py)

All rows of a split are looked at once, without a picture being opened, to say how many can be used, how many have a
picture and which golds no response can meet. A row that can't be used raises `BadRow` and is kept in `Questions.bad`; a
set without one good row is a `DataError`. Gold answers reach `Question.gold` and nothing else.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import datasets

from upt.data import cells, files, golds, splits
from upt.data.choices import Options
from upt.data.columns import BROKEN, FOLDER, QUESTION, Columns, is_nothing, pick
from upt.data.fingerprint import rows_of
from upt.data.names import ALIASES, SPLITS
from upt.data.pictures import Files
from upt.data.questions import BadRow, Question, Questions
from upt.data.rows import Layout, Unseen, options_in, question_of, read_row
from upt.errors import DataError, suggest

MAX_KEYS = 20_000  # golds whose keys are tried at the start of a run, at some ten microseconds each


def load_set(name: str, split: str, limit: int | None) -> Questions:
    """The questions of one split of one set that lies in files or on the hub, as `load` in mixture.py says."""
    if split not in SPLITS:
        raise DataError(f"no split {split!r}: ask for {', '.join(SPLITS)}{suggest(split, ALIASES)}")

    label, folder, found = files.find(name)
    tables = splits.by_split(label, found)
    uids_of = splits.uids(label, tables)
    source, chosen, note = splits.choose(split, uids_of)
    table, total, chosen, uids = tables[source], len(chosen), chosen[:limit], uids_of[source]
    where = f"data set {label!r}, split {split!r}"
    columns = Columns.of(table.column_names)
    if columns.question is None and len(table) and BROKEN not in table.column_names:
        have, want = ", ".join(name for name in table.column_names if name != FOLDER), ", ".join(QUESTION)
        raise DataError(f"{where}: no column for the question among {have}. Rename one to any of {want}")
    columns = replace(columns, others=tuple(name for name in columns.others if cells.can_hold_pictures(table, name)))
    base, counted = base_of(f"data set {label!r}", tables, uids_of)
    layout = Layout(columns, Files(folder), classes_of(table, columns), base)

    def read(i: int) -> Question:
        return question_of(uids[chosen[i]], cells.row_at(table, chosen[i]), layout)

    seen = survey(table, chosen, uids, layout)
    if seen.unseen and not seen.pictures:
        turns = f"; or, if it asks the question, take {columns.question!r} out" if pick(seen.unseen, QUESTION) else ""
        raise DataError(
            f"{where}: column {' and '.join(map(repr, seen.unseen))} looks like pictures, and no column of that name "
            f"is read. Rename it to image{turns}; or take it out if questions are to be asked without it"
        )
    notes = "; ".join(filter(None, (note, first_of(len(chosen), total), seen.note(counted))))
    questions = Questions(label, split, [uids[i] for i in chosen], read, seen.golds > 0, notes, seen.pictures)
    questions.stored = lambda: rows_of(table, chosen, folder)
    if next(iter(questions), None) is None:
        raise DataError(f"{where}: {none_good(questions, name if len(table) == 0 else '')}")
    return questions


def first_of(count: int, total: int) -> str:
    """A word on a limit that leaves rows out."""
    return f"the first {count} of {total} rows" if count < total else ""


def classes_of(table: datasets.Dataset, columns: Columns) -> list[str] | None:
    """What the numbers in the column of answers stand for, where its type says so."""
    kind = table.features.get(columns.answer)
    return kind.names if isinstance(kind, datasets.ClassLabel) else None


def base_of(where: str, tables: files.Tables, uids_of: dict[str, list[str]]) -> tuple[int | None, str]:
    """0 or 1 where the golds of a set, those of all its splits together, are numbers of options from there; a word on
    it."""

    def with_options() -> Iterator[tuple[str, str, Options | None]]:
        for split, table in tables.items():
            columns = Columns.of(table.column_names)
            of_options = [columns.choices] if columns.choices else columns.letters
            if columns.answer is None or not of_options:
                continue
            names = [name for name in (columns.answer, *of_options, FOLDER) if name in table.column_names]
            for uid, row in zip(uids_of[split], cells.survey(table.select_columns(names)), strict=True):
                with suppress(BadRow, RecursionError):
                    gold = golds.gold_of(row[columns.answer], classes_of(table, columns))
                    if gold is not None and not all(is_nothing(row[name]) for name in of_options):
                        yield uid, gold, options_in(uid, row, columns) if golds.is_whole(gold) else None

    return golds.base_of(where, with_options())


@dataclass
class Survey:
    """What a look at the rows of a split shows without opening a picture."""

    pictures: int = 0
    golds: int = 0
    follow: int = 0
    """questions that are the last of several in a chat"""
    bad: Counter = field(default_factory=Counter)
    """kinds of reasons why rows can't be used, of those that show already"""
    unseen: list[str] = field(default_factory=list)
    """columns that are not read and look like pictures"""
    tried: int = 0
    unmet: list[str] = field(default_factory=list)
    """golds, of those tried, that no response can meet"""
    unread: list[str] = field(default_factory=list)
    """rows whose answer is no gold"""
    hardly: Counter = field(default_factory=Counter)
    """kinds of golds that a response will hardly meet"""

    def note(self, counted: str) -> str:
        """What of it is worth a word at the start of a run; `counted` is how golds that are numbers are read."""
        bad = f"rows that can't be used: {_kinds(self.bad)}" if self.bad else ""
        of = f"{self.tried} golds" if self.tried == self.golds else f"the first {self.tried} of {self.golds} golds"
        unmet = f"{len(self.unmet)} of {of} can never be met, such as {self.unmet[0]}" if self.unmet else ""
        unread = f"answers that are several or no text: {len(self.unread)}" if self.unread else ""
        unread += f", as of {self.unread[0]}" if self.unread else ""
        follow = f"last of several questions in a chat, and asked alone: {self.follow}" if self.follow else ""
        hardly = f"golds that can hardly be met: {_kinds(self.hardly)}" if self.hardly else ""
        return "; ".join(filter(None, (bad, follow, counted, unread, unmet, hardly)))


def survey(table: datasets.Dataset, chosen: list[int], uids: list[str], layout: Layout) -> Survey:
    """Read the chosen rows of a table, but for their pictures."""
    seen, wanted, columns = Survey(), {*chosen}, layout.columns
    names = {columns.question, columns.answer, columns.choices, *columns.letters, *columns.pictures, *columns.numbered}
    names |= {*columns.files, *columns.videos, *columns.others, FOLDER, BROKEN}
    part = table.select_columns([name for name in table.column_names if name in names])
    for i, row in zip(range(max(chosen, default=-1) + 1), cells.survey(part), strict=False):
        if i not in wanted:
            continue
        try:
            read = read_row(uids[i], row, layout)
            if read.picture is not None:
                layout.files.check(uids[i], read.picture, row.get(FOLDER))
                seen.pictures += 1
        except BadRow as bad:
            seen.bad[bad.reason.partition(":")[0]] += 1
            if isinstance(bad, Unseen) and bad.column not in seen.unseen:
                seen.unseen.append(bad.column)
            continue
        seen.follow += read.follows
        if read.unread:
            seen.unread.append(uids[i])
        if read.gold is not None:
            seen.golds += 1
            if seen.tried < MAX_KEYS:
                seen.tried += 1
                if why := golds.unmet(read.gold, read.options):
                    seen.unmet.append(f"{why} ({uids[i]})")
                elif why := golds.hardly_met(read.gold, read.options, read.text):
                    seen.hardly[why] += 1
    return seen


def none_good(questions: Questions, empty: str) -> str:
    """Why a set has no good row; `empty` is the name of one that has no row at all."""
    kinds = Counter(reason.split(":")[0] for reason in questions.bad.values())
    counts = _kinds(kinds) or "two rows are needed to hold one out"
    if empty:
        counts = f"{empty} holds no row of it. Expected are {files.FORMS}, with a row a question"
    return f"none of its {len(questions)} rows is good: {counts}. {questions.report_bad() or ''}".rstrip()


def _kinds(reasons: Counter) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in reasons.most_common())
