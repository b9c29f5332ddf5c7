"""`kernels` is this repository's folder, also where Hugging Face's package of the same name was found first.

That happens in a notebook which imports transformers before it puts the repository on sys.path, or puts it at the end:
`from kernels import linear_logprob` would then look in theirs. It can't be settled behind `import kernels`, which is
theirs at that point.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "kernels"


def claim() -> None:
    """Make `kernels` ours, with theirs behind it; nothing changes if it is ours, or would be when it is imported.

    Theirs stays what it was for those who hold it: names that are not ours are looked up in that very module, and its
    submodules that are imported stay so.
    """
    theirs = sys.modules.get("kernels")
    spec = theirs.__spec__ if theirs else PathFinder.find_spec("kernels")
    if spec and spec.origin and os.path.realpath(spec.origin) == str(FOLDER / "__init__.py"):
        return
    spec = spec_from_file_location("kernels", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    ours = module_from_spec(spec)
    sys.modules["kernels"] = ours
    try:
        spec.loader.exec_module(ours)
    except BaseException:
        del sys.modules["kernels"]
        if theirs:
            sys.modules["kernels"] = theirs
        raise
    if theirs:
        ours.stand_for(theirs)
