#!/usr/bin/env bash
# The tests against a real Slurm: installs Debian's packages of it, and runs them. Needs root.
#
#   tests/slurm/run.sh [PYTHON]
#   tests/slurm/run.sh --install    only see to it that Slurm is there and that namespaces can be made
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "$(id -u)" != 0 ]; then
  echo "tests/slurm/run.sh: it takes root, to install Slurm and to make network namespaces" >&2
  exit 1
fi
packages=(slurmctld slurmd slurm-client munge iproute2 shellcheck)
if ! dpkg --status "${packages[@]}" >/dev/null 2>&1; then
  apt-get update --quiet
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "${packages[@]}"
fi
if [ "${1:-}" = --install ]; then
  exec unshare --net --uts --mount --pid --fork true
fi
EAFT_SLURM=1 OMP_NUM_THREADS=1 "${1:-.venv/bin/python}" -m pytest -p no:randomly tests/slurm --durations=0
