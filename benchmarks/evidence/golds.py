"""What a gold could know of people's pairs: accuracies of several, on the CPU's cut answers.

Every head is the same logistic regression on another kind of features. Its accuracy is taken twice:
by cross-validation on the gold's own part, a conversation in one fold, and on the held-out pairs
that no gold is fitted to. Nothing is chosen by the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import format_table
from benchmarks.evidence import hh_models
from benchmarks.evidence.cache import cached_folder
from benchmarks.evidence.overoptimize_arms import CPU, Settings
from benchmarks.evidence.overoptimize_material import parts_of
from benchmarks.evidence.preferences import Row, digest, read_pairs

FOLDS = 5
LAYERS = (4, 8, 12, 16, 20)  # of the whole model, whose hidden states are features
_BATCH = 32

Ids = list[int]
Pairs = Sequence[tuple[Ids, Ids, Ids]]


def run(source: str, root: Path, settings: Settings = CPU) -> list[dict[str, Any]]:
    """A row for each kind of features; those of the backbone are kept in `root`.

    Raises:
        ValueError: the data is missing, damaged or too small; wordllama is not installed.
    """
    rows = read_pairs(source)
    model, tokenizer = hh_models.small_smollm2(settings.layers, settings.vocabulary)
    del model
    gold, test, *_ = parts_of(rows, tokenizer, settings)
    groups = conversations(gold)
    pairs = [pair for _, pair in gold], [pair for _, pair in test]
    found = []
    for name, penalty, (own, held_out) in _kinds(pairs, tokenizer, settings, root, digest(rows)):
        outcomes = cross_validated(own, groups, penalty)
        later = right(held_out @ hh_models.logistic(own, penalty))
        row: dict[str, Any] = {"features": name, "penalty": penalty}
        for key, each in (("folds", outcomes), ("held_out", later)):
            half = 1.96 * float(each.std()) / len(each) ** 0.5
            row |= {f"{key}_pairs": len(each), f"{key}_accuracy": float(each.mean()),
                    f"{key}_ci": half}  # fmt: skip
        found.append(row)
    return found


def conversations(rows: Sequence[tuple[Row, Any]]) -> list[int]:
    """A number for each row: that of its conversation, in the order in which they come."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(row["prompt"][0]["content"], len(numbers)) for row, _ in rows]


def right(margins: Tensor) -> Tensor:
    """(pairs,) 1 where the chosen answer has the larger reward, 0.5 at a tie, else 0."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def cross_validated(x: Tensor, groups: Sequence[int], penalty: float) -> Tensor:
    """(pairs,) `right` of each pair by a head that was fitted to the other folds."""
    fold, found = torch.tensor(groups) % FOLDS, torch.zeros(len(x), dtype=torch.float64)
    for index in range(FOLDS):
        out = fold == index
        found[out] = right(x[out] @ hh_models.logistic(x[~out], penalty))
    return found


def _kinds(
    pairs: tuple[Pairs, Pairs], tokenizer: Any, settings: Settings, root: Path, rows: str
) -> Iterator[tuple[str, float, tuple[Tensor, Tensor]]]:
    """Name, penalty, and differences of features of the gold's own pairs and the held-out ones."""
    words, tokens = hh_models.WordGold(tokenizer), hh_models.TokenGold(settings.vocabulary)
    own, held_out = (words.differences(each) for each in pairs)
    yield "words, times the prompt's (the gold)", 0.01, (own, held_out)
    yield "words", 0.01, (own[:, :256], held_out[:, :256])
    x, y = (tokens.differences(each) for each in pairs)
    common = tokens.common(x)
    yield "tokens (the second gold)", 0.03, (x[:, common], y[:, common])
    folder = cached_folder(
        root, "features",
        {"rows": rows, "layers": LAYERS, "vocabulary": settings.vocabulary,
         "lengths": [settings.prompt_tokens, settings.new_tokens]},
        lambda part: torch.save([_hidden(each, tokenizer) for each in pairs], part / "hidden.pt"),
    )  # fmt: skip
    hidden = torch.load(folder / "hidden.pt", weights_only=True)
    for layer in LAYERS:
        for kind in ("mean", "last"):
            x, y = (each[f"{layer} {kind}"].double() for each in hidden)
            scale = 24 * (x.std(0) + 1e-6)  # 576 features: a norm of about 1
            yield f"layer {layer}, {kind} token", 0.1, (x / scale, y / scale)


@torch.no_grad()
def _hidden(pairs: Pairs, tokenizer: Any) -> dict[str, Tensor]:
    """(pairs, 576) each: the mean of the whole model's hidden states in an answer, and the last of
    them, chosen less rejected. Texts are tokenised anew, by the whole tokenizer."""
    from tralign_fast.demo.smollm2 import load_smollm2

    model, whole = load_smollm2()
    decoder: Any = model.model.eval()
    decoder.layers, decoder.norm = decoder.layers[: max(LAYERS)], torch.nn.Identity()
    signed = [(p, a, s) for p, *two in pairs for a, s in zip(two, (1, -1), strict=True)]
    texts = [tokenizer.batch_decode([row[i] for row in signed]) for i in (0, 1)]
    prompts, answers = (whole(each, add_special_tokens=False)["input_ids"] for each in texts)
    found = {f"{layer} {kind}": torch.zeros(len(pairs), decoder.config.hidden_size)
             for layer in LAYERS for kind in ("mean", "last")}  # fmt: skip
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    order = sorted(range(len(signed)), key=lengths.__getitem__)
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        ids, mask = hh_models.padded([prompts[i] + answers[i] for i in part], 0, "cpu")
        states = decoder(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states
        for layer in LAYERS:
            for row, i in enumerate(part):
                answer = states[layer][row, len(prompts[i]) : lengths[i]]
                found[f"{layer} mean"][i // 2] += signed[i][2] * answer.mean(0)
                found[f"{layer} last"][i // 2] += signed[i][2] * answer[-1]
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]
    header = ["features", "penalty", f"{FOLDS} folds of {first['folds_pairs']} pairs",
              f"{first['held_out_pairs']} held-out pairs"]  # fmt: skip
    return format_table(header, [
        [row["features"], f"{row['penalty']:g}",
         *(f"{row[f'{k}_accuracy']:.3f} ± {row[f'{k}_ci']:.3f}" for k in ("folds", "held_out"))]
        for row in rows
    ])  # fmt: skip
