"""The embedded model's making: what it is shown, what it is built of, and how it is taught."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules={"curriculum", "demonstrations", "lessons", "muon", "tiny"}
)
