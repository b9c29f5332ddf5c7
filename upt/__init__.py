"""The library behind the scripts. Imports run downwards only: scripts -> eval -> upt -> kernels.

    answers    from a response to its vote key
    data       questions by name, hub id or path
    groups     a question with its responses: shards on disk, votes, named variants, filters, statistics
    model      the policy: families of models, packed forward pass, decoding, update
    stages     sampling, judging, asking, and rounds of them, as functions on groups
    compare    reward variants beside each other, on saved groups or by training
    reckoning  what a run needs: memory, slots, seconds, by formulas
    run        settings and presets, checkpoints and metrics, the command line

Importing it loads none of torch, transformers and datasets: modules that need them are imported at their first use.
"""

import importlib.util
import logging
import os
import sys

if importlib.util.find_spec("lazy_loader") is None:
    fix = "run `make setup`, then use .venv/bin/python"
    raise ModuleNotFoundError(f"the packages of requirements.txt are not installed for {sys.executable}: {fix}")

from upt import kernel_names  # noqa: E402

# Idle OpenMP threads spin, and on a shared machine they spin where others would compute (docs/speed.md). This is read
# when torch is loaded; a setting of the user's own wins.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

# Batches of other sizes at every step leave holes in a GPU's memory, unless its segments can grow. Read and kept alike.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

kernel_names.claim()

# PEFT imports bitsandbytes, which then complains of a faster kernel for CPUs that it could not fetch from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())
