#!/usr/bin/env bash
# Does each patch apply to the Megatron-LM it was made for? Reads the clone only; nothing in it changes.
#
#   patches/check.sh PATH_TO_MEGATRON_LM_CLONE    a clone with its tags, bare or not
set -euo pipefail
MAIN=d98e8a64ddf34856e74b24714e3bedb2f5a39553 # main.patch was made for this commit of branch main

if (($# != 1)); then
  echo "usage: $0 PATH_TO_MEGATRON_LM_CLONE" >&2
  exit 2
fi
if ! repository=$(git -C "$1" rev-parse --absolute-git-dir); then
  echo "$0: $1 is not a git clone" >&2
  exit 2
fi
patches=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" # git apply skips files outside the directory it stands in
export GIT_DIR=$repository GIT_WORK_TREE=$scratch GIT_INDEX_FILE=$scratch/index

row() { printf '%-14s %-12s %s\n' "$@"; }

failed=0
row release commit result
for patch in "$patches"/*.patch; do
  release=$(basename "$patch" .patch)
  case $release in
    main) wanted=$MAIN ;;
    *) wanted=refs/tags/$release ;;
  esac
  if ! commit=$(git rev-parse --quiet --verify "$wanted^{commit}"); then
    row "$release" - "MISSING: the clone has no $wanted; run git fetch --tags origin main in it"
    failed=1
  elif git read-tree "$commit" && git apply --cached --check "$patch"; then
    row "$release" "${commit:0:12}" applies
  else
    row "$release" "${commit:0:12}" "DOES NOT APPLY"
    failed=1
  fi
done
exit "$failed"
