"""What .ci/run may skip: a regular expression that the skip's reason matches from its start, and why it is allowed."""

ALLOWED_SKIPS = {
    r"MEGATRON_LM_PATH does not name a clone": "a clone of NVIDIA/Megatron-LM is 300 MB, and .ci/run needs no GitHub",
    r"this megatron-core has no megatron\.training": "wheels have it from 0.17 on, which needs Python 3.12 and CUDA's"
    " torch: make test-megatron-training",
    r"needs megatron\.training: ": "the layouts run on Python 3.12, make test-megatron-training",
    r"needs a GPU": "CI has none",
    r"the engine's device threads need a device": "CI has no GPU",
    r"typing\.get_overloads is of Python 3\.11": "the package supports 3.10, and .ci/run takes the python3 it meets",
    r"EAFT_SLURM is not 1": "tests/slurm/run.sh, .ci/run's last step, sets up a Slurm and runs it",
    r"EAFT_GAUNTLET=\S+ .*runs it": "every published template downloaded and judged: asked for by name",
}
