"""What a save writes: at once, or handed to whoever writes it while training goes on.

The files of a checkpoint are written in several rooms, and none of them has to know which it is.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Protocol

# (content, the processes' group) -> None; the group is None where it is the run's own
Part = Callable[[Any, Any], None]


class Writer(Protocol):
    """Keeps a copy of the content until it is written (`distributed.background`)."""

    def add(self, part: Part, content: Any) -> None: ...


_writer: contextvars.ContextVar[Writer | None] = contextvars.ContextVar("writer", default=None)


def write(part: Part, content: Any) -> None:
    """`part(content, None)`; where a `Writer` is handed it, with a copy of the content, later, and
    with its group."""
    writer = _writer.get()
    if writer is None:
        part(content, None)
    else:
        writer.add(part, content)


def writes_later() -> bool:
    return _writer.get() is not None


@contextlib.contextmanager
def handed_to(writer: Writer) -> Iterator[None]:
    """Inside, what is to be written is handed to the writer."""
    token = _writer.set(writer)
    try:
        yield
    finally:
        _writer.reset(token)
