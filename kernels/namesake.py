"""The other package called `kernels`: Hugging Face's, which transformers and bitsandbytes import by that name.

One process can want both, and only one module can be `kernels`. It is ours, and it stands for theirs as well: its
__path__ ends with their folder, so that `import kernels.layer` finds their module, and a name that is not ours is
looked up in their __init__.py. That file runs when one of its names is first asked for, as a module of the same name
that is not in sys.modules; what it imports from `kernels` in turn comes by the same two ways.

Where theirs was imported before this folder was on sys.path, see upt/kernel_names.py.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from threading import RLock
from types import ModuleType


class Namesake:
    """The next package called `name` along sys.path, if there is one. `folders` is where its modules are."""

    def __init__(self, name: str):
        self.name = name
        self.spec = find(name)
        self.folders = list(self.spec.submodule_search_locations) if self.spec else []
        self.module: ModuleType | None = None
        self.lock = RLock()  # of one thread: their __init__.py may ask for its own names while it runs

    def adopt(self, module: ModuleType) -> None:
        """Take theirs as it was imported already, so that every name remains the object that it was."""
        self.module = module
        self.folders = list(getattr(module, "__path__", []))

    def attribute(self, name: str):
        """What `name` is in theirs. Raises AttributeError where it is nothing, without running theirs to find out."""
        with self.lock:
            if self.module is None and self.spec and self.mentions(name):
                self.load()
        if self.module is not None:
            if hasattr(self.module, name):
                return getattr(self.module, name)
            if submodule := sys.modules.get(f"{self.name}.{name}"):  # Python makes it an attribute of ours only
                return submodule
        raise AttributeError(f"module {self.name!r} has no attribute {name!r}")

    def mentions(self, name: str) -> bool:
        """Whether their __init__.py could have `name`: pickle, inspect and hasattr ask any module for anything."""
        code = self.spec.loader.get_code(self.name)
        anything = "__getattr__" in code.co_names or ("*",) in code.co_consts  # the latter is `from … import *`
        return anything or not {name, f"{self.name}.{name}"}.isdisjoint(code.co_names)

    def load(self) -> None:
        self.module = module_from_spec(self.spec)
        try:
            self.spec.loader.exec_module(self.module)
        except BaseException:
            self.module = None  # the next one to ask gets the same error, not half a module
            raise


def find(name: str) -> ModuleSpec | None:
    """The first package `name` along sys.path that is neither this one nor another checkout of it."""
    for entry in sys.path:
        spec = PathFinder.find_spec(name, [entry])
        folders = spec.submodule_search_locations if spec and spec.has_location else None
        if folders and not os.path.exists(os.path.join(folders[0], os.path.basename(__file__))):
            return spec
    return None
