"""Which of the launched processes this one is, by the launcher's word alone.

For the time before there is a process group, and after.
"""

from __future__ import annotations

import os

# What launchers that know nothing of WORLD_SIZE call the number of processes: Open MPI, MPICH, Slurm's
# srun.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def num_launched() -> int:
    """How many processes were launched together."""
    # Where there is a WORLD_SIZE its launcher may itself have been launched, once per machine.
    named = ("WORLD_SIZE",) if "WORLD_SIZE" in os.environ else _SIZES
    return max(int(os.environ.get(name, "1")) for name in named)


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
