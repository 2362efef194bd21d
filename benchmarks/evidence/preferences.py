"""People's pairs of HH-RLHF as conversations, and their parts: for the gold, the policy, the test.

Read from a file or from the hub by the library's own loader. Pairs of one conversation (the same
first question) always fall into one part: nothing of a test is trained on.
"""

from __future__ import annotations

import hashlib
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tralign_fast.data.loading import load_rows

HUB_ID = "Anthropic/hh-rlhf"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}

Conversation = list[dict[str, str]]
Row = dict[str, Any]  # prompt: Conversation; chosen, rejected: one answer each


@dataclass(frozen=True)
class Parts:
    """Disjoint parts of the pairs, no conversation in two of them."""

    gold: list[Row]  # the gold reward models are trained on these
    gold_test: list[Row]  # … and their accuracy is stated on these
    policy: list[Row]  # the SFT, and every arm's prompts
    test: list[Row]  # prompts of fresh samples, and held-out pairs


def read_pairs(source: str | Path) -> list[Row]:
    """Conversational rows of transcripts such as "\\n\\nHuman: … \\n\\nAssistant: …".

    A row that is no comparison of two answers to one conversation is left out, and counted in one
    warning.

    Raises:
        ValueError: nothing at `source`, a damaged file, no columns chosen and rejected, or no
            pair in it.
    """
    rows = load_rows(source)
    missing = {"chosen", "rejected"} - set(rows.column_names)
    if missing:
        raise ValueError(
            f"{source}: expected transcripts in the columns chosen and rejected, as "
            f"{HUB_ID} has them; found {', '.join(rows.column_names)}"
        )
    pairs, faults = [], Counter()
    row: Any
    for row in rows:
        pair = _pair(row["chosen"], row["rejected"])
        if isinstance(pair, str):
            faults[pair] += 1
        else:
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"{source}: no transcript with a Human's and an Assistant's turn")
    if faults:
        why = ", ".join(f"{count} with {fault}" for fault, count in faults.items())
        warnings.warn(f"{source}: {faults.total()} rows are left out: {why}", stacklevel=2)
    return pairs


def _pair(chosen: str, rejected: str) -> Row | str:
    """The pair, or what is wrong with it."""
    (*prompt, answer), (*other_prompt, other) = turns(chosen), turns(rejected)
    if not prompt or answer["role"] != "assistant" or prompt[-1]["role"] != "user":
        return "no question and answer at the end"
    if prompt != other_prompt:
        return "different conversations before the answers"
    if not answer["content"] or not other["content"]:
        return "an empty answer"
    if answer == other:
        return "two equal answers"
    return {"prompt": prompt, "chosen": [answer], "rejected": [other]}


def turns(transcript: str) -> Conversation:
    """The messages of a transcript; one empty message where there is none."""
    _, *parts = _TURN.split(transcript)
    return [
        {"role": _ROLES[who], "content": text.strip()}
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ] or [{"role": "assistant", "content": ""}]


def digest(rows: Iterable[Row]) -> str:
    """Of the rows' text: what caches are named by, wherever the file lies."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr((row["prompt"], row["chosen"], row["rejected"])).encode())
    return found.hexdigest()[:16]


def split(
    rows: Sequence[Row],
    policy: int,
    test: int,
    gold_test: int,
    is_short: Sequence[bool],
    seed: int = 0,
) -> Parts:
    """Parts of about these numbers of rows (a conversation stays whole); the gold has the rest.

    Args:
        is_short: rows whose prompt and answers the policy can hold. Policy and test are of these.

    Raises:
        ValueError: too few rows.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row["prompt"][0]["content"], []).append(index)
    order = sorted(groups)  # not as the file has them
    random.Random(seed).shuffle(order)
    parts: dict[str, list[Row]] = {"policy": [], "test": [], "gold_test": [], "gold": []}
    wanted = {"policy": policy, "test": test, "gold_test": gold_test}
    for first in order:
        members = groups[first]
        short = all(is_short[index] for index in members)
        for name, number in wanted.items():
            if len(parts[name]) < number and (short or name == "gold_test"):
                break
        else:
            name = "gold"
        parts[name] += [rows[index] for index in members]
    lacking = [f"{len(parts[n])} of {number} for {n}" for n, number in wanted.items()
               if len(parts[n]) < number]  # fmt: skip
    if lacking or len(parts["gold"]) < gold_test:
        what = ", ".join(lacking) or f"{len(parts['gold'])} for gold"
        raise ValueError(f"{len(rows)} pairs are too few to be parted: {what}")
    return Parts(**parts)
