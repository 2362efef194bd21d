import pickle
import warnings

import pytest
import torch

from tralign_fast.data import division
from tralign_fast.data.division import share_out
from tralign_fast.data.layout import Group
from tralign_fast.data.packing import PackedBatch, PreferenceCollator, merge_packed
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps

PAIRS = [
    {"row": 7, "prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
    {"row": 9, "prompt_ids": [10], "chosen_ids": [11], "rejected_ids": [12, 13]},
]
ROWS = [
    {"row": 0, "prompt_ids": [1, 2, 3], "completion_ids": [4, 5], "label": True},
    {"row": 1, "prompt_ids": [6], "completion_ids": [7, 8, 9], "label": False},
    {
        "row": 2,
        "prompt_ids": [10, 11],
        "completion_ids": [12],
        "label": True,
        "borrowed_ids": [7, 8],
    },
]


def collate(rows, **options) -> PackedBatch:
    (batch,) = PreferenceCollator(**options)(rows).parts
    return batch


def test_a_pair_is_one_row_with_its_prompt_once():
    batch = collate(PAIRS, paired=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1, 2]]
    assert batch.layout is not None
    assert batch.layout.groups == (Group(0, 3, (2, 3)), Group(8, 1, (1, 2)))
    # chosen of both pairs, then rejected of both; the prompt's last token predicts both firsts
    assert batch.score_index.tolist() == [2, 3, 8, 2, 5, 6, 8, 10]
    assert batch.targets.tolist() == [4, 5, 11, 6, 7, 8, 12, 13]
    assert batch.scored_lengths == (2, 1, 3, 2)
    assert batch.completion_lengths.tolist() == [2, 1, 3, 2]
    assert batch.rows == (7, 9)
    assert len(batch) == 2
    assert batch.grad_tokens == 8


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_every_layout_scores_the_same_tokens(layout):
    batch = collate(PAIRS, paired=True, layout=layout, pad_token_id=99)
    flat = batch.input_ids.flatten()
    previous = flat[batch.score_index].tolist()
    assert batch.targets.tolist() == [4, 5, 11, 6, 7, 8, 12, 13]
    assert previous == [3, 4, 10, 3, 6, 7, 10, 12]
    assert batch.position_ids.flatten()[batch.score_index].tolist() == [2, 3, 0, 2, 3, 4, 0, 1]
    assert (batch.layout is None) == (layout == "padded")
    tokens = {"shared": 12, "packed": 16, "padded": 24}[layout]
    assert batch.num_tokens == tokens
    if layout == "padded":
        assert batch.input_ids.tolist()[1] == [10, 11, 99, 99, 99, 99]
        assert batch.attention_mask is not None
        assert batch.attention_mask.sum() == 16


def test_kto_borrows_the_completion_of_the_row_before():
    batch = collate(ROWS, paired=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 12, 6, 7, 8, 9, 4, 5, 10, 11, 12, 7, 8, 9]]
    assert batch.targets.tolist() == [4, 5, 7, 8, 9, 12, 12, 4, 5, 7, 8, 9]
    assert batch.grad_tokens == 6  # the matched completions
    assert batch.is_desirable is not None
    assert batch.is_desirable.tolist() == [True, False, True]


def test_a_borrowed_completion_is_cut_to_what_its_prompt_leaves():
    batch = collate(ROWS, paired=False, max_length=4)
    # row 0 has a prompt of 3 tokens: one token of [4, 5] fits; row 1 borrows both of them; row 2
    # has a prompt of 2 tokens and borrows [7, 8, 9]: two of them fit
    assert batch.scored_lengths == (1, 3, 1, 1, 2, 2)


