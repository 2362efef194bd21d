"""`tralign-fast eval MODEL --dataset ROWS`: accuracy, margins and KL on held-out rows, a judge."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from tralign_fast.command_line import PositionalParser
from tralign_fast.commands.generate import prompt_ids, prompt_text
from tralign_fast.commands.models import (
    base_of,
    best_device,
    dtype_of,
    load_model,
    load_tokenizer,
)
from tralign_fast.commands.samples import complete

_FIGURES = (
    "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
    "logps/rejected", "kl/initial", "loss",
)  # fmt: skip


def run_eval(arguments: list[str]) -> int:
    """Measures a model against its start: on held-out rows, and by a judge on fresh completions.

    Raises:
        ValueError: no such model, rows or judge.
    """
    given = _parser().parse_args(arguments)
    for name in ("limit", "judge_prompts", "max_new_tokens", "max_length", "batch"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise ValueError(f"--{name}: expected a whole number ≥ 1, got {value}")
    judge = judge_of(given.judge) if given.judge else None
    start = given.reference or base_of(given.model)
    if not start:
        raise ValueError(f"{given.model}: names no start; expected --reference MODEL")
    from tralign_fast.data import load_rows

    rows = load_rows(given.dataset, given.split)
    rows = rows.select(range(min(given.limit or len(rows), len(rows))))
    tokenizer = load_tokenizer(given.model, start)
    model, reference = models_alike(given.model, start)
    figures: dict[str, Any] = {"model": given.model, "reference": start, "rows": len(rows)}
    if judge is not None:  # before the trainer takes the models
        if "prompt" not in rows.column_names:
            raise ValueError(f"--judge: {given.dataset} has no column prompt")
        figures["judge"] = judged(judge, (model, reference), tokenizer, rows, given)
    figures |= measured(model, reference, tokenizer, rows, given)
    if given.output:
        Path(given.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2) if given.json else _table(figures))
    return 0


def _parser() -> PositionalParser:
    parser = PositionalParser(prog="tralign-fast eval", description=run_eval.__doc__)
    parser.add_argument("model", metavar="MODEL", help="Folder of a run or model, or a hub id.")
    parser.add_argument("--dataset", required=True, help="Rows, as --dataset of train.")
    parser.add_argument("--split", default="test", help="Of these rows. A file is one split.")
    parser.add_argument("--reference", help="Default: the model that the run started from.")
    parser.add_argument("--loss_type", "--loss-type", default=None, help="As of train.")
    parser.add_argument("--beta", type=float, default=0.1, help="Of rewards and loss.")
    parser.add_argument("--limit", type=int, help="Rows at most.")
    parser.add_argument("--batch", type=int, default=8, help="Rows at a time.")
    parser.add_argument("--max_length", "--max-length", type=int, default=1024)
    parser.add_argument(
        "--judge", metavar="FILE.py:FUNCTION",
        help="(prompt, completion) -> number, the higher the better.",
    )  # fmt: skip
    parser.add_argument("--judge_prompts", "--judge-prompts", type=int, default=32)
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument("--output", help="File of the same JSON.")
    return parser


def models_alike(name: str, start: str) -> tuple[Any, Any]:
    """Both in the dtype that the run trained in, or in the wider one of what they were saved in:
    between bf16 and fp32 a model differs from itself."""
    dtype = dtype_of(name)
    model, start_model = (load_model(n, dtype=dtype, device=best_device()) for n in (name, start))
    wider = torch.promote_types(model.dtype, start_model.dtype)
    return model.to(wider), start_model.to(wider)


def measured(model: Any, reference: Any, tokenizer: Any, rows: Any, given: Any) -> dict[str, float]:
    """The trainer's own metrics of evaluation: a reward is β·(log π - log π_start)."""
    from tralign_fast import TRConfig, TRTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = TRConfig(
            folder, loss_type=given.loss_type, beta=given.beta, sync_ref_model=False,
            reference="resident", report_to=[], per_device_eval_batch_size=given.batch,
            max_length=given.max_length, use_cpu=best_device() == "cpu",
        )  # fmt: skip
        trainer = TRTrainer(
            model, reference, args=config, eval_dataset=rows, processing_class=tokenizer
        )
        trainer._models.initial = trainer.ref_model  # the KL is to the start that was given
        found = trainer.evaluate()
    return {n: found[f"eval_{n}"] for n in _FIGURES if f"eval_{n}" in found}


def judge_of(place: str) -> Callable[[str, str], float]:
    """The function of a file, given as FILE.py:FUNCTION.

    Raises:
        ValueError: no such file or function.
    """
    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise ValueError(f"--judge {place}: expected FILE.py:FUNCTION of a file that is there")
    spec = importlib.util.spec_from_file_location("judge_of_tralign_fast", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--judge {file}: expected a file of Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--judge {place}: {file} has no function {name}")
    try:
        inspect.signature(function).bind("a prompt", "its completion")
    except TypeError:
        raise ValueError(f"--judge {place}: expected a function of (prompt, completion)") from None
    except ValueError:  # a signature that Python does not know
        pass
    return cast("Callable[[str, str], float]", function)


def judged(
    judge: Callable[[str, str], float], models: Any, tokenizer: Any, rows: Any, given: Any
) -> dict[str, float]:
    """Means of the judge's numbers of greedy completions of both models, and how often the first
    is better; a draw is a half."""
    prompts = rows[: given.judge_prompts]["prompt"]
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    scores = []
    for model in models:
        texts = complete(model, tokenizer, ids, given.max_new_tokens)
        scores.append(
            [_number(judge(prompt_text(p), text)) for p, text in zip(prompts, texts, strict=True)]
        )
    after, before = scores
    wins = sum((a > b) + (a == b) / 2 for a, b in zip(after, before, strict=True))
    count = len(prompts)
    return {
        "model": sum(after) / count, "reference": sum(before) / count, "win_rate": wins / count,
        "prompts": count,
    }  # fmt: skip


def _number(judged: Any) -> float:
    try:
        number = float(judged)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"--judge: expected a finite number of each completion, got {judged!r}")
    return number


def _table(figures: dict[str, Any]) -> str:
    lines = [f"{figures['model']} against {figures['reference']}, {figures['rows']} rows"]
    lines += [f"{n:<20}{figures[n]:>12.4f}" for n in _FIGURES if n in figures]
    if judge := figures.get("judge"):
        lines += [f"{f'judge, {n}':<20}{v:>12.4f}" for n, v in judge.items()]
    return "\n".join(lines)
