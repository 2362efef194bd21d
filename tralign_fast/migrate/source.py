"""Text of a Python file, changed in place: comments and layout stay as they are."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COMMENT = re.compile(rb"#[^\r\n]*")


@dataclass(frozen=True)
class Edit:
    start: int  # bytes of the UTF-8 text
    end: int
    text: str


class Source:
    """A syntax tree with the places of its nodes in the text, in bytes as `ast` counts columns.

    Raises:
        ValueError: no Python; names the line.
    """

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.data = text.encode()
        try:
            self.tree = ast.parse(text)
        except SyntaxError as error:
            raise ValueError(f"{name}: line {error.lineno or 1}: {error.msg}") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{name}: expected Python: {error}") from None
        self.parents = {
            child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)
        }
        # form feeds and the like end no line of Python's
        self.starts = [0, *(match.end() for match in re.finditer(rb"\r\n|\r|\n", self.data))]

    def start(self, node: Any) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node: Any) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> str:
        return self.data[self.start(node) : self.end(node)].decode()

    def line_start(self, place: int) -> int:
        return max(start for start in self.starts if start <= place)

    def indent(self, place: int) -> str:
        """White space before the text of a line."""
        line = self.data[self.line_start(place) :]
        return line[: len(line) - len(line.lstrip(b" \t"))].decode()

    def newline(self) -> str:
        found = re.search(rb"\r\n|\r|\n", self.data)
        return found[0].decode() if found else "\n"

    def walk(self, kind: Any) -> Iterator[Any]:
        """Nodes of a kind in the order of the text."""
        nodes: list[Any] = [node for node in ast.walk(self.tree) if isinstance(node, kind)]
        yield from sorted(nodes, key=lambda node: (node.lineno, node.col_offset))

    def changed(self, edits: list[Edit]) -> str:
        data = self.data
        for edit in sorted(edits, key=lambda edit: (edit.start, edit.end), reverse=True):
            data = data[: edit.start] + edit.text.encode() + data[edit.end :]
        return data.decode()


def read(path: Path) -> tuple[str, str]:
    """The text of a file and its encoding; a Python file may name one.

    Raises:
        ValueError: there is no such file, or it is no text in that encoding.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected a script or a YAML") from None
    try:
        encoding = "utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8"
        if path.suffix != ".yaml" and path.suffix != ".yml":
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding), encoding
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected text: {error}") from None


# --- arguments of calls ---------------------------------------------------------------------------


def arguments(call: ast.Call) -> list[Any]:
    """Positional and keyword arguments in the order of the text."""
    found: list[Any] = [*call.args, *call.keywords]
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def add_keyword(source: Source, call: ast.Call, text: str) -> Edit:
    """A keyword after the others, on a line of its own where they stand so."""
    close = source.end(call) - 1
    given = arguments(call)
    if not given:
        return Edit(close, close, text)
    last = source.end(given[-1])
    between = source.data[last:close]
    bare = _COMMENT.sub(lambda found: b" " * len(found[0]), between)
    comma = b"," in bare
    if b"\n" not in bare and b"\r" not in bare:
        at = last + len(bare.rstrip())
        return Edit(at, close, f"{'' if comma else ','} {text}")
    line = source.line_start(close)
    if source.data[line:close].strip():  # the parenthesis shares a line with an argument
        at = last + len(bare.rstrip())
        return Edit(at, at, f"{'' if comma else ','} {text}")
    first = source.start(given[-1])
    own = not source.data[source.line_start(first) : first].strip()
    indent = source.indent(first) if own else source.indent(close) + "    "
    added = f"{indent}{text},{source.newline()}"
    if comma:
        return Edit(line, line, added)
    at = last + len(bare.rstrip())  # after parentheses around the value
    return Edit(at, line, f",{source.data[at:line].decode()}{added}")


def into_table(source: Source, keyword: ast.keyword, text: str) -> Edit:
    """`**options` with a default before it, which an entry of the options overrides."""
    start, inner = source.start(keyword), source.start(keyword.value)
    end = _closed(source, inner, source.end(keyword.value), start)
    table = source.data[start:end].decode()
    return Edit(start, end, f"**{{{text}, {table}}}")


def drop_keyword(source: Source, call: ast.Call, keyword: ast.keyword) -> Edit:
    """The keyword's text with its comma, and its line where it stands alone."""
    given = arguments(call)
    index = given.index(keyword)
    start = source.start(keyword)
    if index + 1 < len(given):
        return Edit(start, source.start(given[index + 1]), "")
    end = _closed(source, source.start(keyword.value), source.end(keyword.value), start)
    after = re.match(rb"[ \t]*,", source.data[end:])
    end += len(after[0]) if after else 0
    line = source.line_start(start)
    rest = re.match(rb"[ \t]*(#[^\r\n]*)?(\r\n|\r|\n)", source.data[end:])
    if rest and not source.data[line:start].strip():
        return Edit(line, end + len(rest[0]), "")
    before = re.search(rb",?\s*\Z", source.data[:start]) if not after else None
    return Edit(before.start() if before else start, end, "")


def _closed(source: Source, inner: int, end: int, start: int) -> int:
    """The end of a value with the parentheses around it, which belong to no node."""
    for _ in range(source.data[start:inner].count(b"(")):
        end = source.data.index(b")", end) + 1
    return end