def test_sums_per_sequence():
    batch = collate(PAIRS, paired=True)
    logps = torch.arange(8, dtype=torch.float32, requires_grad=True)
    sums = batch.sum_per_sequence(logps)
    assert sums.tolist() == [0 + 1, 2, 3 + 4 + 5, 6 + 7]
    sums[2].backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [0, 0, 0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_an_empty_prompt_leaves_the_first_token_unscored(layout):
    rows = [{"prompt_ids": [], "chosen_ids": [4, 5], "rejected_ids": [6]}]
    batch = collate(rows, paired=True, layout=layout)
    assert batch.targets.tolist() == [5]
    assert batch.scored_lengths == (1, 0)
    assert batch.sum_per_sequence(torch.tensor([-2.0])).tolist() == [-2.0, 0.0]


def test_nothing_scored_at_all_is_still_a_differentiable_sum():
    rows = [{"prompt_ids": [], "chosen_ids": [4], "rejected_ids": [6]}]
    batch = collate(rows, paired=True)
    logps = torch.zeros(0, requires_grad=True)
    sums = batch.sum_per_sequence(logps)
    assert sums.tolist() == [0.0, 0.0]
    sums.sum().backward()


def test_varlen_arguments():
    layout = collate(PAIRS, paired=True).layout
    assert layout is not None
    arguments = layout.varlen(torch.device("cpu"))
    assert arguments.cu_seqlens_q.tolist() == [0, 5, 8, 10, 12]
    assert arguments.cu_seqlens_k.tolist() == [0, 5, 11, 13, 16]
    assert arguments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 8, 10, 11]
    assert (arguments.max_seqlen_q, arguments.max_seqlen_k) == (5, 6)
    assert arguments.first.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 14, 15]
    ((tokens, keys),) = arguments.again
    assert tokens.tolist() == [0, 1, 2, 8]
    assert keys.tolist() == [5, 6, 7, 13]
    assert arguments.cu_seqlens_q.dtype == torch.int32


def test_mask_is_causal_at_the_bottom_right_and_slides():
    layout = collate(PAIRS, paired=True).layout
    assert layout is not None
    mask = layout.mask(2, 5, None, torch.device("cpu"))
    assert mask.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    mask = layout.mask(2, 5, 3, torch.device("cpu"))
    assert mask.int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_a_short_mask_is_made_into_what_is_added_to_scores_once_and_a_long_one_never(monkeypatch):
    cpu, inf = torch.device("cpu"), float("inf")
    layout = collate(PAIRS, paired=True).layout
    assert layout is not None
    with torch.inference_mode():
        bias = layout.bias(2, 5, None, cpu, torch.bfloat16)
    assert bias.tolist() == [[0, 0, 0, 0, -inf], [0, 0, 0, 0, 0]]
    assert bias.dtype == torch.bfloat16
    assert not bias.is_inference()
    assert layout.bias(2, 5, None, cpu, torch.bfloat16) is bias
    assert layout.bias(2, 5, None, cpu, torch.float32).dtype == torch.float32
    monkeypatch.setattr("tralign_fast.data.layout._LONGEST_BIAS", 9)
    assert layout.bias(2, 5, 3, cpu, torch.float32) is layout.mask(2, 5, 3, cpu)


def test_batches_travel_between_processes_and_dtypes_stay():
    batch = pickle.loads(pickle.dumps(collate(ROWS, paired=False)))
    moved = batch.to("cpu")
    assert moved.rows == batch.rows
    assert moved.input_ids.dtype == torch.int64
    assert "labels" not in batch


def test_a_token_outside_the_vocabulary_names_the_row():
    collate = PreferenceCollator(paired=True, vocab_size=13)
    with pytest.raises(ValueError, match=r"row 9: token id 13 is outside .* \[0, 13\)"):
        collate(PAIRS)
    below = [{**PAIRS[0], "rejected_ids": [4, -1]}]
    with pytest.raises(ValueError, match=r"token id -1 is outside .* \[0, 13\)"):
        collate(below)
    with pytest.raises(ValueError, match="layout must be one of"):
        PreferenceCollator(paired=True, layout="dense")


