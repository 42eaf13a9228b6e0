"""Four processes that add up numbers, of which one fails, while the others would wait and do not heed SIGTERM."""

import datetime
import signal
import time

import torch
import torch.distributed as dist

signal.signal(signal.SIGTERM, lambda number, frame: None)
dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))
for step in range(1000):
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 3 and step == 3:
        raise RuntimeError("rank 3 fails at step 3")
    if dist.get_rank() == 0 and step == 3:
        time.sleep(1800)  # a rank that does not even notice that its peer is gone
