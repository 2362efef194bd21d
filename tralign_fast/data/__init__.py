"""Rows to tokenised rows to batches."""

from tralign_fast.data.loading import load_rows
from tralign_fast.data.tokenization import tokenize_pairs, tokenize_unpaired
from tralign_fast.extras import require

__all__ = ["load_rows", "tokenize_pairs", "tokenize_unpaired"]

require(__name__, "train")  # their imports come with the first row