def test_a_batch_over_the_token_budget_is_split_in_order():
    whole = collate([*PAIRS, *PAIRS], paired=True)
    split = PreferenceCollator(paired=True, token_budget=13)([*PAIRS, *PAIRS])
    assert [part.num_tokens for part in split.parts] == [12, 12]
    assert [part.share for part in split.parts] == [0.5, 0.5]
    assert [r for part in split.parts for r in part.rows] == list(whole.rows)
    assert (len(split), split.num_tokens) == (len(whole), whole.num_tokens)
    alone = PreferenceCollator(paired=True, token_budget=2)(PAIRS)  # longer than the budget each
    assert [len(part) for part in alone.parts] == [1, 1]
    # the borrowed completions of KTO are those of the unsplit batch
    parts = PreferenceCollator(paired=False, token_budget=6)(ROWS).parts
    assert parts[0].targets.tolist() == [4, 5, 12]
    assert PreferenceCollator(paired=True, token_budget=24)(PAIRS).parts[0].share == 1.0


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_a_budget_is_full_when_it_is_met(layout):
    """A row may have as many tokens as the budget, prompts counted as often as they stand there."""
    rows = [*PAIRS, *PAIRS]
    whole = PreferenceCollator(paired=True, layout=layout)
    for count in (1, 2, 3):
        tokens = whole(rows[:count]).num_tokens
        met = PreferenceCollator(paired=True, layout=layout, token_budget=tokens)(rows)
        under = PreferenceCollator(paired=True, layout=layout, token_budget=tokens - 1)(rows)
        assert len(met.parts[0]) == count
        assert len(under.parts[0]) == max(count - 1, 1)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_merged_rows_score_what_each_scores(layout, tiny_llama):
    prepare_model(tiny_llama)
    options = {"paired": False, "layout": layout}
    batches = [collate(ROWS[:2], **options), collate(ROWS[2:], **options), collate(ROWS, **options)]
    merged = merge_packed(batches)
    assert merged.num_tokens == sum(batch.num_tokens for batch in batches)
    with torch.no_grad():
        expected = torch.cat([sequence_logps(tiny_llama, batch) for batch in batches])
        torch.testing.assert_close(
            sequence_logps(tiny_llama, merged), expected, rtol=1e-5, atol=1e-5
        )


EMPTY = {"row": 3, "prompt_ids": [], "chosen_ids": [4, 5, 6], "rejected_ids": [7, 9]}
SHORT = {"row": 4, "prompt_ids": [], "chosen_ids": [4], "rejected_ids": [7]}
APART = {"row": 5, "prompt_ids": [8], "chosen_ids": [4], "rejected_ids": [7]}


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_empty_prompts_score_the_same_wherever_they_stand(layout, tiny_llama):
    """At the head of a packed row too, where no token stands before them."""
    prepare_model(tiny_llama)
    rows = [EMPTY, *PAIRS, SHORT, APART]

    def scores(order):
        batch = collate([rows[i] for i in order], paired=True, layout=layout)
        with torch.no_grad():
            chosen, rejected = sequence_logps(tiny_llama, batch).chunk(2)
        return {i: (chosen[k], rejected[k]) for k, i in enumerate(order)}

    alone = {i: scores([i])[i] for i in range(len(rows))}
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1], [2, 1, 0, 3, 4], [4, 3, 2, 1, 0]):
        for i, got in scores(order).items():
            torch.testing.assert_close(got, alone[i], rtol=1e-5, atol=1e-5)
    assert alone[3] == (0, 0)  # a first token without a context is not scored


def test_gradients_of_an_empty_prompt_in_the_middle_are_those_of_padded_rows(tiny_llama):
    prepare_model(tiny_llama)
    grads = {}
    for layout in ("shared", "packed", "padded"):
        tiny_llama.zero_grad()
        batch = collate([PAIRS[0], EMPTY, SHORT], paired=True, layout=layout)
        sequence_logps(tiny_llama, batch).sum().backward()
        grads[layout] = [p.grad.clone() for p in tiny_llama.parameters()]
    for layout in ("shared", "packed"):
        torch.testing.assert_close(grads[layout], grads["padded"], rtol=1e-4, atol=1e-5)


