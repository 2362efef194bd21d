"""What every arm starts from, made once: the SFT policy, the golds, the pairs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import hh_models
from benchmarks.evidence.cache import cached_folder, read_json, write_json
from benchmarks.evidence.overoptimize_arms import Settings
from benchmarks.evidence.preferences import Row, digest, read_pairs, split
from tralign_fast.ops.backend import warn_once

# Settings that the material depends on, and an arm's own do not change.
_OF_MATERIAL = (
    "layers", "vocabulary", "prompt_tokens", "new_tokens", "bf16", "sft_steps", "sft_rate", "gold",
    "check", "gold_steps", "gold_rate", "model_batch", "policy_rows", "test_rows", "gold_test_rows",
    "flipped", "sample_batch",
)  # fmt: skip

GOLD_LAYERS = 12  # of the backbone: the best ones over the folds of `golds.py`

Ids = list[int]
Judge = Callable[[Sequence[tuple[Ids, Ids]]], list[float]]


@dataclass
class Material:
    """Rows hold token ids: prompt_ids, chosen_ids, rejected_ids, other_ids (in no pair)."""

    folder: Path
    settings: Settings
    tokenizer: Any
    device: str
    pairs: dict[str, list[dict[str, Ids]]]  # proxy, people: what arms are trained on
    test: dict[str, list[dict[str, Ids]]]  # the same kinds, of held-out prompts
    facts: dict[str, Any]  # sizes, accuracies, agreement of the golds
    judges: dict[str, Judge]  # gold (standardised: 0 and 1 are the SFT's), check

    def policy(self) -> Any:
        """A fresh copy of the SFT policy, on the device, float32."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            self.folder / "policy", dtype=torch.float32
        )
        return model.to(self.device)

    @property
    def eos(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id


def load_material(
    source: str, settings: Settings, root: Path, device: str,
    backbone: Callable[[int, int], tuple[Any, Any]] = hh_models.small_smollm2,
    read: Callable[[str], list[Row]] = read_pairs,
) -> Material:  # fmt: skip
    """The material of these settings, from `root` where it was made before.

    Raises:
        ValueError: the data is missing, damaged or too small; a package is missing.
    """
    rows = read(source)
    config = {key: value for key, value in asdict(settings).items() if key in _OF_MATERIAL}
    folder = cached_folder(
        root, "material", {"rows": digest(rows), **config},
        lambda part: _make(rows, settings, part, device, backbone),
    )  # fmt: skip
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    stored = read_json(folder / "material.json")
    return Material(
        folder, settings, tokenizer, device, stored["pairs"], stored["test"], stored["facts"],
        _judges(folder, settings, tokenizer, device, stored["facts"]),
    )  # fmt: skip


def _judges(
    folder: Path, settings: Settings, tokenizer: Any, device: str, facts: dict[str, Any]
) -> dict[str, Judge]:
    found: dict[str, Judge] = {}
    if (folder / "gold").is_dir():
        from transformers import AutoModelForSequenceClassification

        model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "gold")
        found["model"] = hh_models.Gold(model.to(device).eval(), tokenizer.pad_token_id,
                                        settings.bf16)  # fmt: skip
    if (folder / "head.pt").is_file():
        head = torch.load(folder / "head.pt", weights_only=True)
        decoder = torch.load(folder / "decoder.pt", weights_only=False)  # made here, by `_make`
        found["backbone"] = hh_models.BackboneGold(
            decoder.to(device), tokenizer.pad_token_id, settings.bf16, head["scale"]
        )
        found["backbone"].weight = head["weight"]
    if (folder / "words.pt").is_file():
        words = hh_models.WordGold(tokenizer)
        words.weight = torch.load(folder / "words.pt", weights_only=True)
        found["words"] = words
    if (folder / "tokens.pt").is_file():
        found["tokens"] = hh_models.TokenGold(settings.vocabulary)
        found["tokens"].weight = torch.load(folder / "tokens.pt", weights_only=True)
    names = [name for name in (settings.gold, settings.check) if name in found]
    return {
        key: _standardised(found[name], *facts["scale"][name])
        for key, name in zip(("gold", "check"), names, strict=False)
    }


def _standardised(judge: Judge, mean: float, spread: float) -> Judge:
    return lambda rows: [(value - mean) / spread for value in judge(rows)]


def _make(
    rows: list[Row], settings: Settings, folder: Path, device: str,
    backbone: Callable[[int, int], tuple[Any, Any]],
) -> None:  # fmt: skip
    model, tokenizer = backbone(settings.layers, settings.vocabulary)
    model.to(device)

    gold, gold_test, policy, test = (
        [pair for _, pair in part] for part in parts_of(rows, tokenizer, settings)
    )
    judges = _train_judges(model, tokenizer, settings, folder, gold)
    # The policy's own answers, and the gold's: a CPU's SFT is short of rows.
    sft = [(prompt, chosen) for prompt, chosen, _ in [*policy, *gold]]
    hh_models.train(
        model, lambda n: hh_models.sft_loss(model, [sft[i] for i in n], tokenizer.pad_token_id),
        len(sft), steps=settings.sft_steps, size=settings.model_batch, rate=settings.sft_rate,
        seed=0, bf16=settings.bf16,
    )  # fmt: skip
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    facts: dict[str, Any] = {
        "rows": {"gold": len(gold), "gold_test": len(gold_test), "policy": len(policy),
                 "test": len(test)},
        # a card does not train twice to the same bits
        "policy": float(sum(p.detach().double().sum() for p in model.parameters())).hex(),
        "accuracy": {name: hh_models.accuracy(judge, gold_test) for name, judge in judges.items()},
    }  # fmt: skip
    pairs, held_out = {}, {}
    for seed, (where, part) in enumerate(((pairs, policy), (held_out, test))):
        answers = _answers(model, tokenizer, [prompt for prompt, _, _ in part], settings, seed)
        rated = {name: _rated(judge, part, answers) for name, judge in judges.items()}
        if seed == 0:
            facts |= _scales(rated)
        flips = random.Random(seed)
        where["proxy"] = _ranked(part, answers, rated[settings.gold], settings.flipped, flips)
        where["people"] = [
            _row(prompt, chosen, rejected, three[2])
            for (prompt, chosen, rejected), three in zip(part, answers, strict=True)
        ]
    write_json(folder / "material.json", {"pairs": pairs, "test": held_out, "facts": facts})


