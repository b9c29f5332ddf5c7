#!/usr/bin/env bash
# All that needs an NVIDIA GPU, what is worth most first.
#
#     bash bench/gpu.sh                                # all parts, at most half an hour
#     bash bench/gpu.sh decoding step                  # some of them
#     MODEL=qwen2.5-vl-3b-random bash bench/gpu.sh     # another model, see bench/random_model.py
#     MODEL=tiny-random bash bench/gpu.sh              # to try this script, without a GPU too; nothing is saved
#
#     tests      those marked gpu
#     decoding   64, 128 and 256 slots beside HF generate (bench/decoding.py)
#     step       a whole step of the loop (bench/fullsize.py)
#     update     variable-length attention beside dense masks (bench/update.py)
#     kernels    each kernel beside its peers (bench/kernels.py)
#
# A part that fails, or takes more than LIMIT seconds (350), does not keep the others from running; what it has measured
# by then is printed, and saved in bench/results/. Peers that are not installed are left out; `make bench-gpu` installs
# them first. PYTHON names the interpreter, by default that of .venv, where `make setup` made one.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONUNBUFFERED=1
MODEL=${MODEL:-qwen2.5-vl-7b-random}
failed=

part() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    timeout --kill-after=10 "${LIMIT:-350}" "$PYTHON" "$@" || { echo "== FAILED: $name"; failed="$failed $name"; }
    echo "== $name: $((SECONDS - start)) s"
}

decoding=(--save) step=(--save) update=(--save) kernels=(--save)
if [ "$MODEL" = tiny-random ]; then
    decoding=(--slots 8 16 --group-size 4 --image-tokens 32 --new-tokens 16)
    step=(--questions 2 --group-size 4 --image-tokens 32 --max-new-tokens 16)
    update=(--tokens 256 512 --row-tokens 256 --group-size 4 --image-tokens 32)
    kernels=(--shapes 64x1000x64 --pairs 3 --milliseconds 10)
else
    part device -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
    [ -z "$failed" ] || exit 1
fi
[ $# -gt 0 ] || set -- tests decoding step update kernels
for name in "$@"; do
    case $name in
        tests) part tests -m pytest -q -m gpu tests ;;
        decoding) part decoding -m bench.decoding --model "$MODEL" "${decoding[@]}" ;;
        step) part step -m bench.fullsize --model "$MODEL" "${step[@]}" ;;
        update) part update -m bench.update --model "$MODEL" "${update[@]}" ;;
        kernels) part kernels -m bench.kernels "${kernels[@]}" ;;
        *) echo "== there is no part $name: give tests, decoding, step, update or kernels"; failed="$failed $name" ;;
    esac
done
[ -z "$failed" ] || { echo "== FAILED:$failed"; exit 1; }
