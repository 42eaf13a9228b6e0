#!/usr/bin/env bash
# What only a GPU can show, into one folder; its steps are cut off after eight and a half minutes in all:
#
#     benchmarks/gpu.sh [FOLDER]         default: gpu-results
#
# The kernel tests on the device (CUDA graphs, memory and host syncs among them), 300 random cases of the kernels against
# plain torch, 128 against 256 buckets, then benchmarks/loss.py and linear.py beside every peer that is installed.
# Needs torch with CUDA, Triton, pytest and megatron-core (the benchmarks' baseline). PYTHON names the interpreter. A step
# that fails is reported, and the next one runs; the exit status is the number of failed steps. Where there is no GPU it
# is a dry run: every command is printed, the tests are collected and the bucket timing runs in Triton's interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python}
folder=${1:-gpu-results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

step() { # step SECONDS NAME COMMAND...
  local limit=$1 name=$2
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee "$folder/$name.log" | tail -n 40
  local status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    echo "== $name FAILED with status $status, see $folder/$name.log" >&2
    failed=$((failed + 1))
  fi
}

mkdir -p "$folder"
tests=(tests/loss/test_kernels.py tests/loss/test_kernels_choice.py tests/loss/test_autograd.py tests/loss/test_kernels_fuzz.py)
if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  step 150 tests "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
  step 60 buckets "$python" benchmarks/buckets.py --output "$folder/buckets.json"
  step 180 loss "$python" benchmarks/loss.py --tokens 8192 --vocab 151936 50257 --tp 1 4 --ignored 0 0.75 --repeats 10 \
    --output "$folder/loss.json"
  step 120 linear "$python" benchmarks/linear.py --tokens 8192 --tp 1 8 --output "$folder/linear.json"
else
  echo "No GPU here: a dry run. Nothing below is a measurement."
  step 120 tests "$python" -m pytest -q -p no:cacheprovider --collect-only "${tests[@]}"
  step 120 buckets env TRITON_INTERPRET=1 "$python" benchmarks/buckets.py --tokens 1 --vocab 3000 --topk 2 --repeats 1 \
    --output "$folder/buckets.json"
  step 60 loss "$python" benchmarks/loss.py --help
  step 60 linear "$python" benchmarks/linear.py --help
fi
exit "$failed"
