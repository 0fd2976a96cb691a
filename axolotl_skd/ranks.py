"""Which of the launched processes this one is, by the launcher's word alone.

For the time before there is a process group, and after.
"""

from __future__ import annotations

import os


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