def test_rows_of_an_empty_prompt_are_its_own():
    layout = collate([EMPTY, PAIRS[1], SHORT], paired=True).layout
    assert layout is not None
    assert layout.scored_rows(torch.device("cpu")).tolist() == list(range(11))
    nothing = collate([SHORT], paired=True, layout="packed")
    assert nothing.score_index.dtype == torch.int64
    varlen = collate([SHORT, EMPTY], paired=True).layout.varlen(torch.device("cpu"))
    assert all(i.dtype == torch.int64 for pair in varlen.again for i in pair)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_kto_row_alone_borrows_from_another_prompt(layout):
    batch = collate(ROWS[2:], paired=False, layout=layout)
    assert batch.targets.tolist() == [12, 7, 8]
    assert batch.grad_tokens == 1
    cut = collate(ROWS[2:], paired=False, layout=layout, max_length=3)
    assert cut.targets.tolist() == [12, 7]
    # in company it does not
    assert collate(ROWS, paired=False, layout=layout).targets.tolist()[-3:] == [7, 8, 9]


def test_a_kto_row_alone_without_another_is_refused():
    with pytest.raises(ValueError, match=r"row 1: alone in its batch, .* another prompt; expected"):
        collate(ROWS[1:2], paired=False)


def _rows_of_sizes(*sizes):
    return [
        {"prompt_ids": [1], "chosen_ids": [2] * (n - 2), "rejected_ids": [3], "row": i}
        for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("budget", [None, 12])
@pytest.mark.parametrize("count", [2, 3])
def test_processes_divide_a_batch_between_its_groups(count, budget):
    rows = _rows_of_sizes(9, 4, 5, 6, 8, 7, 3)
    whole = PreferenceCollator(paired=True)(rows)
    shares = [
        PreferenceCollator(paired=True, token_budget=budget, division=(place, count))(rows)
        for place in range(count)
    ]
    assert sorted(row for share in shares for p in share.parts for row in p.rows) == [*range(7)]
    tokens = [share.num_tokens for share in shares]
    assert sum(tokens) == whole.num_tokens
    assert max(tokens) - min(tokens) <= 3  # the smallest group
    for share in shares:
        assert sum(part.share for part in share.parts) == pytest.approx(1.0)
        assert {part.weight for part in share.parts} == {count * len(share) / 7}
    # weighted by shares, the parts divide by all chosen tokens
    tokens = sum(p.nll_tokens for share in shares for p in share.parts)
    assert tokens == pytest.approx(sum(whole.scored_lengths[:7]))


def test_who_has_no_group_runs_another_s_with_no_weight():
    rows = _rows_of_sizes(9, 4)
    batch = PreferenceCollator(paired=True, division=(2, 3))(rows)
    assert (batch.rows, batch.weight, batch.share) == ((1,), 0.0, 1.0)


def test_kto_lends_before_it_divides():
    rows = [
        {"prompt_ids": [i], "completion_ids": [10 + i] * 3, "label": True, "row": i}
        for i in range(4)
    ]
    for place in range(2):
        batch = PreferenceCollator(paired=False, division=(place, 2))(rows)
        lent = batch.targets[batch.grad_tokens :].view(2, 3)[:, 0].tolist()
        assert lent == [10 + (row - 1) % 4 for row in batch.rows]


def test_a_group_longer_than_a_share_is_named_once(monkeypatch):
    monkeypatch.setattr(division, "_long_groups", division.itertools.count())
    with pytest.warns(UserWarning, match="row 8 has 30 tokens, more than the 20 that fall"):
        assert share_out([5, 30, 5], [7, 8, 9], 2, "why").whole == [[1], [0, 2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        share_out([5, 30, 5], [7, 8, 9], 2, "why")
