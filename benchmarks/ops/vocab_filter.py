"""The vocab_filter on a real model: ε against columns kept, error and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import device_name, format_table, plot_lines, summarize
from benchmarks.ops.arms import DTYPES
from benchmarks.ops.turns import relative_error


@torch.no_grad()
def smollm2_tokens(model: Any, tokenizer: Any, count: int) -> tuple[Tensor, Tensor]:
    """(hidden (count, H), targets (count,)): SmolLM2's completions of the demo, its own samples."""
    from tralign_fast.demo.rows import train_rows

    hidden, targets, found = [], [], 0
    for row in train_rows():
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=False
        )
        answer = row["chosen"][0]["content"] + tokenizer.eos_token
        prompt, answer = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)
        )
        ids = torch.tensor([prompt + answer], device=model.device)
        states = model.model(ids).last_hidden_state[0]
        hidden.append(states[len(prompt) - 1 : -1])
        targets.append(ids[0, len(prompt) :])
        found += len(answer)
        if found >= count:
            return torch.cat(hidden)[:count], torch.cat(targets)[:count]
    raise ValueError(f"the demo's rows have {found} tokens, expected at least {count}")


EPSILONS = (None, 3e-6, 1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)


def measure(
    tokens: int, dtype: str, device: str, rounds: int, epsilons: Sequence[float | None] = EPSILONS
) -> list[dict[str, Any]]:
    """CSV rows, one an ε: columns kept, errors of the gradients, seconds of forward and backward.

    Errors are against the exact gradients in the same dtype, beside that of rounding those to bf16.
    Timed in turn with the three bare products over the whole vocabulary.
    """
    from tralign_fast import linear_logprobs
    from tralign_fast.demo.smollm2 import load_smollm2
    from tralign_fast.ops.vocab_filter import last_vocab_filter

    model: Any
    model, tokenizer = load_smollm2()
    hidden, targets = smollm2_tokens(model.to(device), tokenizer, tokens)
    leaves = [t.detach().to(DTYPES[dtype]) for t in (hidden, model.lm_head.weight)]
    hidden, weight = (t.requires_grad_() for t in leaves)
    # DPO's gradient: one sign for the tokens of a chosen completion, the other for a rejected one's
    grad = torch.where(torch.arange(tokens, device=device) % 80 < 40, 1.0, -1.0)

    def ours(epsilon: float | None) -> tuple[Tensor, ...]:
        logps = linear_logprobs(hidden, weight, targets, vocab_filter=epsilon)
        return torch.autograd.grad(logps, (hidden, weight), grad)

    def bare() -> None:
        with torch.no_grad():
            logits = hidden @ weight.t()
            _ = logits @ weight, logits.t() @ hidden

    exact = [g.float() for g in ours(None)]
    rounding = [relative_error(g.bfloat16(), g) for g in exact]
    reports, errors = {}, {}
    for epsilon in epsilons:
        gradients = ours(epsilon)
        reports[epsilon] = last_vocab_filter() if epsilon else None
        errors[epsilon] = [relative_error(g, e) for g, e in zip(gradients, exact, strict=True)]
    works: dict[Any, Callable[[], Any]] = {"bare": bare}
    works.update({e: (lambda e=e: ours(e)) for e in epsilons})
    seconds: dict[Any, list[float]] = {key: [] for key in works}
    for _ in range(rounds):
        for key, work in works.items():
            begin = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[key].append(time.perf_counter() - begin)
    limit = summarize(seconds["bare"]).median
    vocab = weight.shape[0]
    records = []
    for epsilon in epsilons:
        report, time_of = reports[epsilon], summarize(seconds[epsilon])
        records.append(
            {
                "epsilon": epsilon or 0.0,
                "dtype": dtype,
                "N": tokens,
                "H": weight.shape[1],
                "V": vocab,
                "columns": report.columns if report else vocab,
                "kept": report.columns / vocab if report else 1.0,
                "left_out_mass": report.left_out_mass if report else 0.0,
                "exact": report.exact if report else True,
                "d_hidden_error": errors[epsilon][0],
                "d_weight_error": errors[epsilon][1],
                "d_hidden_bf16_rounding": rounding[0],
                "d_weight_bf16_rounding": rounding[1],
                "median_s": time_of.median,
                "p20_s": time_of.p20,
                "p80_s": time_of.p80,
                "bare_s": limit,
                "ratio_to_bare": time_of.median / limit,
                "device": device_name(device),
            }
        )
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    header = ("ε", "kept", "mass", "d hidden", "d weight", "median s", "× bare", "")
    rows = [
        (
            f"{r['epsilon']:.3g}", f"{r['kept']:.1%}", f"{r['left_out_mass']:.2%}",
            f"{r['d_hidden_error']:.3%}", f"{r['d_weight_error']:.3%}", f"{r['median_s']:.4g}",
            f"{r['ratio_to_bare']:.3f}", "exact" if r["exact"] else "",
        )
        for r in records
    ]  # fmt: skip
    first = records[0]
    return format_table(header, rows) + (
        f"\nrounding to bf16: d hidden {first['d_hidden_bf16_rounding']:.3%}, d weight "
        f"{first['d_weight_bf16_rounding']:.3%}; bare products {first['bare_s']:.4g} s"
    )


def plot(path: Path, records: Sequence[dict[str, Any]]) -> None:
    shown = sorted((r for r in records if not r["exact"]), key=lambda r: r["epsilon"])
    first = records[0]

    def line(key: str) -> list[tuple[float, float]]:
        return [(r["epsilon"], r[key]) for r in shown]

    def level(value: float) -> list[tuple[float, float]]:
        return [(r["epsilon"], value) for r in shown]

    exact = next(r["ratio_to_bare"] for r in records if not r["epsilon"])
    errors = {"d hidden": line("d_hidden_error"), "d weight": line("d_weight_error")}
    errors["bf16 rounding of d hidden"] = level(first["d_hidden_bf16_rounding"])
    times = {
        "with the filter": line("ratio_to_bare"),
        "without": level(exact),
        "bare products": level(1.0),
    }
    panels = [
        ("ε", "columns kept", {"kept": line("kept")}),
        ("ε", "relative error", errors),
        ("ε", "seconds over the bare products'", times),
    ]
    title = f"vocab_filter: SmolLM2 on {first['N']} tokens of its own samples, {first['dtype']}"
    plot_lines(path, panels, columns=3, title=f"{title}, {first['device']}")
