"""What is measured of a policy on the way: fresh samples, their distance, three kinds of mass."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from benchmarks.evidence.hh_models import autocast, sample
from benchmarks.evidence.measure import distinct_2, mean_interval
from benchmarks.evidence.overoptimize_material import Material
from tralign_fast.data.packing import PackedBatch, PreferenceCollator
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import hidden_kl, sequence_logps

_BATCH = 32  # rows of a packed row

Ids = list[int]


def repetition(texts: Sequence[str], size: int = 3) -> float:
    """Share of an answer's runs of `size` words that stood in it before; mean over answers."""
    shares = []
    for text in texts:
        words = text.lower().split()
        runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        shares.append(1 - len(set(runs)) / len(runs) if runs else 0.0)
    return sum(shares) / len(shares)


def win_rate(rewards: Sequence[float], others: Sequence[float]) -> float:
    """Share of prompts whose answer has the larger reward; ties count half."""
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(rewards, others, strict=True)]
    return sum(wins) / len(wins)


class Diverged(Exception):
    """A policy whose log-probs are not finite."""


class Gauge:
    """Measures any policy of the material's kind, with the weights as they are.

    Args:
        initial: the policy that training starts from; nobody trains it.
        pairs: proxy or people: the kind of pairs that an arm is trained on.
        seed: of the samples. Those of the start and of all arms of a seed share their random
            numbers.
    """

    def __init__(self, initial: Any, material: Material, pairs: str, seed: int) -> None:
        self.initial, self.material, self.seed = initial.eval(), material, seed
        settings = material.settings
        layout = "shared" if prepare_model(initial).packs else "padded"
        self._paired = PreferenceCollator(paired=True, layout=layout)
        self._unpaired = PreferenceCollator(paired=False, layout=layout, mismatched=False)
        self.prompts = [row["prompt_ids"] for row in material.test["people"][: settings.prompts]]
        self._rows = {
            "train": material.pairs[pairs][: settings.held_out],
            "held_out": material.test[pairs][: settings.held_out],
        }
        self.start_margins: dict[str, list[float]] = {}  # of each kind of pairs, nats

    @torch.no_grad()
    def __call__(self, model: Any, start: dict[str, Any] | None = None) -> dict[str, Any]:
        """Figures of a policy that went through `prepare_model`.

        - gold, gold_ci: reward of one fresh answer to each prompt (temperature 1, the whole
          vocabulary), in deviations of the SFT's answers; mean and half of the 95% interval over
          prompts. check: of the second gold, None without one
        - win_rate: share of prompts whose answer is better than the SFT's
        - kl: KL(π || π_0) of an answer, nats: at every token of the samples the exact divergence
          over the vocabulary, summed. kl_samples: mean of log π(y) - log π_0(y), which has the
          same expectation. kl_token: `kl` over the mean length
        - length, repetition (`repetition`), distinct_2 of the samples
        - train_*, held_out_*: mean log-prob (nats) of the chosen, of the rejected and of the SFT's
          other answer to the same prompts; accuracy: share of pairs whose margin has grown
        - golds: each prompt's reward; samples: texts of the first prompts

        Args:
            start: figures of the initial policy, which is measured first; None: `model` is it.

        Raises:
            Diverged: log-probs that are not finite, of which no sample can be drawn.
        """
        modes, python = model.training, random.getstate()
        model.eval()
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with autocast(model.device, self.material.settings.bf16):
                of_pairs = self._of_pairs(model)
            if not all(map(math.isfinite, of_pairs.values())):
                raise Diverged("held-out log-probs are not finite")
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.seed)
                answers = self._sample(model)
            with autocast(model.device, self.material.settings.bf16):
                return {**self._of_samples(model, answers, start), **of_pairs}
        finally:
            model.train(modes)
            random.setstate(python)

    def _sample(self, model: Any) -> list[tuple[Ids, Ids]]:
        settings, material = self.material.settings, self.material
        found = sample(
            model, self.prompts, eos=material.eos, pad=material.pad, copies=1,
            new_tokens=settings.new_tokens, batch=settings.sample_batch, bf16=settings.bf16,
        )  # fmt: skip
        return [(prompt, one) for prompt, (one,) in zip(self.prompts, found, strict=True)]

    def _of_samples(
        self, model: Any, answers: list[tuple[Ids, Ids]], start: dict[str, Any] | None
    ) -> dict[str, Any]:
        judges = self.material.judges
        golds = judges["gold"](answers)
        check = judges["check"](answers) if "check" in judges else None
        gold, interval = mean_interval([[value] for value in golds])
        rows = [{"prompt_ids": p, "completion_ids": a, "label": True} for p, a in answers]
        total = estimate = 0.0
        for batch in self._batches(self._unpaired, rows, model.device):
            total += float(hidden_kl(model, self.initial, batch))
            own, first = (sequence_logps(m, batch)[: len(batch)] for m in (model, self.initial))
            estimate += float((own - first).sum())
        length = sum(len(answer) for _, answer in answers) / len(answers)
        texts = self.material.tokenizer.batch_decode(
            [answer for _, answer in answers], skip_special_tokens=True
        )
        shown = self.material.settings.samples_shown
        return {
            "gold": gold, "gold_ci": interval,
            "check": sum(check) / len(check) if check else None,
            "win_rate": win_rate(golds, golds if start is None else start["golds"]),
            "kl": total / len(rows), "kl_samples": estimate / len(rows),
            "kl_token": total / len(rows) / length,
            "length": length, "repetition": repetition(texts), "distinct_2": distinct_2(texts),
            "golds": golds, "checks": check, "samples": texts[:shown],
        }  # fmt: skip

    def _of_pairs(self, model: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, rows in self._rows.items():
            pairs = torch.cat(
                [sequence_logps(model, batch).view(2, -1)
                 for batch in self._batches(self._paired, rows, model.device)], 1
            )  # fmt: skip
            others = [{"prompt_ids": r["prompt_ids"], "completion_ids": r["other_ids"],
                       "label": True} for r in rows]  # fmt: skip
            other = torch.cat(
                [sequence_logps(model, batch)[: len(batch)]
                 for batch in self._batches(self._unpaired, others, model.device)]
            )  # fmt: skip
            margin = (pairs[0] - pairs[1]).cpu()
            if model is self.initial:
                self.start_margins[name] = margin.tolist()
            first = torch.tensor(self.start_margins[name])
            found[f"{name}_chosen"], found[f"{name}_rejected"] = pairs.mean(1).tolist()
            found[f"{name}_other"] = float(other.mean())
            grown = (margin > first).double() + 0.5 * (margin == first).double()
            found[f"{name}_accuracy"] = float(grown.mean())
        return found

    def _batches(
        self, collate: PreferenceCollator, rows: Sequence[dict[str, Any]], device: Any
    ) -> Iterator[PackedBatch]:
        for start in range(0, len(rows), _BATCH):
            for part in collate(rows[start : start + _BATCH]).parts:
                yield part.to(device)


def turning_point(points: Sequence[dict[str, Any]], key: str = "gold") -> dict[str, float]:
    """Where a curve is highest, how high, and what is left of it at the last point."""
    best = max(points, key=lambda point: point[key])
    return {
        "step": best["step"], "kl": best["kl"], "height": best[key],
        "left": points[-1][key], "last_kl": points[-1]["kl"],
    }  # fmt: skip


def neighbours(points: Sequence[dict[str, Any]], distance: float) -> tuple[int, int, float]:
    """The first two neighbouring points between which the curve passes a distance √KL, and where
    between them (0 to 1); the last point twice where it never comes so far."""
    for index, (first, second) in enumerate(pairwise(points)):
        low, high = first["kl"] ** 0.5, second["kl"] ** 0.5
        if low <= distance <= high:
            return index, index + 1, (distance - low) / (high - low) if high > low else 0.0
    return len(points) - 1, len(points) - 1, 0.0
