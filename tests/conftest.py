"""Settings for all tests."""

from __future__ import annotations

import os

import torch

# Models here are so small that a second thread only costs; several processes would fight for cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # or bitsandbytes asks a hub for a CPU kernel
