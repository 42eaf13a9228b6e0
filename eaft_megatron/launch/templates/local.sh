#!/usr/bin/env bash
# The same job on this machine, without Slurm.
#
#   EAFT_RUN_DIR=runs/1 local.sh -m eaft_megatron.run pretrain_gpt.py FLAGS...
#
# EAFT_PROCESSES says how many processes to start (default: one for each GPU). Ctrl-C asks them to save and stop, if
# the flags hold --exit-signal-handler; a second one ends them. The same command goes on from the last checkpoint.
set -euo pipefail

: "${EAFT_RUN_DIR:?name a folder}"
if [ $# = 0 ]; then
  sed -n '2,7p' "$0" >&2
  exit 2
fi
python=${EAFT_PYTHON:-python}
processes=${EAFT_PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)}
if [ "$processes" = 0 ]; then
  echo "local.sh: no GPU here; EAFT_PROCESSES=2 starts two processes on the CPU" >&2
  exit 1
fi
# As in sft.sbatch, which says why.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

mkdir -p "$EAFT_RUN_DIR/logs"
log=$EAFT_RUN_DIR/logs/local-$(date +%Y%m%d-%H%M%S).log
echo "local.sh: $processes processes, log in $log"
set -m # a process group of its own: Ctrl-C reaches this script alone
"$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" --max-restarts 0 "$@" \
  > >(tee "$log") 2>&1 &
torchrun=$!
trap 'trap "kill -KILL -- -$torchrun" INT TERM; kill -TERM "$torchrun"' INT TERM
code=0
while kill -0 "$torchrun" 2>/dev/null; do
  code=0
  wait "$torchrun" || code=$?
done
if [ "$code" != 0 ]; then echo "local.sh: ended with exit code $code; log in $log" >&2; fi
exit "$code"
