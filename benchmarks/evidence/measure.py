"""What is measured of a policy on the way: fresh samples, distance from the start, held-out pairs.

All of it is taken with the weights as they are and leaves the run's random numbers alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from benchmarks.evidence.arms import Settings
from tralign_fast.data.packing import PackedBatch, PreferenceCollator
from tralign_fast.data.tokenization import tokenize_pairs
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import hidden_kl, sequence_logps

_BATCH = 16  # rows of two completions


class Sample(NamedTuple):
    prompt_ids: list[int]
    completion_ids: list[int]  # up to and with the end of the turn
    text: str


def mean_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval.

    Samples of one prompt resemble each other: the interval is that of the prompts' means,
    `1.96·sd/√prompts`. NaN for a single prompt.
    """
    means = torch.tensor([sum(group) / len(group) for group in groups], dtype=torch.float64)
    spread = means.std() if len(means) > 1 else torch.tensor(float("nan"))
    return float(means.mean()), float(1.96 * spread / len(means) ** 0.5)


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all such pairs, of all texts together.

    Low where a policy repeats itself, within a text or from one to the next. NaN without a pair.
    """
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else float("nan")


class Gauge:
    """Measures any policy of the initial model's kind.

    Args:
        initial: the model that training starts from; a copy that nobody trains.
        prompts: conversations, held out.
        held_out: preference pairs, conversational, held out.
        gold: the gold reward of a text.
    """

    def __init__(
        self,
        initial: Any,
        tokenizer: Any,
        prompts: Sequence[list[dict[str, str]]],
        held_out: Sequence[dict[str, Any]],
        gold: Callable[[str], float],
        settings: Settings,
        seed: int,
    ) -> None:
        self.initial, self.tokenizer, self.gold = initial.eval(), tokenizer, gold
        self.settings, self.seed = settings, seed
        self.prompts = list(prompts[: settings.prompts])
        layout = "shared" if prepare_model(initial).packs else "padded"
        self._collate = PreferenceCollator(paired=True, layout=layout)
        columns = ["prompt", "chosen", "rejected"]
        rows = Dataset.from_list(list(held_out[: settings.held_out])).select_columns(columns)
        self._held_out: list[Any] = list(
            tokenize_pairs(rows, tokenizer, max_length=settings.max_length, name="held-out")
        )

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, Any]:
        """Figures of a policy that went through `prepare_model`.

        - gold_reward, gold_reward_ci: of two fresh samples a prompt, drawn at temperature 1 from
          the whole vocabulary; mean and half of the 95% interval (`mean_interval`)
        - kl_initial: KL(π || π_0) of a completion, nats: at every token of the samples the exact
          divergence over the vocabulary, summed over the completion
        - held_out_accuracy: share of held-out pairs whose chosen completion is the likelier
        - logps_chosen, logps_rejected: mean log-prob of the held-out completions, nats
        - length: tokens of a sample; distinct_2: of all samples
        - samples: (prompt, completion) texts
        """
        modes, python = model.training, random.getstate()
        model.eval()
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.seed)
                answers = self._sample(model)
            return {**self._of_samples(model, answers), **self._of_pairs(model)}
        finally:
            model.train(modes)
            random.setstate(python)

    def _sample(self, model: Any) -> list[list[Sample]]:
        answers = []
        for start in range(0, len(self.prompts), _BATCH):
            inputs = self.tokenizer.apply_chat_template(
                self.prompts[start : start + _BATCH], add_generation_prompt=True, padding=True,
                return_tensors="pt", return_dict=True, tokenizer_kwargs={"padding_side": "left"},
            ).to(model.device)  # fmt: skip
            out = model.generate(
                **inputs, max_new_tokens=self.settings.new_tokens, do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, num_return_sequences=2,
            )  # fmt: skip
            completions = out[:, inputs["input_ids"].shape[1] :].tolist()
            masks = inputs["attention_mask"].bool()
            for i, (ids, mask) in enumerate(zip(inputs["input_ids"], masks, strict=True)):
                prompt = ids[mask].tolist()
                answers.append([self._cut(prompt, c) for c in completions[2 * i : 2 * i + 2]])
        return answers

    def _cut(self, prompt_ids: list[int], ids: list[int]) -> Sample:
        end = self.tokenizer.eos_token_id
        ids = ids[: ids.index(end) + 1] if end in ids else ids
        return Sample(prompt_ids, ids, self.tokenizer.decode(ids, skip_special_tokens=True))

    def _of_samples(self, model: Any, answers: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        flat = [sample for pair in answers for sample in pair]
        reward, interval = mean_interval([[self.gold(s.text) for s in pair] for pair in answers])
        # the two samples of a prompt stand in one row, behind the prompt
        rows = [
            {
                "prompt_ids": first.prompt_ids,
                "chosen_ids": first.completion_ids,
                "rejected_ids": second.completion_ids,
            }
            for first, second in answers
        ]
        total = sum(float(hidden_kl(model, self.initial, b)) for b in self._batches(model, rows))
        return {
            "gold_reward": reward,
            "gold_reward_ci": interval,
            "kl_initial": total / len(flat),
            "length": sum(len(s.completion_ids) for s in flat) / len(flat),
            "distinct_2": distinct_2([s.text for s in flat]),
            "samples": [
                (prompt[-1]["content"], pair[0].text)
                for prompt, pair in zip(self.prompts, answers, strict=True)
            ],
        }

    def _of_pairs(self, model: Any) -> dict[str, float]:
        batches = self._batches(model, self._held_out)
        logps = torch.cat([sequence_logps(model, b).view(2, -1) for b in batches], 1).cpu()
        chosen, rejected = logps
        return {
            "held_out_accuracy": float((chosen > rejected).float().mean()),
            "logps_chosen": float(chosen.mean()),
            "logps_rejected": float(rejected.mean()),
        }

    def _batches(self, model: Any, rows: Sequence[dict[str, Any]]) -> list[PackedBatch]:
        starts = range(0, len(rows), _BATCH)
        batches = [self._collate(rows[start : start + _BATCH]) for start in starts]
        return [part.to(model.device) for batch in batches for part in batch.parts]
