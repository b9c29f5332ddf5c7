"""The texts that a model is shown: one from prompts/ by name, or a file of the user's own.

They are read and checked here, before a model is loaded.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from upt.errors import PolicyError, suggest

PROMPTS = Path(__file__).parents[1] / "prompts"
OTHERS = ("judge", "ask-", "extract")  # prompts that are not put around a question
TURN = re.compile(r"^\[(user|assistant)\]\n", re.M)


def find(name: str, kind: str, fix: str) -> tuple[Path, str]:
    """Path and text of the prompt `name`; `kind` and `fix` are for the message of the PolicyError."""
    path = PROMPTS / f"{name}.md"
    path = path if path.is_file() else Path(name).expanduser()
    if not path.is_file():
        near = suggest(name, [p.stem for p in PROMPTS.glob("*.md")])
        raise PolicyError(f"no {kind} {name!r}: {fix}{near}")
    try:
        return path, path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def template(name: str) -> str:
    """The text put around a question, which stands where `{question}` is."""
    known = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.md") if not p.stem.startswith(OTHERS)))
    path, text = find(name, "prompt", f"give one of {known}, or the path of a file with {{question}} in it")
    if "{question}" not in text:
        raise PolicyError(f"{path} has no {{question}}: put it where the question is to stand")
    if "{response}" in text:
        raise PolicyError(f"{path} is a judge's prompt: give it as --judge-prompt")
    return text


def judge_turns(name: str) -> list[tuple[str, str]]:
    """The (role, text) turns of a judge prompt.

    A file is one user turn, unless lines `[user]` and `[assistant]` divide it into several.
    """
    path, text = find(name, "judge prompt", "give judge, judge-tiny, or a file with {question}, {response}")
    first, *rest = TURN.split(text)
    turns = [*zip(rest[::2], rest[1::2], strict=True)]
    if first.strip():
        turns.insert(0, ("user", first))
    if text.count("{question}") < 1 or text.count("{response}") != 1:
        raise PolicyError(f"{path}: a judge prompt needs {{question}}, and {{response}} exactly once")
    if text.index("{question}") > text.index("{response}"):
        raise PolicyError(f"{path}: {{question}} must stand before {{response}}, so that candidates share it")
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise PolicyError(f"{path}: turns must go user, assistant, …, user")
    return [(role, part.strip()) for role, part in turns]


def judge_digest(name: str) -> str:
    """SHA-256 of a judge prompt's turns: a file of that name may change between two runs."""
    return hashlib.sha256(json.dumps(judge_turns(name)).encode()).hexdigest()


def asking(mode: str, name: str | None = None) -> str:
    """The text that asks for a question. In context, `{question}` stands for the source question.

    `name` is one in prompts/ or a file; None is this mode's own. Raises PolicyError for one that is not for `mode`.
    """
    fix = "give the name of a file in prompts/, or a path, as --ask-prompt"
    path, text = find(name or f"ask-{mode}", "prompt", fix)
    if ("{question}" in text) != (mode == "in-context"):
        wanted = "needs {question}, the source question" if mode == "in-context" else "shows no {question}"
        raise PolicyError(f"{path}: a prompt for --mode {mode} {wanted}")
    return text


def asking_digest(mode: str, name: str | None) -> str:
    """Digest of the text that asks, so that a run notices when the file has changed."""
    return hashlib.sha256(asking(mode, name).encode()).hexdigest()[:16]


def with_options(question: str, choices: Sequence[str] | None) -> str:
    """A question's text with its options, a line each: `A. …`, `B. …`."""
    return question + "".join(f"\n{chr(ord('A') + i)}. {text}" for i, text in enumerate(choices or ()))


def without(text: str, tokens: Iterable[str]) -> str:
    """A text without these tokens, even where one shows only when another is taken out."""
    tokens, before = [*tokens], None
    while before != text:
        before = text
        for token in tokens:
            text = text.replace(token, "")
    return text
