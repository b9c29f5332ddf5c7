"""Turns of a chat, as verl, TRL and LLaMA-Factory write them: the last one of the user is the question.

A turn is {"role", "content"} or {"from", "value"}. Its content is a text, or parts: {"type": "text", "text": …} and
pictures, {"type": "image"} with or without one in it. Turns before the last count for pictures only.
"""

from typing import NamedTuple

from upt.data.columns import is_nothing, unwritten
from upt.data.marks import Marks, take_out
from upt.data.pictures import held
from upt.data.questions import BadRow

USER, ASSISTANT = ("user", "human"), ("assistant", "gpt", "model", "bot", "chatgpt")


class Asked(NamedTuple):
    """What a chat asks: the text without marks, marks and pictures of all turns, and the answer that follows.

    `follows` says whether the user has asked something before.
    """

    text: str
    marks: Marks
    pictures: list[bytes | str]
    reply: str | None = None
    follows: bool = False


def turns(cell) -> list[tuple[str, object]] | None:
    """(role, content) of each turn; None for a cell that is no chat."""
    cell = unwritten(cell)
    if isinstance(cell, dict):  # one turn; or a list for each field, as older versions of `datasets` store turns
        columns = [value if isinstance(value, list) else [value] for value in cell.values()]
        cell = [dict(zip(cell, fields, strict=False)) for fields in zip(*columns, strict=False)]
    if not isinstance(cell, list) or not all(isinstance(turn, dict) for turn in cell):
        return None
    found = [(turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))) for turn in cell]
    return [(str(role).lower(), content) for role, content in found] if found and all(r for r, _ in found) else None


def asked(uid: str, chat: list[tuple[str, object]]) -> Asked:
    """Raises BadRow for a chat in which no user asks."""
    last = max((i for i, (role, _) in enumerate(chat) if role in USER), default=None)
    if last is None:
        raise BadRow(uid, f"no turn of the user among {', '.join(role for role, _ in chat)[:80]}")
    text, marks, pictures = "", Marks(), []
    for role, content in chat[: last + 1]:
        if role not in ASSISTANT:
            text, here, held_here = _content(uid, content)
            marks, pictures = marks + here, pictures + held_here
    reply = next((content for role, content in chat[last + 1 :] if role in ASSISTANT), None)
    return Asked(text, marks, pictures, words(reply) or None, any(role in USER for role, _ in chat[:last]))


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
        kind = str(part.get("type") or "text").lower() if isinstance(part, dict) else "text"
        if "video" in kind or "audio" in kind:
            raise BadRow(uid, f"{kind.replace('_', ' ')} is not supported")
        if "image" in kind:
            marks += Marks(("",))
            pictures += held(uid, {key: value for key, value in part.items() if key not in ("type", "text")})
        else:
            text, of_text = take_out(words([part]))
            marks += of_text
            texts.append(text)
    return "\n".join(filter(None, texts)), marks, pictures
