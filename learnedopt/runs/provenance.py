"""Where numbers come from: the commit of the code, and the hardware."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def hardware(device: torch.device) -> str:
    """What ran: the name of the GPU, or the number of threads and the kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU thread(s), {platform.machine()}"


def source_commit() -> str:
    """The commit of the checkout this package is imported from, ``-dirty`` if code differs from it, or ``unknown``."""
    package = Path(__file__).resolve().parents[1]
    # An environment inside some other project's checkout must not pass off that project's commit as ours.
    if not (package.parent / ".git").exists():
        return "unknown"
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=package,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()
