"""Packages that only `make test-extras` installs. There, with EXTRAS set, a test of one that is missing fails."""

import importlib
import os
from types import ModuleType

import pytest


def extra(name: str) -> ModuleType:
    """A package by its name; without it a test is left out, under `make test-extras` it fails."""
    if os.environ.get("EXTRAS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: make test-extras")
