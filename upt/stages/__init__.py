"""The stages of a step as functions on groups: sampling, judging, asking; and rounds of asking and training."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules={"asking", "judging", "rounds", "sampling", "steps"}
)
