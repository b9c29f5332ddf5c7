"""A run: its settings, what it writes down to go on later, how it is watched, stopped and started from a shell."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules={
        "checkpoints",
        "cli",
        "ending",
        "health",
        "locking",
        "metrics",
        "presets",
        "progress",
        "resuming",
        "settings",
        "starting",
        "stopping",
        "typed",
    },
)
