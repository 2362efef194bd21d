"""Which names of a script mean TRL's trainers and their options, and how each is used."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

from tralign_fast.migrate.source import Source

OURS = {
    "DPOTrainer": "TRDPOTrainer",
    "DPOConfig": "TRDPOConfig",
    "KTOTrainer": "TRKTOTrainer",
    "KTOConfig": "TRKTOConfig",
}
FROZEN = {"DPOConfig": "TRFrozenDPOConfig", "KTOConfig": "TRFrozenKTOConfig"}


@dataclass
class Binding:
    """A name of TRL in the words of a script, such as `DPOConfig`, `C` or `trl.DPOConfig`."""

    theirs: str
    local: str
    uses: list[Any] = field(default_factory=list)  # Name and Attribute nodes
    renamed: bool = True  # else imported under the script's name
    as_value: bool = False  # handed on as a class, to a parser or as the parent of another

    @property
    def is_config(self) -> bool:
        return self.theirs in FROZEN


def of_trl(module: str | None) -> bool:
    return module is not None and (module == "trl" or module.startswith("trl."))


def bindings_of(source: Source) -> dict[str, Binding]:
    """By the script's words for them."""
    found: dict[str, Binding] = {}
    modules: dict[str, str] = {}
    starred = False
    for node in source.walk((ast.Import, ast.ImportFrom)):
        for alias in node.names:
            if isinstance(node, ast.Import):
                if of_trl(alias.name):
                    modules[alias.asname or "trl"] = alias.asname or "trl"
            elif node.level == 0 and of_trl(node.module):
                local = alias.asname or alias.name
                if alias.name in OURS:
                    found[local] = Binding(alias.name, local, renamed=alias.asname is None)
                elif alias.name == "*":
                    starred = True
                else:
                    modules[local] = local  # perhaps a module of TRL
    if starred:
        for name in OURS:
            found.setdefault(name, Binding(name, name))
    for node in source.walk(ast.Name):
        if node.id in found:
            if isinstance(node.ctx, ast.Load):
                found[node.id].uses.append(node)
            else:
                found[node.id].renamed = False
    for node in source.walk(ast.Attribute):
        dotted = _dotted(node)
        if node.attr in OURS and dotted and dotted.split(".")[0] in modules:
            found.setdefault(dotted, Binding(node.attr, dotted)).uses.append(node)
    if starred:
        found = {name: binding for name, binding in found.items() if binding.uses}
    for binding in found.values():
        _look_at(source, binding)
    return found


def _look_at(source: Source, binding: Binding) -> None:
    defined = [
        node.name for node in source.walk((ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ] + [node.arg for node in source.walk(ast.arg)]
    # before Python 3.12, what stands inside an f-string has no place of its own
    misplaced = any("".join(_text(source, node).split()) != binding.local for node in binding.uses)
    if binding.local in defined or misplaced or _in_all(source, binding.local):
        binding.renamed = False
    if binding.is_config:
        binding.as_value = any(not _is_plain(source, node) for node in binding.uses)


def _text(source: Source, node: ast.AST) -> str:
    try:
        return source.of(node)
    except (IndexError, UnicodeDecodeError):
        return ""


def _in_all(source: Source, name: str) -> bool:
    for node in source.walk(ast.Assign):
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            words = [c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant)]
            if name in words:
                return True
    return False


def _is_plain(source: Source, node: ast.AST) -> bool:
    """Whether a class is called, or asked for as a type, and not handed on."""
    parent = source.parents[node]
    if isinstance(parent, ast.Call) and parent.func is node:
        return True
    while isinstance(parent, (ast.Tuple, ast.BinOp, ast.Subscript)):
        node, parent = parent, source.parents[parent]
    if isinstance(parent, (ast.arg, ast.AnnAssign)) and parent.annotation is node:
        return True
    if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return parent.returns is node
    asks = {"isinstance", "issubclass"}
    return (
        isinstance(parent, ast.Call)
        and isinstance(parent.func, ast.Name)
        and parent.func.id in asks
        and node in parent.args[1:]
    )


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else None
    return None
