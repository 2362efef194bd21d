"""Make the demo's preference pairs: sample SmolLM2, rank with VADER, pair within each prompt.

    python -m tralign_fast.demo.rows.make_rows --output_dir tralign_fast/demo/rows

Each batch of prompts has a random seed of its own, so that its rows depend on no other batch. The
same machine, thread count and library versions give the same files.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from tqdm import tqdm

from tralign_fast.demo.rows import PROMPTS_PATH, read_rows
from tralign_fast.demo.smollm2 import load_smollm2, load_smollm2_tokenizer

__all__ = ["Completion", "clean_completion", "main", "make_pairs", "read_prompts", "split_prompts"]

# Every fifth prompt of the file is held out: kinds of prompts are spread evenly over it.
TEST_EVERY = 5

# A full stop after a title or a single number does not end a sentence.
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\d)[.!?]+[\"'”’)]*")
# Templates to fill in, lists, headings, markup, handles, text about the task, the model on itself,
# and the two words among the samples that do not belong into a package.
_JUNK = re.compile(
    r"[\[\]{}<>*#|_=`@\\]|^\s*(?:\d+[.)]|[-•])\s|https?:|\bAI\b|SmolLM|Hugging Face"
    r"|(?i:language model|chatbot|capabilities include|(?:can|to) assist you with an?y?\b"
    r"|\bsentences?\b|\bparagraph|(?:short|brief) review\b|here(?:'|’| i)s an? |copy and paste"
    r"|help with that|help answer|rewrite|rephrase|revised version|\bshit\b|suicide)",
    re.MULTILINE,
)
MIN_TOKENS = 10


@dataclass(frozen=True)
class Completion:
    """A sampled answer: its text, its length in tokens with ``<|im_end|>``, its VADER score."""

    text: str
    tokens: int
    score: float


def read_prompts(path: str | Path = PROMPTS_PATH) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        ValueError: a prompt occurs twice.
    """
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if len(set(prompts)) != len(prompts):
        raise ValueError(f"{path} has a prompt twice")
    return prompts


