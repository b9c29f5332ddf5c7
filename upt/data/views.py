"""Views of a picture, by name, that change no answer: what the second half of a group sees with `--view`.

Each is a function of an RGB picture, the same pixels every time. None of them mirrors, turns or crops: left and right
would change places, a letter could not be read, a shape at the edge not be counted.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from upt.data.questions import Question, Questions
from upt.errors import SettingError

if TYPE_CHECKING:
    from PIL import Image


def brighter(image: "Image.Image") -> "Image.Image":
    """A tenth of the way to white. Unlike a factor it cuts nothing off at 255, where two colours would become one."""
    return image.point(lambda value: round(0.9 * value + 25.5))


def faded(image: "Image.Image") -> "Image.Image":
    """With nine tenths of its contrast and colour, around its mean grey."""
    from PIL import ImageEnhance

    return ImageEnhance.Contrast(image).enhance(0.9)


def scaled(image: "Image.Image") -> "Image.Image":
    """1.15 times its size, rounded up. A picture that is over --max-pixels is brought down to that all the same."""
    return image.resize(tuple(-(-23 * side // 20) for side in image.size))  # bicubic


def padded(image: "Image.Image") -> "Image.Image":
    """With a border, a sixteenth of its longer side wide, in the median colour of its edge."""
    from PIL import ImageOps

    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])  # (2 W + 2 H, 3)
    colour = tuple(int(value) for value in np.median(edge, axis=0))
    return ImageOps.expand(image, -(-max(image.size) // 16), colour)


VIEWS: dict[str, Callable] = {
    "brighter": brighter,
    "faded": faded,
    "scaled": scaled,
    "padded": padded,
}


def shown(question: Question) -> list[Question]:
    """The question as it is; and, where it has a picture and a view, with its picture in that view."""
    if question.view is None or question.image is None:
        return [question]
    return [question, replace(question, image=VIEWS[question.view](question.image))]


def without_view(questions: Questions, view: str) -> str | None:
    """One line on the questions that have no picture, hence no view; None if there are none.

    Raises SettingError where no question has one.
    """
    if not questions.pictures:
        raise SettingError(f"--view {view}: the questions of {questions.name} have no pictures; leave it out")
    missing = len(questions) - questions.pictures
    alike = f"{missing} of {len(questions)} questions have no picture: all their responses see the same"
    return f"--view {view}: {alike}" if missing else None
