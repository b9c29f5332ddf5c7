"""The folder `kernels` and Hugging Face's package of that name in one process, whichever is imported first.

Each test is a fresh Python, which asserts; what it needs of the package is what transformers and bitsandbytes do.
"""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dependency_versions_table import deps

ROOT = Path(__file__).resolve().parents[1]
BESIDE = Path(os.environ.get("UPT_BESIDE", ROOT / ".venv" / "beside"))  # where `make setup` puts theirs
HOME = (BESIDE / "kernels").resolve()
pytestmark = pytest.mark.skipif(not HOME.is_dir(), reason=f"Hugging Face's kernels is not in {BESIDE}: make setup")
START = f"""
import importlib.metadata, importlib.util, sys
from pathlib import Path

ROOT, HOME = Path({str(ROOT)!r}), Path({str(HOME)!r})


def home(module):
    return Path(module.__file__).resolve().parent
"""
THEIRS = """
import kernels as theirs
import kernels.layer as layer
from kernels import get_kernel

assert home(theirs) == HOME
"""
LATE = """
sys.path.insert(0, str(ROOT))
from upt.kernel_names import claim

claim()
"""
TRANSFORMERS = f"""
def version(name, real=importlib.metadata.version):
    return {re.search("[0-9][0-9.]*", deps["kernels"])[0]!r} if name == "kernels" else real(name)


importlib.metadata.version = version  # as if theirs had the version that this transformers asks for
from transformers.utils import is_kernels_available
from transformers.integrations import hub_kernels
from kernels import Mode, get_kernel

assert is_kernels_available()
assert hub_kernels.get_kernel_hub is get_kernel and hub_kernels.Mode is Mode
"""
BOTH = """
import kernels
import kernels.layer
import kernels.loss
from kernels import Mode, get_kernel, layer, linear_logprob, loss, __version__
from kernels.layer import Mode as mode

assert home(kernels) == home(loss) == ROOT / "kernels" and HOME in (home(layer), home(layer).parent)
assert linear_logprob.__module__ == "kernels.logprob" and Mode is mode
assert HOME in Path(sys.modules[get_kernel.__module__].__file__).resolve().parents
assert kernels.layer is layer and kernels.loss is loss and __version__
assert kernels.__all__ == list(kernels.MODULES)
"""


def slowly(*values: str) -> list:
    """More cases of the same, each seconds of importing transformers."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


HELD = "all of it held"  # said last, by code whose own assertions have passed


def run(code: str, folder: Path, *path: Path | str) -> str:
    """What Python says to `code` after START, run in `folder`, where it looks for modules first, then in `path`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "UPT_KERNELS", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", f"{START}{code}\nprint({HELD!r})"],
        cwd=folder,
        env=kept | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() + done.stderr


def test_no_name_is_claimed_by_both():
    ours = {module.name for module in pkgutil.iter_modules([str(ROOT / "kernels")])}
    modules = {module.name for module in pkgutil.iter_modules([str(HOME)])}
    assert {"loss", "namesake"} <= ours and "layer" in modules
    run(
        f"""
import kernels

ours, modules = {ours!r}, {modules!r}
names = {{*ours, *kernels.MODULES, *vars(kernels)}}
assert names.isdisjoint(modules), names & modules
kernels.NAMESAKE.load()
names = {{name for name in names if not name.startswith("__")}} & set(kernels.NAMESAKE.module.__all__)
assert not names, names
""",
        ROOT,
        BESIDE,
    )


def test_ours_first():
    run(BOTH, ROOT, BESIDE)
    run(
        "import kernels\nassert kernels.layer is sys.modules['kernels.layer'] and home(kernels.layer.mode)",
        ROOT,
        BESIDE,
    )


@pytest.mark.parametrize("first", ["import kernels\n", *slowly("", "from kernels import loss\n")])
def test_ours_first_and_then_transformers(first):
    assert HELD in run(first + TRANSFORMERS + BOTH, ROOT, BESIDE)


def test_importing_ours_is_cheap():
    run("import kernels\nassert {'torch', 'huggingface_hub', 'kernels.layer'}.isdisjoint(sys.modules)", ROOT, BESIDE)


def test_only_their_names_run_theirs():
    run(
        """
import inspect, pickle
import kernels
from kernels import linear_logprob, logprob_triton, loss


class Nameless:
    __module__ = None


nameless = Nameless()
pickle.dumps(linear_logprob), pickle.loads(pickle.dumps(kernels.common.Rows(*range(7))))
assert pickle.whichmodule(nameless, "no_such_name") == "__main__"
assert inspect.getmodule(linear_logprob) is kernels.logprob
inspect.getmembers(kernels), inspect.getsource(kernels), inspect.unwrap(kernels), repr(kernels), dir(kernels)
for name in ("__warningregistry__", "_pytestfixturefunction", "nonsense", "sampling_triton"):
    assert not hasattr(kernels, name), name
assert kernels.NAMESAKE.module is None and "kernels.layer" not in sys.modules
assert hasattr(kernels, "get_kernel") and kernels.NAMESAKE.module is not None and "kernels.layer" in sys.modules
assert not hasattr(kernels, "nonsense")
""",
        ROOT,
        BESIDE,
    )


