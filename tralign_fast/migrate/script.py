"""A script of TRL as one of this library."""

from __future__ import annotations

import ast
from typing import Any

from tralign_fast.migrate.bindings import FROZEN, OURS, Binding, bindings_of, of_trl
from tralign_fast.migrate.findings import findings
from tralign_fast.migrate.options import OLD_OF_TRAINERS, Old, is_trls_collator, old_options
from tralign_fast.migrate.report import FROZEN as FROZEN_LINE
from tralign_fast.migrate.report import MOVING, Migration
from tralign_fast.migrate.source import (
    Edit,
    Source,
    add_keyword,
    arguments,
    drop_keyword,
    into_table,
)

_OTHERS = (
    "BCO", "CPO", "GKD", "GRPO", "NashMD", "ORPO", "OnlineDPO", "PPO", "PRM", "RLOO", "Reward",
    "SFT", "XPO",
)  # fmt: skip


def migrate_script(text: str, name: str, moving: bool) -> Migration | None:
    """The script with this library's trainers; None: it has them already.

    Raises:
        ValueError: no Python, or no trainer of TRL that this library replaces.
    """
    source = Source(text, name)
    if not bindings_of(source):
        _check_migrated(source, name)
        return None
    done = Migration(text)
    # what is said has the lines of the script as it was
    findings(source, bindings_of(source), done)
    while (edit := _old_option(source, done, bindings_of(source))) is not None:
        source = Source(source.changed([edit]), name)
    found = bindings_of(source)
    done.text = source.changed(_edits(source, found, moving, done))
    ast.parse(done.text)
    return done


