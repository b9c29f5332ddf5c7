"""A question, and the questions of one split. Pictures are decoded when a question is asked for, not before."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


class BadRow(ValueError):
    """One row can't be used. `reason` reads `kind` or `kind: detail`."""

    def __init__(self, uid: str, reason: str):
        super().__init__(f"{uid}: {reason}")
        self.uid, self.reason = uid, reason


@dataclass(frozen=True, eq=False)
class Question:
    """One question as the model sees it, and the gold answer for diagnostics. Compared by identity."""

    uid: str
    question: str  # without image placeholders
    choices: list[str] | None  # the option texts in order A, B, …
    image: "Image.Image | None"  # RGB; None for a text-only question
    gold: str | None
    kind: str | None = None  # kind of question, where the set has several
    view: str | None = None  # in which the second half of its responses sees the picture (views.py)


class Questions:
    """The questions of one split. `read(i)` gives what question i is made of, or raises `BadRow`; `note` goes along.

    `pictures` is how many of them have a picture, as far as shows without opening one.
    """

    def __init__(
        self, name: str, split: str, uids: list[str], read: Callable, has_gold: bool, note: str, pictures: int
    ):
        self.name, self.split, self.uids, self.has_gold, self.note = name, split, uids, has_gold, note
        self.pictures = pictures
        self.bad: dict[str, str] = {}  # uid → reason, of the rows met so far
        self.weights: list[tuple[int, float]] | None = None  # (rows, weight) of sets that are drawn by weight
        self.stored: Callable[[], Iterator[dict]] | None = None  # the rows as they lie there (fingerprint.py)
        self._read, self._blind, self._labelled = read, False, False

    def __len__(self) -> int:
        return len(self.uids)

    def __getitem__(self, i: int) -> Question:
        try:
            q = self._read(i)
            if self._labelled and q.gold is None:
                raise BadRow(q.uid, "no gold answer")
            return Question(q.uid, q.question, q.choices, q.image, None if self._blind else q.gold, q.kind)
        except BadRow as bad:
            self.bad[bad.uid] = bad.reason
            raise

    def __iter__(self) -> Iterator[Question]:
        return (question for i in range(len(self)) for question in self.get([i]))

    def get(self, indices: Iterable[int]) -> list[Question]:
        """The good questions among these rows, in this order; the others are recorded in `bad`."""
        found = []
        for i in indices:
            with suppress(BadRow):
                found.append(self[i])
        return found

    def without_gold(self) -> "Questions":
        """The same questions with every gold None."""
        blind = copy.copy(self)
        blind.bad, blind.has_gold, blind._blind = dict(self.bad), False, True
        return blind

    def with_gold(self) -> "Questions":
        """The same questions, of which those without gold are bad rows."""
        labelled = copy.copy(self)
        labelled.bad, labelled._labelled = dict(self.bad), True
        return labelled

    def describe(self) -> str:
        """One line for the start of a run: how many questions, which rows of the set, whether there is gold."""
        seen = "all" if self.pictures == len(self) else str(self.pictures) if self.pictures else "none"
        no_gold = "" if self.has_gold else "no gold answers: label-free metrics only"
        much = f"{self.name}/{self.split}: {len(self)} questions, {seen} with a picture"
        return "; ".join(filter(None, (much, self.note, no_gold)))

    def report_bad(self, show: int = 3) -> str | None:
        """One line on the bad rows met so far, the first few by uid and reason; None if there are none."""
        shown = [f"{uid} ({reason})" for uid, reason in list(self.bad.items())[:show]]
        more = [f"and {len(self.bad) - show} more"] if len(self.bad) > show else []
        counted = f"{self.name}/{self.split}: {len(self.bad)} of {len(self)} rows skipped: "
        return counted + "; ".join(shown + more) if self.bad else None
