"""What a rank sees of its step, and a moment of life: no torch, for torchrun starts it."""

import os
import time

print("cores", os.environ.get("SLURM_CPUS_PER_TASK"), "mark", os.environ.get("EAFT_MARK"), flush=True)
time.sleep(float(os.environ.get("EAFT_SLEEP", "0")))
