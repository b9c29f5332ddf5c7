"""Progress bars: on a terminal, and as widgets in a notebook. Elsewhere lines of text are enough."""

import sys

from tqdm.auto import tqdm
from tqdm.std import tqdm as text_bar

from upt.run.team import Team


def bar(*args, **options) -> tqdm:
    """A `tqdm` bar that stays away where it could not redraw itself."""
    is_widget = any(c.__module__ == "tqdm.notebook" for c in tqdm.__mro__)
    return tqdm(*args, disable=not (is_widget or sys.stderr.isatty()), dynamic_ncols=not is_widget, **options)


def advance(bar: tqdm, count: int, team: Team) -> None:
    """Take a bar further by what this process has done, and as much for each of the others, up to its end."""
    bar.update(min(count * team.size, bar.total - bar.n))


def say(text: str, file=None) -> None:
    """A line of text that does not cut through a bar."""
    text_bar.write(text, file=file or sys.stdout)