def parts_of(
    rows: list[Row], tokenizer: Any, settings: Settings
) -> list[list[tuple[Row, tuple[Ids, Ids, Ids]]]]:
    """The rows of gold, gold_test, policy, test, each with ids of prompt, chosen and rejected;
    answers that are alike once they are cut are no pair."""

    def ids(row: Row) -> tuple[Ids, Ids, Ids]:
        chosen, rejected = (
            hh_models.answer_ids(tokenizer, row[key], settings.new_tokens)
            for key in ("chosen", "rejected")
        )
        prompt = hh_models.prompt_ids(tokenizer, row["prompt"], settings.prompt_tokens)
        return prompt, chosen, rejected

    lengths = [
        len(hh_models.prompt_ids(tokenizer, r["prompt"], settings.prompt_tokens + 1)) for r in rows
    ]
    parts = split(
        rows, settings.policy_rows, settings.test_rows, settings.gold_test_rows,
        [length <= settings.prompt_tokens for length in lengths],
    )  # fmt: skip
    return [
        [(row, pair) for row in part if (pair := ids(row))[1] != pair[2]]
        for part in (parts.gold, parts.gold_test, parts.policy, parts.test)
    ]


def _train_judges(
    backbone: Any, tokenizer: Any, settings: Settings, folder: Path, pairs: list[Any]
) -> dict[str, Judge]:
    judges: dict[str, Judge] = {}
    if settings.gold_steps:
        gold = hh_models.Gold.untrained(backbone, tokenizer.pad_token_id, settings.bf16)
        gold.fit(
            pairs, steps=settings.gold_steps, size=settings.model_batch, rate=settings.gold_rate,
            seed=0,
        )  # fmt: skip
        gold.model.save_pretrained(folder / "gold")
        judges["model"] = gold
    if settings.gold == "backbone":
        decoder = hh_models.first_layers(backbone, GOLD_LAYERS)
        head = hh_models.BackboneGold(decoder, tokenizer.pad_token_id, settings.bf16)
        head.fit(pairs)
        torch.save({"weight": head.weight, "scale": head.scale}, folder / "head.pt")
        torch.save(decoder, folder / "decoder.pt")
        judges["backbone"] = head
    try:
        words = hh_models.WordGold(tokenizer)
    except ValueError as error:
        if settings.gold == "words":
            raise
        warn_once(f"one gold only: {error}")
    else:
        words.fit(pairs)
        torch.save(words.weight, folder / "words.pt")
        judges["words"] = words
    if settings.check == "tokens":
        tokens = hh_models.TokenGold(settings.vocabulary)
        tokens.fit(pairs)
        torch.save(tokens.weight, folder / "tokens.pt")
        judges["tokens"] = tokens
    return judges


def _answers(
    model: Any, tokenizer: Any, prompts: list[Ids], settings: Settings, seed: int
) -> list[list[Ids]]:
    """Three of the policy's own answers to every prompt: two make a pair, one stands apart."""
    torch.manual_seed(seed)
    return hh_models.sample(
        model, prompts, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id,
        new_tokens=settings.new_tokens, copies=3, batch=settings.sample_batch, bf16=settings.bf16,
    )  # fmt: skip


def _rated(judge: Judge, part: list[Any], answers: list[list[Ids]]) -> list[list[float]]:
    flat = judge([(row[0], a) for row, three in zip(part, answers, strict=True) for a in three])
    return [flat[3 * i : 3 * i + 3] for i in range(len(part))]


def _scales(rated: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Mean and deviation of each gold over the SFT's answers, and how often two golds agree."""
    values = {name: torch.tensor(each, dtype=torch.float64) for name, each in rated.items()}
    scale = {name: [float(v.mean()), float(v.std())] for name, v in values.items()}
    signs = [(v[:, 0] > v[:, 1]) for v in values.values()]
    agree = float((signs[0] == signs[1]).double().mean()) if len(signs) == 2 else None
    return {"scale": scale, "golds_agree": agree}


def _ranked(
    part: list[Any], answers: list[list[Ids]], rated: list[list[float]], flipped: float,
    flips: random.Random,
) -> list[dict[str, Ids]]:  # fmt: skip
    rows = []
    for (prompt, _, _), (first, second, other), (left, right, _) in zip(
        part, answers, rated, strict=True
    ):
        if first == second:
            continue
        swap = (left < right) != (flips.random() < flipped)
        chosen, rejected = (second, first) if swap else (first, second)
        rows.append(_row(prompt, chosen, rejected, other))
    return rows


def _row(prompt: Ids, chosen: Ids, rejected: Ids, other: Ids) -> dict[str, Ids]:
    return {
        "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "other_ids": other,
    }  # fmt: skip
