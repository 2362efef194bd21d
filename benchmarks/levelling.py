"""How even the tokens of processes are, before and after the rows of a global batch are dealt out.

    python -m benchmarks.levelling ROWS.jsonl [--processes 8] [--pairs 4] [--max_length 1024]

A step of several processes takes as long as the one with the most tokens. Counted is, for every
global batch of an epoch, the most tokens of a process over their mean, and of these the mean and
the 95th percentile; 1 is even. Nothing is timed. Rows are tokenised by SmolLM2's tokenizer.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from statistics import mean, quantiles

from tralign_fast.data.sampling import level


def imbalance(
    lengths: Sequence[int], order: Sequence[int], processes: int, pairs: int, levelled: bool
) -> list[float]:
    """Of every whole global batch: most tokens of a process, over the mean."""
    size, found = processes * pairs, []
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        shares = [rows[i : i + pairs] for i in range(0, size, pairs)]
        if levelled:
            shares = level(rows, lengths, processes)
        tokens = [sum(lengths[row] for row in share) for share in shares]
        found.append(max(tokens) * processes / sum(tokens))
    return found


def orders(lengths: Sequence[int], processes: int, pairs: int) -> dict[str, list[int]]:
    """The orders that the trainer has, by their option."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    shuffled = list(range(len(lengths)))
    random.Random(0).shuffle(shuffled)
    sampler = LengthGroupedSampler(
        pairs, lengths=list(lengths), generator=torch.Generator().manual_seed(0)
    )
    return {"random": shuffled, "group_by_length": list(sampler)}


def main() -> None:
    from datasets import load_dataset

    from tralign_fast.data.tokenization import row_lengths, tokenize_pairs
    from tralign_fast.demo.smollm2 import load_smollm2

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=1024)
    args = parser.parse_args()
    rows = load_dataset("json", data_files=args.rows, split="train")
    tokenised = tokenize_pairs(
        rows, load_smollm2()[1], max_length=args.max_length, name="rows", on_bad_rows="drop"
    )
    lengths = row_lengths(tokenised)
    assert lengths is not None
    print(f"{len(lengths)} pairs, {args.processes} processes x {args.pairs} pairs")
    for name, order in orders(lengths, args.processes, args.pairs).items():
        for levelled in (False, True):
            found = imbalance(lengths, order, args.processes, args.pairs, levelled)
            high = quantiles(found, n=20)[-1]
            print(
                f"{name:16} {'levelled' if levelled else 'as they come':13} max/mean tokens: mean "
                f"{mean(found):.3f}, 95% {high:.3f}"
            )


if __name__ == "__main__":
    main()
