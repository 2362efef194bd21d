"""Restarts of a job whose processes died: `torchrun --max-restarts`, and a scheduler's requeue."""

from __future__ import annotations

import os


def launch() -> str | None:
    """By which the attempts of one `torchrun` are known; None without it.

    An id of its own (`--rdzv-id`, `--standalone`), else "none" and the first machine.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if job is None else f"{job}@{os.environ.get('MASTER_ADDR', '')}"


def restarts() -> int:
    """How often torchrun has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
