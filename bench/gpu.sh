#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in one go: the tests marked gpu, the kernels beside their peers, the loop at full size.
#
#     bash bench/gpu.sh                                # about 15 minutes on an H200
#     MODEL=qwen2.5-vl-3b-random bash bench/gpu.sh     # the full-size loop with another model, see bench/fullsize.py
#
# Results go to bench/results/. Peers that are not installed are left out; `make bench-gpu` installs them first. PYTHON
# names the interpreter, by default that of .venv, where `make setup` made one; LIMIT is in seconds, for each part.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONUNBUFFERED=1
failed=0

part() {
    echo "== $*"
    timeout "${LIMIT:-1200}" "$@" || { echo "== FAILED: $*"; failed=1; }
}

part "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no NVIDIA GPU is visible to torch"; print(torch.cuda.get_device_name())'
[ "$failed" = 0 ] || exit 1
part "$PYTHON" -m pytest -q -m gpu tests
part "$PYTHON" -m bench.kernels --save
part "$PYTHON" -m bench.fullsize --model "${MODEL:-qwen2.5-vl-7b-random}" --save
exit "$failed"
