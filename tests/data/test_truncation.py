"""`truncation_mode`, as TRL has it."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from tests.training.test_trl_parity import history, options, pair_rows, run_both
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.data import tokenize_pairs, tokenize_unpaired
from tralign_fast.data.packing import PreferenceCollator

LAYOUTS = ("shared", "packed", "padded")


def sequences(batch):
    """Every sequence of a batch, and of each the tokens that are scored."""
    scored = batch.targets.split(list(batch.scored_lengths))
    if batch.layout is None:
        whole = [
            row[mask.bool()]
            for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        return [(a.tolist(), b.tolist()) for a, b in zip(whole, scored, strict=True)]
    found = []
    for start, prompt, completions in batch.layout.groups:
        head, begin = batch.input_ids[0, start : start + prompt], start + prompt
        for length in completions:
            found.append(torch.cat([head, batch.input_ids[0, begin : begin + length]]).tolist())
            begin += length
    pairs = len(batch)
    order = [2 * b + k for k in range(2) for b in range(pairs)]
    return [(found[i], s.tolist()) for i, s in zip(order, scored, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [3, 9, 14, 40, None])
def test_batches_hold_trls_tokens(layout, mode, max_length, small_tokenizer):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = list(tokenize_pairs(pair_rows(12), small_tokenizer, max_length=None))
    if mode == "keep_start" and max_length is not None:
        rows = [row for row in rows if len(row["prompt_ids"]) < max_length]
    if not rows:
        return
    theirs = DataCollatorForPreference(0, max_length, mode)(rows)
    if mode == "keep_start":  # which tokenising cuts
        rows = [
            {**row, **{c: row[c][: max_length and max_length - len(row["prompt_ids"])]
                       for c in ("chosen_ids", "rejected_ids")}}
            for row in rows
        ]  # fmt: skip
    collate = PreferenceCollator(
        paired=True, layout=layout, max_length=max_length, truncation_mode=mode
    )
    expected = [
        (ids[mask.bool()].tolist(), ids[1:][done[1:].bool()].tolist())
        for ids, mask, done in zip(
            theirs["input_ids"], theirs["attention_mask"], theirs["completion_mask"], strict=True
        )
    ]
    assert sequences(collate(rows)) == expected


def test_prompts_that_are_cut_alike_are_shared(small_tokenizer):
    rows = list(tokenize_pairs(pair_rows(12), small_tokenizer, max_length=None))
    lengths = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in rows
    ]
    limit = sorted(lengths)[6]
    collate = PreferenceCollator(paired=True, max_length=limit, truncation_mode="keep_end")
    groups = collate(rows).layout.groups
    assert sum(len(group.completions) == 2 for group in groups) == sum(n <= limit for n in lengths)
    assert len(groups) > len(rows)


@pytest.mark.parametrize("method", ["dpo", "ipo"])
@pytest.mark.parametrize("layout", [{}, {"packing": False}, {"token_budget": 40}])
def test_keep_end_has_trls_losses(method, layout, tiny_llama, small_tokenizer, tmp_path):
    extra = {"truncation_mode": "keep_end", "max_length": 14}
    theirs, mine = run_both(
        method, tiny_llama, small_tokenizer, tmp_path, pair_rows(), ours=layout, **extra,
    )  # fmt: skip
    assert history(mine) == pytest.approx(history(theirs), rel=1e-4)


def test_keep_end_drops_no_prompt_for_its_length(tiny_llama, small_tokenizer, tmp_path):
    rows = Dataset.from_list([
        {"prompt": "the cat", "chosen": " runs", "rejected": " sleeps"},
        {"prompt": "the cat runs under the river " * 8, "chosen": " runs", "rejected": " sleeps"},
        {"prompt": "the cat", "chosen": " runs" + " x" * 40, "rejected": " sleeps" + " x" * 40},
    ])  # fmt: skip
    kept = tokenize_pairs(
        rows.select([0, 1]), small_tokenizer, max_length=12, truncation_mode="keep_end"
    )
    assert len(kept) == 2
    assert len(kept[1]["prompt_ids"]) > 12
    with pytest.warns(UserWarning, match="identical once cut to max_length = 12"):
        kept = tokenize_pairs(rows, small_tokenizer, max_length=12, truncation_mode="keep_end")
    assert kept["row"] == [0, 1]
    with pytest.warns(UserWarning, match="the prompt has"):
        kept = tokenize_pairs(rows, small_tokenizer, max_length=12)
    assert kept["row"] == [0, 2]
    again = Dataset.from_list(
        list(tokenize_pairs(rows.select([1]), small_tokenizer, max_length=None))
    )
    kept = tokenize_pairs(again, small_tokenizer, max_length=12, truncation_mode="keep_end")
    assert kept[0]["prompt_ids"] == again[0]["prompt_ids"]


def test_kto_refuses_keep_end_also_when_the_rows_say_kto(tiny_llama, small_tokenizer, tmp_path):
    rows = Dataset.from_list([{"prompt": "the", "completion": " cat", "label": True}])
    with pytest.warns(FutureWarning, match="keep_end' is deprecated in TRL"):
        args = TRConfig(**options(tmp_path, truncation_mode="keep_end"))
    with pytest.raises(ValueError, match="truncation_mode: kto cuts completions at their end"):
        TRTrainer(tiny_llama, args=args, train_dataset=rows, processing_class=small_tokenizer)


def test_one_label_may_be_left_by_what_is_too_long(small_tokenizer):
    rows = Dataset.from_list([
        {"prompt": "the", "completion": " cat", "label": True},
        {"prompt": "the cat runs under the river " * 8, "completion": " x", "label": False},
    ])  # fmt: skip
    with pytest.warns(UserWarning, match="every label is True among the rows that are left"):
        assert tokenize_unpaired(rows, small_tokenizer, max_length=12)["row"] == [0]
    with pytest.raises(ValueError, match="every label is True; expected both"):
        tokenize_unpaired(rows.select([0]), small_tokenizer, max_length=12)
