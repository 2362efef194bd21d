"""The bundled preference pairs: sentiment-ranked samples of SmolLM2-135M-Instruct.

See the folder's README.md for how the rows were made.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["PROMPTS_PATH", "TEST_PATH", "TRAIN_PATH", "read_rows", "test_rows", "train_rows"]

TRAIN_PATH = Path(__file__).with_name("train.jsonl")
TEST_PATH = Path(__file__).with_name("test.jsonl")
PROMPTS_PATH = Path(__file__).with_name("prompts.txt")


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a JSON-lines file, in the file's order.

    Raises:
        FileNotFoundError: there is no file at ``path``.
    """
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train_rows() -> list[dict]:
    """The training pairs, one dict each.

    ``prompt``, ``chosen`` and ``rejected`` are lists of one ``{"role", "content"}`` message, as
    TRL's conversational preference format has them; ``score_chosen`` and ``score_rejected`` are the
    completions' VADER compound scores (floats in [-1, 1], chosen the higher by 0.3 or more).
    """
    return read_rows(TRAIN_PATH)


def test_rows() -> list[dict]:
    """The held-out pairs, in `train_rows`' format; none of their prompts is in `train_rows`."""
    return read_rows(TEST_PATH)


test_rows.__test__ = False  # the name is not a test of pytest's, wherever it is imported
