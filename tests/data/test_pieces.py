"""Groups that are cut over processes: who holds which tokens, and what each of them predicts."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch

from tralign_fast.data.division import share_out
from tralign_fast.data.packing import PackedBatch, PreferenceCollator, can_be_merged


def rows_of(*sizes, paired=True):
    """Rows with (prompt, completion, completion) tokens, of which no two are alike."""
    ids = itertools.count(1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {"row": i} | {name: list(itertools.islice(ids, n)) for name, n in zip(names, size)}  # noqa: B905
        for i, size in enumerate(sizes)
    ]
    if paired:
        return rows
    return [
        {**row, "completion_ids": row["chosen_ids"], "lent_ids": row["rejected_ids"], "label": True}
        for row in rows
    ]


def divided(rows, count, **options) -> list[PackedBatch]:
    """What each process gets, where all of a batch fits one row."""
    batches = [
        PreferenceCollator(division=(place, count), cut_over="cp", **options)(rows)
        for place in range(count)
    ]
    assert all(isinstance(batch, PackedBatch) for batch in batches)
    return batches


MIXED = ((61, 23, 40), (3, 4, 5), (2, 9, 1), (1, 1, 3))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_token_is_held_by_one_process_and_work_is_even(count):
    batches = divided(rows_of((300, 90, 210)), count, paired=True)
    assert sorted(i for b in batches for i in b.input_ids[0].tolist()) == [*range(1, 601)]
    tokens = [b.num_tokens for b in batches]
    assert max(tokens) - min(tokens) <= 1
    work = [int((b.position_ids + 1).sum()) for b in batches]
    assert max(work) <= 1.02 * min(work)
    scored = [len(b.score_index) for b in batches]
    assert max(scored) - min(scored) <= 2
    for batch in batches:
        assert batch.layout.cut.tokens == batch.num_tokens
        assert len(batch.layout.cut.segments) <= 6  # two runs of each of three parts


def test_positions_are_those_of_the_whole_row():
    rows = rows_of(*MIXED)
    whole = PreferenceCollator(paired=True)(rows)
    position = dict(zip(whole.input_ids[0].tolist(), whole.position_ids[0].tolist(), strict=True))
    for batch in divided(rows, 3, paired=True):
        for token, place in zip(
            batch.input_ids[0].tolist(), batch.position_ids[0].tolist(), strict=True
        ):
            assert position[token] == place


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("sizes", [MIXED, ((0, 40, 9), (5, 3, 2)), ((50, 30, 1), (90, 60, 2))])
def test_what_is_gathered_predicts_every_target_of_the_batch(sizes, count, layout, paired):
    rows = rows_of(*sizes, paired=paired)
    options = {"layout": layout, "paired": paired}
    batches = divided(rows, count, **options)
    assert all(batch.pieces is not None for batch in batches)
    (alone,) = PreferenceCollator(**options)(rows).parts
    before = dict(
        zip(alone.targets.tolist(), alone.input_ids[0][alone.score_index].tolist(), strict=True)
    )
    width = batches[0].pieces.width
    gathered = torch.full((count * width,), -1)
    for p, batch in enumerate(batches):
        own = batch.pieces
        for token, target in zip(
            batch.input_ids[0][batch.score_index].tolist(), own.targets.tolist(), strict=True
        ):
            assert before[target] == token  # also where the two were cut apart
        gathered[p * width : p * width + len(own.sent)] = own.targets[own.sent]
        first_completions = set(alone.targets[: alone.grad_tokens].tolist())
        assert set(own.targets[: own.grad_tokens].tolist()) <= first_completions
        assert not set(own.targets[own.grad_tokens :].tolist()) & first_completions
    for batch in batches:
        joined = torch.cat([batch.pieces.targets, gathered])[batch.pieces.index]
        assert torch.equal(joined, batch.targets)
    owned = sorted(row for b in batches if b.weight > 0 for row in b.rows)
    assert owned == [*range(len(sizes))]
    assert sum(b.weight for b in batches) == pytest.approx(count)
    keys = {row: key for b in batches for row, key in zip(b.rows, b.keys)}  # noqa: B905
    assert [keys[row] for row in alone.rows] == list(alone.keys[: len(rows)])


def test_who_owns_nothing_weighs_nothing():
    first, second = divided(rows_of((20, 9, 9)), 2, paired=True)
    assert (first.weight, second.weight) == (2.0, 0.0)
    assert first.rows == second.rows == (0,)
    assert first.share == second.share == 1.0


def test_a_row_is_filled_up_behind_its_pieces():
    for batch in divided(rows_of(*MIXED), 2, paired=True, pad_to_multiple_of=16, pad_token_id=0):
        assert batch.num_tokens % 16 == 0
        layout = batch.layout
        assert layout.padding == (batch.input_ids == 0).sum()
        assert layout.cut.tokens + layout.groups[-1].start + layout.padding == batch.num_tokens
        rows = layout.scored_rows(torch.device("cpu"))
        assert set(batch.score_index.tolist()) <= set(rows.tolist())


def test_a_batch_with_pieces_travels_to_another_process():
    batch = divided(rows_of(*MIXED), 2, paired=True)[0]
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.pieces.index, batch.pieces.index)
    assert np.array_equal(again.layout.cut.key_index, batch.layout.cut.key_index)
    assert not can_be_merged(batch)  # others would have to merge alike
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.pieces.index, moved.targets, moved.pieces.sent)} == {
        "meta"
    }


@pytest.mark.parametrize("count", [2, 3])
def test_rows_of_pieces_come_last_and_as_many_on_every_process(count):
    rows = rows_of(*MIXED, (180, 45, 45), (4, 4, 4), (5, 5, 5), (6, 6, 6))
    batches = [
        PreferenceCollator(
            paired=True, token_budget=60, division=(place, count), cut_over="cp"
        )(rows)
        for place in range(count)
    ]  # fmt: skip
    kinds = [[part.pieces is not None for part in batch.parts] for batch in batches]
    assert all(kind == kinds[0] for kind in kinds)
    assert kinds[0] == sorted(kinds[0])
    assert any(kinds[0])
    assert not all(kinds[0])
    owned = sorted(r for b in batches for p in b.parts if p.share * p.weight > 0 for r in p.rows)
    assert owned == [*range(len(rows))]
    for batch in batches:
        assert sum(part.share for part in batch.parts) == pytest.approx(1.0)
        for part in batch.parts:
            assert part.num_tokens <= 60 or len(part.rows) == 1
    fillers = [p for b in batches for p in b.parts if p.pieces is None and p.share == 0]
    assert len(fillers) == (count == 2)  # 124 tokens in one row, beside 71 in two
    chosen = sum(p.nll_tokens or 0 for batch in batches for p in batch.parts)
    assert chosen == pytest.approx(sum(len(row["chosen_ids"]) for row in rows))


@pytest.mark.parametrize(
    ("sizes", "count", "cut"),
    [
        ([50, 48], 2, []),  # about even as they are
        ([10, 10, 10], 2, []),  # none is longer than a share
        ([100, 10], 2, [0]),
        ([10, 90, 60], 2, []),  # 90 is an eighth more than a share
        ([10, 120, 30], 2, [1]),
        ([100, 60], 2, [0, 1]),  # with one of them cut, the other still weighs one process down
        ([9, 40, 41, 8], 4, [1, 2]),  # 9 and 8 would not be worth it
        ([5], 3, []),  # fewer than two tokens a process
    ],
)
def test_no_more_groups_are_cut_than_must_be(sizes, count, cut):
    shares = share_out(sizes, range(len(sizes)), count)
    assert shares.cut == cut
    whole = [i for own in shares.whole for i in own]
    assert sorted([*whole, *cut]) == [*range(len(sizes))]
    assert sorted(i for own in shares.owned for i in own) == cut
