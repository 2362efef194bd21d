"""`tralign-fast generate MODEL [MODEL]`: completions of two models side by side."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from tralign_fast.command_line import PositionalParser
from tralign_fast.commands.models import (
    base_of,
    best_device,
    check_model,
    load_model,
    load_tokenizer,
)
from tralign_fast.commands.samples import complete


def run_generate(arguments: list[str]) -> int:
    """Completes prompts; of one model that a run made, its start's completions stand beside.

    Raises:
        ValueError: no such model, no prompt, or rows without prompts.
    """
    parser = PositionalParser(prog="tralign-fast generate", description=run_generate.__doc__)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="Folder or hub id, before and after."
    )
    parser.add_argument("--prompt", action="append", default=[], help="Text; may stand repeatedly.")
    parser.add_argument("--prompts", help="Rows with a column prompt, as --dataset of train.")
    parser.add_argument("--split", default="train", help="Of these rows.")
    parser.add_argument("--count", type=int, default=4, help="Of these rows' prompts.")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true", help="Without the chat template.")
    given = parser.parse_args(arguments)
    if len(given.models) > 2:
        raise ValueError(f"generate: expected one or two models, got {len(given.models)}")
    if given.max_new_tokens < 1 or given.count < 1 or given.temperature < 0:
        raise ValueError("generate: expected --max_new_tokens and --count ≥ 1, --temperature ≥ 0")
    for name in given.models:
        check_model(name)
    start = base_of(given.models[0])
    names = [start, *given.models] if len(given.models) == 1 and start else given.models
    prompts = prompts_of(given.prompt, given.prompts, given.split, given.count)
    # a run and its start read the same tokens, two models that are given each its own
    sources = given.models if len(given.models) == 2 else [given.models[0]] * len(names)
    columns = [
        _completions(name, load_tokenizer(source, base_of(source)), prompts, given)
        for name, source in zip(names, sources, strict=True)
    ]
    for prompt, *texts in zip(prompts, *columns, strict=True):
        print(side_by_side(prompt_text(prompt), names, texts))
    return 0


def _completions(name: str, tokenizer: Any, prompts: list[Any], given: Any) -> list[str]:
    """Of one model, which is gone before the next is loaded."""
    from transformers import set_seed

    ids = [prompt_ids(tokenizer, prompt, given.raw) for prompt in prompts]
    if not all(ids):
        raise ValueError(f"generate: expected prompts of a token or more, got {prompts!r}")
    set_seed(given.seed)
    sampling = {"do_sample": True, "temperature": given.temperature} if given.temperature else {}
    model = load_model(name, device=best_device())
    return complete(model, tokenizer, ids, given.max_new_tokens, **sampling)


def prompts_of(words: Sequence[str], rows: str | None, split: str, count: int) -> list[Any]:
    """Prompts as text or as messages.

    Raises:
        ValueError: there are none.
    """
    found: list[Any] = [*words]
    if rows is not None:
        from tralign_fast.data import load_rows

        table = load_rows(rows, split)
        if "prompt" not in table.column_names:
            have = ", ".join(table.column_names)
            raise ValueError(f"--prompts {rows}: expected a column prompt, found {have}")
        found += table[:count]["prompt"]
    if not found:
        raise ValueError('generate: expected --prompt "TEXT" or --prompts ROWS')
    return found


def prompt_ids(tokenizer: Any, prompt: Any, raw: bool = False) -> list[int]:
    """Token ids of a text, as the user's turn where there is a chat template, or of messages."""
    if isinstance(prompt, str):
        if raw or not tokenizer.chat_template:
            return tokenizer(prompt)["input_ids"]
        prompt = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)


def side_by_side(prompt: str, names: Sequence[str], texts: Sequence[str]) -> str:
    """The prompt, and under it a column for every model."""
    width = max(40, min(shutil.get_terminal_size((100, 24)).columns, 160))
    each = (width - 3 * (len(names) - 1)) // len(names)
    columns = []
    for name, text in zip(names, texts, strict=True):
        short = name if len(name) <= each else f"…{name[1 - each :]}"
        lines = [piece for line in text.splitlines() for piece in textwrap.wrap(line, each) or [""]]
        columns.append([short, "─" * each, *(lines or ["(nothing)"])])
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    table = "\n".join(" │ ".join(f"{cell:<{each}}" for cell in row).rstrip() for row in rows)
    return f"▸ {prompt}\n\n{table}\n"