def split_prompts(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """``(train, test)``: every fifth prompt goes to the test part."""
    test = list(prompts[TEST_EVERY - 1 :: TEST_EVERY])
    held_out = set(test)
    return [prompt for prompt in prompts if prompt not in held_out], test


def clean_completion(text: str, finished: bool) -> str | None:
    """A sampled text that ends cleanly, or None where there is none.

    Args:
        text: the decoded completion without special tokens.
        finished: whether the model ended it itself; if not, it is cut after its last sentence.
    """
    text = text.strip()
    if not finished:
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        text = text[: ends[-1]] if ends else ""
    # One kind of text only: plain English prose on a few lines, closing quotes included.
    ends_well = re.search(r"[.!?][\"'”’)]*$", text) is not None
    if not text or not ends_well or _JUNK.search(text) or not _is_plain(text):
        return None
    return text


def _is_plain(text: str) -> bool:
    typographic = "‘’“”–—…éèçñ°£€"
    return all(c.isascii() or c in typographic for c in text) and text.count('"') % 2 == 0


def make_pairs(
    completions: Sequence[Completion], max_pairs: int, min_margin: float, max_token_gap: int
) -> list[tuple[Completion, Completion]]:
    """Pairs ``(chosen, rejected)`` of one prompt's completions, each completion in one at most.

    A pair's scores differ by ``min_margin`` or more and its lengths by ``max_token_gap`` tokens or
    less. Pairs alike in length go first, and of those the ones with the wider margin, so that
    length does not tell chosen from rejected.
    """
    candidates = []
    for a, b in combinations(completions, 2):
        chosen, rejected = (a, b) if a.score > b.score else (b, a)
        margin = chosen.score - rejected.score
        gap = abs(chosen.tokens - rejected.tokens)
        if margin >= min_margin and gap <= max_token_gap:
            candidates.append((gap - 8.0 * margin, chosen, rejected))
    candidates.sort(key=lambda item: item[0])  # stable: ties keep the order of sampling
    pairs: list[tuple[Completion, Completion]] = []
    used: set[str] = set()
    for _, chosen, rejected in candidates:
        if len(pairs) < max_pairs and not used & {chosen.text, rejected.text}:
            used |= {chosen.text, rejected.text}
            pairs.append((chosen, rejected))
    return pairs


@torch.no_grad()
def _sample(
    model, tokenizer, prompts: Sequence[str], args: argparse.Namespace
) -> list[list[tuple[str, bool]]]:
    """``(text, finished)`` of ``args.samples`` completions of each prompt, in one batch."""
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(args.seed + zlib.crc32("\n".join(prompts).encode()))
    output = model.generate(
        **inputs,
        do_sample=True,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        num_return_sequences=args.samples,
        max_new_tokens=args.max_new_tokens,
    )
    answers = output[:, inputs["input_ids"].shape[1] :]
    finished = (answers == tokenizer.eos_token_id).any(dim=1).tolist()
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    samples = list(zip(texts, finished, strict=True))
    return [samples[i : i + args.samples] for i in range(0, len(samples), args.samples)]


def _completions(samples: list[tuple[str, bool]], tokenizer, scorer) -> list[Completion]:
    texts = dict.fromkeys(clean_completion(text, finished) for text, finished in samples)
    completions = []
    for text in texts:
        if text is None:
            continue
        tokens = len(tokenizer(text)["input_ids"]) + 1
        if tokens >= MIN_TOKENS:
            score = scorer.polarity_scores(text)["compound"]
            completions.append(Completion(text, tokens, score))
    return completions


def _row(prompt: str, chosen: Completion, rejected: Completion) -> dict:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "score_chosen": chosen.score,
        "score_rejected": rejected.score,
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=PROMPTS_PATH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=10, help="completions sampled per prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    # Of 49,152 tokens the tail is heavy in so small a model: without a cut, or with top_p 0.95, it
    # invents words. top_k also is cheaper, since top_p sorts the whole vocabulary at each step.
    parser.add_argument("--top_k", type=int, default=20)
    parser.add_argument("--max_new_tokens", type=int, default=56)
    parser.add_argument("--prompts_per_batch", type=int, default=8)
    parser.add_argument("--max_pairs", type=int, default=3, help="pairs per prompt at most")
    parser.add_argument("--min_margin", type=float, default=0.3, help="in VADER compound score")
    parser.add_argument("--max_token_gap", type=int, default=10, help="chosen against rejected")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; part of the seed")
    parser.add_argument(
        "--save_samples", type=Path, help="also write every raw sample to this JSON-lines file"
    )
    parser.add_argument(
        "--load_samples", type=Path, help="pair the samples of such a file instead of sampling"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Sample, rank, pair, and write ``train.jsonl`` and ``test.jsonl``.

    Raises:
        ValueError: SmolLM2 or vaderSentiment is not installed.
    """
    args = _parse(argv)
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ValueError("ranking needs VADER: run `pip install vaderSentiment`") from error
    prompts = read_prompts(args.prompts)
    tokenizer = load_smollm2_tokenizer()
    samples = _read_samples(args.load_samples) if args.load_samples else _sample_all(prompts, args)
    if args.save_samples is not None:
        _write(
            args.save_samples,
            [
                {"prompt": prompt, "text": text, "finished": finished}
                for prompt in prompts
                for text, finished in samples[prompt]
            ],
        )
    scorer = SentimentIntensityAnalyzer()
    rows: dict[str, list[dict]] = {}
    for prompt in prompts:
        pairs = make_pairs(
            _completions(samples[prompt], tokenizer, scorer),
            args.max_pairs,
            args.min_margin,
            args.max_token_gap,
        )
        rows[prompt] = [_row(prompt, chosen, rejected) for chosen, rejected in pairs]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train, test = split_prompts(prompts)
    for name, part in (("train", train), ("test", test)):
        part_rows = [row for prompt in part for row in rows[prompt]]
        _write(args.output_dir / f"{name}.jsonl", part_rows)
        print(f"{name}: {len(part_rows)} pairs of {sum(bool(rows[p]) for p in part)} prompts")


def _sample_all(prompts: Sequence[str], args: argparse.Namespace) -> dict[str, list]:
    torch.set_num_threads(args.threads)
    model, tokenizer = load_smollm2()
    tokenizer.padding_side = "left"
    samples: dict[str, list] = {}
    tokens, start = 0, time.perf_counter()
    bar = tqdm(total=len(prompts), desc="sampling", unit="prompt")
    for first in range(0, len(prompts), args.prompts_per_batch):
        group = prompts[first : first + args.prompts_per_batch]
        answers = _sample(model, tokenizer, group, args)
        samples.update(zip(group, answers, strict=True))
        tokens += sum(len(tokenizer(text)["input_ids"]) for texts in answers for text, _ in texts)
        bar.set_postfix(tokens_per_s=f"{tokens / (time.perf_counter() - start):.0f}")
        bar.update(len(group))
    bar.close()
    return samples


def _read_samples(path: Path) -> dict[str, list]:
    samples: dict[str, list] = {}
    for row in read_rows(path):
        samples.setdefault(row["prompt"], []).append((row["text"], row["finished"]))
    return samples


def _write(path: Path, rows: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
