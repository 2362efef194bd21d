"""report.html: one file that needs no other: curves, figures, samples, configuration."""

from __future__ import annotations

import html
from typing import Any

import yaml

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.note { color: #888; } .tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; min-width: 7.5rem; }
.tile b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.curves { background: #fff; border-radius: 8px; padding: .5rem; overflow-x: auto; }
.curves svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; background: var(--soft); } td.n { text-align: right; }
.samples td { width: 33%; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: 13px; }
"""  # noqa: E501


def page(runs: list[Any], svg: str | None) -> str:
    """The text of the page.

    Args:
        runs: `RunRecord`s, one or several that are compared.
        svg: their curves; None: matplotlib is not installed.
    """
    alone = runs[0] if len(runs) == 1 else None
    title = _title(alone) if alone else f"{len(runs)} runs compared"
    parts = [f"<h1>{_e(title)}</h1>", f'<p class="note">{_e(_line(alone) if alone else "")}</p>']
    parts += [_tiles(alone)] if alone else [_comparison(runs)]
    curves = f'<div class="curves">{svg}</div>' if svg else (
        "<p>No curves: matplotlib is not installed (pip install matplotlib).</p>"
    )  # fmt: skip
    parts += ["<h2>Curves</h2>", "<p class='note'>Dotted lines: the reference moves.</p>", curves]
    if alone:
        parts += [_evaluations(alone), _samples(alone)]
        parts += [_block("Configuration", alone.config), _block("Summary", alone.summary)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{_e(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _e(value: Any) -> str:
    return html.escape(str(value))


def _title(run: Any) -> str:
    summary = run.summary
    return f"{summary.get('method', 'Run')} of {summary.get('model', run.name)}"


def _line(run: Any) -> str:
    s = run.summary
    if s.get("unfinished"):
        return f"{run.folder}: has not ended; of its newest checkpoint, step {s.get('steps')}"
    moves = "frozen reference"
    if s.get("every"):
        moves = f"α = {s['alpha']}, τ = {s['every']}, {s['moves']} moves of the reference"
    return (
        f"{s.get('train_rows')} rows of {s.get('dataset')}, {s.get('steps')} steps, {moves}, "
        f"β = {s.get('beta')}; {s.get('device')}, ended {s.get('ended')}"
    )


_TILES = (
    ("held-out accuracy", "held_out", "eval_rewards/accuracies", "{:.1%}"),
    ("held-out margin", "held_out", "eval_rewards/margins", "{:+.3f}"),
    ("held-out loss", "held_out", "eval_loss", "{:.4f}"),
    ("KL to the start", "held_out", "eval_kl/initial", "{:.4f}"),
    ("train loss", "train", "loss", "{:.4f}"),
    ("train margin", "train", "rewards/margins", "{:+.3f}"),
    ("train accuracy", "train", "rewards/accuracies", "{:.1%}"),
    ("tokens/s", None, "tokens_per_second", "{:,.0f}"),
    ("GPU peak, GiB", None, "peak_gpu_gib", "{:.2f}"),
    ("host peak, GiB", None, "peak_host_gib", "{:.2f}"),
    ("training, s", None, "train_seconds", "{:,.0f}"),
)  # fmt: skip


def figures_of(run: Any) -> dict[str, str]:
    """Title -> figure as text, of those that the run has."""
    found = {}
    for title, table, name, style in _TILES:
        values = run.summary if table is None else run.summary.get(table) or {}
        if values.get(name) is not None:
            found[title] = style.format(values[name])
    return found


def _tiles(run: Any) -> str:
    tiles = "".join(
        f'<div class="tile">{_e(title)}<b>{_e(text)}</b></div>'
        for title, text in figures_of(run).items()
    )
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _comparison(runs: list[Any]) -> str:
    made = {run.name: figures_of(run) for run in runs}
    titles = [t for t, *_ in _TILES if any(t in figures for figures in made.values())]
    head = "".join(f"<th>{_e(run.name)}</th>" for run in runs)
    cells = {t: "".join(f"<td>{_e(f.get(t, '–'))}</td>" for f in made.values()) for t in titles}
    rows = "".join(f"<tr><td>{_e(title)}</td>{text}</tr>" for title, text in cells.items())
    return f"<table><tr><th></th>{head}</tr>{rows}</table>{_differences(runs)}"


def differing(runs: list[Any]) -> dict[str, list[Any]]:
    """Option -> its value in each run, of the options in which they differ."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    values = {name: [run.config.get(name) for run in runs] for name in names}
    return {n: v for n, v in values.items() if any(x != v[0] for x in v) and n != "output_dir"}


def _differences(runs: list[Any]) -> str:
    rows = "".join(
        f"<tr><td>{_e(name)}</td>{''.join(f'<td>{_e(v)}</td>' for v in values)}</tr>"
        for name, values in differing(runs).items()
    )
    if not rows:
        return "<p>The options of the runs are the same.</p>"
    head = "".join(f"<th>{_e(run.name)}</th>" for run in runs)
    return f"<h2>Options in which they differ</h2><table><tr><th></th>{head}</tr>{rows}</table>"


def _evaluations(run: Any) -> str:
    logs = [log for log in run.history if "eval_loss" in log]
    names = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_kl/initial")
    names = tuple(n for n in names if any(n in log for log in logs))
    if not logs:
        return ""
    head = "".join(f"<th>{_e(n.removeprefix('eval_'))}</th>" for n in ("step", *names))
    rows = "".join(
        f"<tr><td>{log['step']}</td>"
        + "".join(f"<td>{log[n]:.4f}</td>" if n in log else "<td></td>" for n in names)
        + "</tr>"
        for log in logs
    )
    return f"<h2>Evaluations</h2><table><tr>{head}</tr>{rows}</table>"


def _samples(run: Any) -> str:
    if not run.samples:
        return ""
    rows = "".join(
        "<tr>" + "".join(f"<td>{_e(s.get(k, ''))}</td>" for k in ("prompt", "before", "after"))
        + "</tr>"
        for s in run.samples
    )  # fmt: skip
    return (
        "<h2>Completions before and after</h2><table class='samples'><tr><th>prompt</th>"
        f"<th>before</th><th>after</th></tr>{rows}</table>"
    )


def _block(title: str, table: dict[str, Any]) -> str:
    if not table:
        return ""
    text = yaml.safe_dump(table, sort_keys=False, allow_unicode=True, width=100)
    return (
        f"<h2>{title}</h2><details><summary>{len(table)} entries</summary><pre>{_e(text)}</pre>"
        "</details>"
    )
