"""What only `make test-extras` installs. There, with EXTRAS set, a test that misses some of it fails."""

import importlib
import os
from types import ModuleType
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Leave out a test for want of something; under `make test-extras` it fails."""
    (pytest.fail if os.environ.get("EXTRAS") else pytest.skip)(what)


def extra(name: str) -> ModuleType:
    """A package by its name."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing(f"{name} is not installed: make test-extras")
