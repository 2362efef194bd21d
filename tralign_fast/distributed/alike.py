"""What all processes of a run must have alike, asked once when it starts.

One that differs would be found out hours later, as a process that waits for another one: here all
end, with one message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tralign_fast.reference.sharding import from_all, process_count

_PACKAGES = ("tralign-fast", "transformers", "accelerate", "datasets", "peft", "triton")


def check_versions() -> None:
    """Raises ValueError, in every process, where one has another version of a package."""
    if process_count() == 1:
        return
    every = from_all({"torch": str(torch.__version__), **{n: _version(n) for n in _PACKAGES}})
    for name in every[0]:
        values = [versions[name] for versions in every]
        if others := [i for i, value in enumerate(values) if value != values[0]]:
            raise ValueError(
                f"process {others[0]} has {name} {values[others[0]]}, process 0 has {values[0]}: "
                "install the same on every machine"
            )


def check_rows(dataset: Any, digest: str | None) -> None:
    """Raises ValueError, in every process, where one has other rows to train on.

    Args:
        digest: of the tokenised rows; None for a stream, which cannot be told.
    """
    if process_count() == 1:
        return
    size = len(dataset) if hasattr(dataset, "__len__") else None
    every = from_all((size, digest))
    if others := [i for i, found in enumerate(every) if found != every[0]]:
        counts = (every[others[0]][0], every[0][0])
        there, here = ("a stream" if n is None else f"{n} rows" for n in counts)
        raise ValueError(
            f"process {others[0]} trains on other rows than process 0 ({there} there, {here} "
            "here): give every process the same ones, of which each takes its share"
        )


@contextlib.contextmanager
def told_to_all() -> Iterator[None]:
    """Inside, what is wrong in one process only (a file that its machine has not) ends all of them.

    Raises:
        ValueError: in every process, what the first of them met; the error itself if all did.
    """
    own: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        own = error
    if process_count() == 1:
        if own is not None:
            raise own
        return
    every = from_all(None if own is None else str(own))
    if own is not None and len({*every}) == 1:  # each of them met it
        raise own
    for process, text in enumerate(every):
        if text is not None:
            raise ValueError(f"process {process}: {text}") from None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
