"""Every message of the library's errors, read from the code.

`python -m tests.docs.messages` prints what docs/troubleshooting.md lacks and what it has too much.
A message is shown as a template, in which … stands for what an error fills in.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
FOLDERS = (ROOT / "tralign_fast", ROOT / "kernels" / "tralign_kernels")
# where the message stands among an error's arguments; others are no errors of a user
MESSAGE = {
    "ValueError": 0, "RuntimeError": 0, "NotImplementedError": 0, "ImportError": 0,
    "ModuleNotFoundError": 0, "TypeError": 0, "OSError": 0, "BadRow": 0, "Overlong": 0, "Fault": 2,
}  # fmt: skip
# a script that made rows of the demo, for who makes them again
LEFT_OUT = {"tralign_fast/demo/rows/make_rows.py"}
GAP = "…"
# a template of fewer letters says nothing of its own: it passes on what another one says
LEAST = 8


def messages() -> dict[str, str]:
    """Template of a message -> file where it is raised."""
    modules = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
        for folder in FOLDERS
        for path in sorted(folder.rglob("*.py"))
    }
    functions: dict[str, list[ast.FunctionDef]] = {}
    for tree in modules.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                functions.setdefault(node.name, []).append(node)
    found: dict[str, str] = {}
    for file in modules:
        if file not in LEFT_OUT:
            for text in _Reader(file, modules, functions).messages():
                found.setdefault(text, file)
    return found


class _Reader:
    """The messages of one module."""

    def __init__(
        self,
        file: str,
        modules: dict[str, ast.Module],
        functions: dict[str, list[ast.FunctionDef]],
    ) -> None:
        self.tree, self.modules, self.functions = modules[file], modules, functions
        self.own: dict[str, list[ast.FunctionDef]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                self.own.setdefault(node.name, []).append(node)

    def messages(self) -> Iterator[str]:
        for scope, node in _raises(self.tree):
            if not isinstance(node.exc, ast.Call):
                continue
            for text in self._of_error(node.exc, scope):
                if len(re.sub(r"\W", "", text)) >= LEAST:
                    yield text

    def _of_error(self, call: ast.Call, scope: ast.AST) -> set[str]:
        name = _name(call.func)
        if name in MESSAGE and len(call.args) > MESSAGE[name]:
            return self.templates(call.args[MESSAGE[name]], scope)
        for keyword in call.keywords:
            if keyword.arg == "problem":  # of YAML's
                return self.templates(keyword.value, scope)
        return self.templates(call, scope) if name in self.functions else set()

    def templates(self, node: ast.AST | None, scope: ast.AST, depth: int = 0) -> set[str]:
        """What a text may be, with … where it is filled in."""
        if depth > 4 or node is None:
            return {GAP}
        if isinstance(node, ast.Constant):
            return {node.value} if isinstance(node.value, str) else {GAP}
        if isinstance(node, ast.JoinedStr):
            parts = [self._part(part, scope, depth) for part in node.values]
            return {_tidy("".join(parts))}
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = (self.templates(side, scope, depth + 1) for side in (node.left, node.right))
            return {_tidy(left + right) for left, right in itertools.product(*sides)}
        if isinstance(node, ast.IfExp):
            return self.templates(node.body, scope, depth + 1) | self.templates(
                node.orelse, scope, depth + 1
            )
        if isinstance(node, ast.Name):
            return self._of_name(node.id, scope, depth)
        if isinstance(node, ast.Call):
            return self._of_call(node, depth)
        return {GAP}

    def _part(self, part: ast.AST, scope: ast.AST, depth: int) -> str:
        """A piece of an f-string; a name that has one sentence for its value is that sentence."""
        if isinstance(part, ast.Constant):
            return str(part.value)
        if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
            texts = self._of_name(part.value.id, scope, depth + 1)
            if len(texts) == 1 and len(re.sub(r"\W", "", text := texts.pop())) >= LEAST:
                return text
        return GAP

    def _of_name(self, name: str, scope: ast.AST, depth: int) -> set[str]:
        """All that a function assigns to the name, loops over, or is called with."""
        found: set[str] = set()
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign) and _is_among(name, node.targets):
                found |= self.templates(node.value, scope, depth + 1)
            if isinstance(node, ast.For) and _is_among(name, [node.target]):
                for function in self.own.get(_name(getattr(node.iter, "func", node)), []):
                    for part in ast.walk(function):
                        if isinstance(part, ast.Yield):
                            found |= self.templates(part.value, function, depth + 1)
        if isinstance(scope, ast.FunctionDef) and depth < 4:
            names = [argument.arg for argument in scope.args.args]
            if name in names and name == "message":
                found |= self._of_calls(scope.name, len(names) - names.index(name))
        return found or {GAP}

    def _of_calls(self, name: str, from_end: int) -> set[str]:
        """What callers of a function pass as its `from_end`th argument from the end."""
        found: set[str] = set()
        for file, tree in self.modules.items():
            reader = _Reader(file, self.modules, self.functions)
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and _name(node.func) == name and node.args:
                    found |= reader.templates(node.args[-from_end], tree, 1)
        return found

    def _of_call(self, call: ast.Call, depth: int) -> set[str]:
        """All that a function of the library returns, or raises if it makes the error."""
        name = _name(call.func)
        if name in MESSAGE or name not in self.functions:
            return {GAP}
        found: set[str] = set()
        for function in self.own.get(name) or self.functions[name][:1]:
            for node in ast.walk(function):
                if isinstance(node, ast.Return):
                    value = node.value
                    if isinstance(value, ast.Call) and _name(value.func) in MESSAGE:
                        found |= self._of_error(value, function)
                    else:
                        found |= self.templates(value, function, depth + 1)
        return found or {GAP}


def _raises(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Raise]]:
    """(the function around it, the statement)."""

    def walk(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.Raise]]:
        if isinstance(node, ast.Raise):
            yield scope, node
        inner = node if isinstance(node, ast.FunctionDef) else scope
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inner)

    return walk(tree, tree)


def _is_among(name: str, targets: list[ast.expr]) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _tidy(text: str) -> str:
    text = " ".join(text.split(" "))
    return re.sub(rf"{GAP}(\s*{GAP})+", GAP, text)


def cell(text: str) -> str:
    """A template as a table shows it."""
    return f"`{text.replace('|', '/').replace('`', chr(39))}`"


def explained() -> list[str]:
    """The first cells of the page's tables, in its order."""
    rows = re.findall(r"^\| (`.*?`) \| .*\|$", PAGE.read_text(), re.M)
    return [row for row in rows if row != "`message`"]


def main() -> None:
    there, wanted = explained(), messages()
    cells = {cell(text): file for text, file in wanted.items()}
    for text in sorted({*cells} - {*there}, key=lambda text: (cells[text], text)):
        print(f"missing ({cells[text]}):\n| {text} | CAUSE | REMEDY |")
    for text in there:
        if text not in cells:
            print(f"no longer raised:\n| {text} |")


if __name__ == "__main__":
    main()