def _check_migrated(source: Source, name: str) -> None:
    """Raises ValueError for what is no script of this library."""
    imports = [
        (node.module if isinstance(node, ast.ImportFrom) else alias.name, alias.name)
        for node in source.walk((ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    ours = {name for module, name in imports if str(module).split(".")[0] == "tralign_fast"}
    if ours & {*OURS.values(), *FROZEN.values(), "TRTrainer", "TRConfig", "tralign_fast"}:
        return
    words = {node.id for node in source.walk(ast.Name)} | {name for _, name in imports}
    words |= {node.attr for node in source.walk(ast.Attribute)}
    others = sorted(f"{kind}Trainer" for kind in _OTHERS if f"{kind}Trainer" in words)
    hint = ""
    if others:
        hint = f", got {', '.join(others)}"
        if {"GRPOTrainer", "RLOOTrainer"} & {*others}:
            hint += " (tralign_fast.integrations.trl.use_fast_logprobs makes it faster)"
    raise ValueError(f"{name}: expected a script with TRL's DPOTrainer or KTOTrainer{hint}")


def calls_of(source: Source, binding: Binding) -> list[ast.Call]:
    parents = [(node, source.parents[node]) for node in binding.uses]
    return [call for node, call in parents if isinstance(call, ast.Call) and call.func is node]


# --- options of older versions --------------------------------------------------------------------


def _old_option(source: Source, done: Migration, found: dict[str, Binding]) -> Edit | None:
    """The change of the first keyword that has another name by now, or that nothing needs."""
    for binding in found.values():
        table: dict[str, Old] = old_options() if binding.is_config else OLD_OF_TRAINERS
        for call in calls_of(source, binding):
            for keyword in call.keywords:
                if keyword.arg == "data_collator" and is_trls_collator(keyword.value):
                    return drop_keyword(source, call, keyword)
                old = table.get(keyword.arg or "")
                if old is None:
                    continue
                if old.name is not None:
                    start = source.start(keyword)
                    return Edit(start, start + len((keyword.arg or "").encode()), old.name)
                if old.can_go(keyword.value):
                    return drop_keyword(source, call, keyword)
    return None


# --- names ----------------------------------------------------------------------------------------


def _edits(source: Source, found: dict[str, Binding], moving: bool, done: Migration) -> list[Edit]:
    edits: list[Edit] = []
    frozen = {b.theirs for b in found.values() if b.as_value} if not moving else set()

    def ours(theirs: str) -> str:
        return FROZEN[theirs] if theirs in frozen else OURS[theirs]

    needs: dict[str, str] = {}  # a trainer without `args` -> the options that it gets
    how: list[str] = []
    for binding in found.values():
        for node in binding.uses if binding.renamed else []:
            prefix = "tralign_fast." if isinstance(node, ast.Attribute) else ""
            edits.append(Edit(source.start(node), source.end(node), prefix + ours(binding.theirs)))
        if moving:
            continue
        if binding.theirs in frozen:
            how.append(FROZEN[binding.theirs])
            continue
        for call in calls_of(source, binding):
            if binding.is_config:
                edits += _freeze(source, call, how)
            elif not _has_args(call):
                config = FROZEN[binding.theirs.replace("Trainer", "Config")]
                prefix = "tralign_fast." if "." in binding.local else ""
                edits.append(add_keyword(source, call, f'args={prefix}{config}("tr-output")'))
                how.append(config)
                needs[binding.local] = config
    if moving:
        done.changes(MOVING, first=True)
    elif how:
        done.changes(FROZEN_LINE.format(how=" and ".join(dict.fromkeys(how))), first=True)
    return edits + _imports(source, found, ours, needs)


def _has_args(call: ast.Call) -> bool:
    spread = any(isinstance(a, ast.Starred) for a in call.args)
    return spread or len(call.args) > 2 or any(k.arg in (None, "args") for k in call.keywords)


def _freeze(source: Source, call: ast.Call, how: list[str]) -> list[Edit]:
    """`sync_ref_model=False`, unless the call says something of it."""
    if any(k.arg == "sync_ref_model" for k in call.keywords):
        return []
    how.append("sync_ref_model=False")
    tables = [k for k in arguments(call) if isinstance(k, ast.keyword) and k.arg is None]
    if tables:
        return [into_table(source, tables[0], '"sync_ref_model": False')]
    return [add_keyword(source, call, "sync_ref_model=False")]


def _imports(source: Source, found: dict[str, Binding], ours: Any, needs: dict) -> list[Edit]:
    edits: list[Edit] = []
    used = {node for binding in found.values() if binding.renamed for node in binding.uses}
    dotted = any("." in binding.local for binding in found.values())
    for node in source.walk((ast.Import, ast.ImportFrom)):
        if isinstance(node, ast.ImportFrom):
            if node.level or not of_trl(node.module):
                continue
            edits += _import_from(source, node, found, ours, needs, used)
        elif any(of_trl(alias.name) for alias in node.names) and dotted:
            gone = [
                alias
                for alias in node.names
                if of_trl(alias.name) and not _is_left(source, alias.asname or "trl", used)
            ]
            edits += _replaced(source, node, ["import tralign_fast"], gone)
    return edits


def _import_from(
    source: Source, node: ast.ImportFrom, found: dict, ours: Any, needs: dict, used: set
) -> list[Edit]:
    names: set[str] = set()
    gone: list[ast.alias] = []
    lines = []
    for alias in node.names:
        local = alias.asname or alias.name
        if alias.name in OURS:
            gone.append(alias)
            name = ours(alias.name)
            names.add(name if found[local].renamed else f"{name} as {local}")
            names |= {needs[local]} if local in needs else set()
        elif alias.name == "*":
            for local, binding in found.items():
                if "." not in local:
                    names.add(ours(binding.theirs))
                    names |= {needs[local]} if local in needs else set()
        elif any(_root(use) == local for use in used if isinstance(use, ast.Attribute)):
            lines.append("import tralign_fast")
            if not _is_left(source, local, used):
                gone.append(alias)
    if names:
        lines.append(f"from tralign_fast import {', '.join(sorted(names))}")
    if any(alias.name == "*" for alias in node.names) and lines:
        end = source.end(node)  # after it, as its names are TRL's
        own = source.newline() + source.indent(source.start(node))
        return [Edit(end, end, own + own.join(lines))]
    return _replaced(source, node, list(dict.fromkeys(lines)), gone) if lines else []


def _root(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_left(source: Source, local: str, used: set) -> bool:
    """Whether a module's name is read elsewhere than in what is replaced."""
    inside = {inner for node in used for inner in ast.walk(node)}
    return any(node.id == local and node not in inside for node in source.walk(ast.Name))


def _replaced(source: Source, node: Any, lines: list[str], gone: list[ast.alias]) -> list[Edit]:
    """Imports of ours before or in the place of one of TRL."""
    start = source.start(node)
    alone = not source.data[source.line_start(start) : start].strip()
    between = source.newline() + source.indent(start) if alone else "; "
    text = between.join(lines)
    kept = [alias for alias in node.names if alias not in gone]
    if not kept:
        return [Edit(start, source.end(node), text)]
    edits = [Edit(start, start, text + between)]
    for index, alias in enumerate(node.names):
        if alias not in gone:
            continue
        after = node.names[index + 1 :]
        if after:
            edits.append(Edit(source.start(alias), source.start(after[0]), ""))
        else:
            edits.append(Edit(source.end(kept[-1]), source.end(alias), ""))
    return _merged(edits)


def _merged(edits: list[Edit]) -> list[Edit]:
    """Without those that lie inside another."""
    return [
        edit
        for edit in edits
        if not any(o is not edit and o.start <= edit.start and edit.end <= o.end and o.end > o.start
                   for o in edits)
    ]  # fmt: skip