def test_an_error_in_theirs_is_shown_and_tried_again():
    run(
        """
import kernels

sys.modules["huggingface_hub"] = None
for _ in range(2):
    try:
        from kernels import get_kernel
    except ModuleNotFoundError as error:
        assert "huggingface_hub" in str(error)
    else:
        raise AssertionError("no error")
del sys.modules["huggingface_hub"]
"""
        + BOTH,
        ROOT,
        BESIDE,
    )


def test_theirs_first(tmp_path):
    same = """
theirs.patched = object()
assert kernels.patched is theirs.patched
assert kernels is not theirs and layer is sys.modules["kernels.layer"] is kernels.layer is theirs.layer
assert kernels.get_kernel is theirs.get_kernel is held
ours = kernels
claim()
assert sys.modules["kernels"] is ours
"""
    run(THEIRS + "held = get_kernel\n" + LATE + BOTH + same, tmp_path, BESIDE)


@pytest.mark.parametrize("module", ["train_upt", "upt", *slowly("rollout", "rewards", "ablate")])
def test_a_script_imported_after_theirs(tmp_path, module):
    """As in a notebook: theirs is imported, by transformers say, or would be found first, and then comes a script."""
    ask = f"import {module}\n" + BOTH
    assert HELD in run("import kernels\nsys.path.insert(0, str(ROOT))\n" + ask, tmp_path, BESIDE)
    assert HELD in run("sys.path.append(str(ROOT))\n" + ask, tmp_path, BESIDE)


def test_the_library_that_peft_imports_complains_of_nothing(tmp_path):
    assert run("sys.path.insert(0, str(ROOT))\nimport rewards\nimport bitsandbytes", tmp_path) == HELD


def test_theirs_first_by_transformers(tmp_path):
    assert HELD in run(TRANSFORMERS + THEIRS + LATE + BOTH + TRANSFORMERS, tmp_path, BESIDE)


def test_theirs_would_be_found_first(tmp_path):
    """The root at the end of sys.path: theirs is not imported yet, but would be."""
    late = "sys.path.append(str(ROOT))\nfrom upt.kernel_names import claim\nclaim()\n"
    assert HELD in run(late + BOTH, tmp_path, BESIDE)


def test_claiming_what_is_ours_changes_nothing():
    run(
        "from upt.kernel_names import claim\nclaim()\nassert not [n for n in sys.modules if n[:7] == 'kernels']",
        ROOT,
        BESIDE,
    )
    run(
        "import kernels\nfrom upt.kernel_names import claim\nclaim()\nassert sys.modules['kernels'] is kernels",
        ROOT,
        BESIDE,
    )


def test_another_checkout_is_not_theirs(tmp_path):
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    run(BOTH, ROOT, tmp_path, BESIDE)


@pytest.mark.parametrize("late", [False, True])
def test_bitsandbytes(late, tmp_path):
    """It asks for get_kernel as it is imported, on a CPU with bf16 instructions; only a warning says that it failed."""
    before = """
import kernels
from kernels import get_kernel

asked, theirs = [], kernels.NAMESAKE.module if home(kernels) == ROOT / "kernels" else kernels
theirs.get_kernel = lambda *names, **options: asked.append(names)  # instead of the network
"""
    after = """
import bitsandbytes
from bitsandbytes.functional import has_avx512bf16
from kernels import get_kernel, linear_logprob

get_kernel("one more")
assert [len(names) for names in asked] == [1] * (1 + has_avx512bf16()), asked
"""
    said = run(before + LATE + after, tmp_path, BESIDE) if late else run(before + after, ROOT, BESIDE)
    assert "cannot import name" not in said


def test_without_theirs():
    run(
        """
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.integrations import hub_kernels
from transformers.utils import is_kernels_available
import bitsandbytes, kernels
from kernels import linear_logprob, loss
from upt.kernel_names import claim

claim()
assert not is_kernels_available()
assert sys.modules["kernels"] is kernels and not hasattr(kernels, "get_kernel")
assert importlib.util.find_spec("kernels.layer") is None and kernels.__path__ == [str(ROOT / "kernels")]
try:
    from kernels import get_kernel
except ImportError as error:
    assert "cannot import name 'get_kernel'" in str(error)
else:
    raise AssertionError("there is one")
""",
        ROOT,
    )


def test_pytest_finds_ours():
    """In this very process, which is `python -m pytest` from the root."""
    import kernels
    from kernels import linear_logprob

    assert Path(kernels.__file__).parent == ROOT / "kernels" and linear_logprob.__module__ == "kernels.logprob"
