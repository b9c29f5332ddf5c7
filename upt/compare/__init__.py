"""Reward variants beside each other: offline on saved groups, or by training with each."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules={"offline", "sweep"})
