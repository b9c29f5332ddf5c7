"""Turns of a chat, as verl, TRL and LLaMA-Factory write them: the last one of the user is the question.

A turn is {"role", "content"} or {"from", "value"}. Its content is a text, or parts: {"type": "text", "text": …} and
pictures, {"type": "image"} with or without one in it. Turns before the last count for pictures only.
"""

from typing import NamedTuple

from upt.data.columns import IMAGE, NUMBERED, VIDEO, is_nothing, pick, unwritten
from upt.data.marks import Marks, take_out
from upt.data.pictures import has_video, held, likely
from upt.data.questions import BadRow

USER, ASSISTANT = ("user", "human"), ("assistant", "gpt", "model", "bot", "chatgpt")
_OWN = ("role", "from", "content", "value")  # fields of a turn that are read


class Asked(NamedTuple):
    """What a chat asks: the text without marks, marks and pictures of all turns, and the answer that follows.

    `follows` says whether the user has asked something before.
    """

    text: str
    marks: Marks
    pictures: list[bytes | str]
    reply: str | None = None
    follows: bool = False


class Turn(NamedTuple):
    role: str
    content: object
    beside: dict
    """what else the turn has: pictures, with some"""


def turns(cell) -> list[Turn] | None:
    """The turns of a chat; None for a cell that is none."""
    cell = unwritten(cell)
    if isinstance(cell, dict):  # one turn; or a list for each field, as older versions of `datasets` store turns
        columns = [value if isinstance(value, list) else [value] for value in cell.values()]
        cell = [dict(zip(cell, fields, strict=False)) for fields in zip(*columns, strict=False)]
    if not isinstance(cell, list) or not all(isinstance(turn, dict) for turn in cell):
        return None
    roles = [turn.get("role") or turn.get("from") for turn in cell]
    if not roles or not all(roles):
        return None
    return [
        Turn(str(role).lower(), turn.get("content", turn.get("value")), {k: turn[k] for k in turn if k not in _OWN})
        for role, turn in zip(roles, cell, strict=True)
    ]


def asked(uid: str, chat: list[Turn]) -> Asked:
    """Raises BadRow for a chat in which no user asks."""
    last = max((i for i, turn in enumerate(chat) if turn.role in USER), default=None)
    if last is None:
        raise BadRow(uid, f"no turn of the user among {', '.join(turn.role for turn in chat)[:80]}")
    text, marks, pictures = "", Marks(), []
    for turn in chat[: last + 1]:
        if turn.role not in ASSISTANT:
            text, here, held_here = _content(uid, turn.content)
            marks, pictures = marks + here, pictures + held_here + _pictures(uid, turn.beside)
    reply = next((turn.content for turn in chat[last + 1 :] if turn.role in ASSISTANT), None)
    return Asked(text, marks, pictures, words(reply) or None, any(turn.role in USER for turn in chat[:last]))


def words(content) -> str:
    """The texts of a turn's content."""
    content = unwritten(content)
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text", part.get("content")) if isinstance(part, dict) else part for part in parts]
    return "\n".join(str(text) for text in texts if not is_nothing(text))


def _content(uid: str, content) -> tuple[str, Marks, list[bytes | str]]:
    content = unwritten(content)
    texts, marks, pictures = [], Marks(), []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict):
            kind = str(part.get("type") or "text").lower()
            if "video" in kind or "audio" in kind:
                raise BadRow(uid, f"{kind.replace('_', ' ')} is not supported")
            rest = {key: value for key, value in part.items() if key not in ("type", "text", "content")}
            shown = any(word in kind for word in ("image", "img", "picture", "photo"))
            here = held(uid, rest) if shown else _pictures(uid, rest)
            marks, pictures = marks + Marks(("",) * max(len(here), shown)), pictures + here
            if shown or (here and "text" not in part):
                continue
            if "text" not in part and "content" not in part:
                raise BadRow(uid, f"neither text nor a picture: part of {', '.join(map(str, part))} in a turn")
        text, of_text = take_out(words([part]))
        marks += of_text
        texts.append(text)
    return "\n".join(filter(None, texts)), marks, pictures


def _pictures(uid: str, fields: dict) -> list[bytes | str]:
    """The pictures in fields of a turn or a part, by the names that columns have or by their looks."""
    if any(not is_nothing(fields[key]) for key in fields if pick([str(key)], VIDEO)) or has_video(fields):
        raise BadRow(uid, "video and audio are not supported")
    named = [held(uid, fields[key]) for key in fields if pick([str(key)], IMAGE) or NUMBERED.fullmatch(str(key))]
    return [picture for pictures in named for picture in pictures] or likely(fields)
