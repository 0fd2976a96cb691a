"""The devices of this machine, by the names that settings give them."""

from __future__ import annotations

import torch


def present_devices() -> list[str]:
    """E.g. `["cuda", "cuda:0", "cuda:1", "cpu"]`; where there is no accelerator, `["cpu"]`."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    indices = range(torch.accelerator.device_count())
    return [accelerator.type, *(f"{accelerator.type}:{i}" for i in indices), "cpu"]
