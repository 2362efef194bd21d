"""Rows that cannot be tokenised, each named with its reason."""

from __future__ import annotations

import copy
from functools import partial

import pytest
from datasets import Dataset

from tests.data.test_tokenization import CHAT, PAIR_COLUMNS, TEXT, assistant, dataset_of, user
from tralign_fast.data import tokenize_pairs, tokenize_unpaired

PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
TURN = CHAT[0]
BAD_PAIRS = {
    "None": ({**PAIR, "chosen": None}, "chosen is None; expected text or a list of messages"),
    "number": ({**PAIR, "prompt": 5}, "prompt is int 5; expected text or a list of messages"),
    "empty": ({**PAIR, "rejected": ""}, "rejected is empty; expected text"),
    "eos": ({**PAIR, "rejected": "<|im_end|>"}, "rejected is empty; expected at least one token"),
    "same": ({**PAIR, "rejected": " blue."}, "chosen and rejected are identical; expected two"),
    "cut": (
        {**PAIR, "chosen": " blue" * 30 + "!", "rejected": " blue" * 30 + "?"},
        "identical once cut to max_length = 24",
    ),
    "same tokens": (
        {**PAIR, "chosen": " blue.", "rejected": " blue.<|im_end|>"},
        "chosen and rejected have the same tokens",
    ),
    "long": (
        {**PAIR, "prompt": "sky" + " sky" * 23},
        "the prompt has 24 tokens and leaves none for a completion; expected fewer than",
    ),
    "mixed": (
        {**PAIR, "chosen": [assistant("Blue")]},
        "prompt is text, chosen is messages, rejected is",
    ),
    "no messages": (
        {**TURN, "chosen": []},
        "chosen is an empty list; expected at least one message",
    ),
    "no prompt": ({**TURN, "prompt": []}, "prompt is an empty list; expected at least one message"),
    "no role": (
        {**TURN, "chosen": [{"content": "x"}]},
        r"chosen\[0\] is dict .*a message with role",
    ),
    "no dict": ({**TURN, "chosen": ["x"]}, r"chosen\[0\] is str 'x'; expected a message with role"),
    "None content": (
        {**TURN, "chosen": [{"role": "assistant", "content": None}]},
        r"chosen\[0\] has the content None; expected text",
    ),
    "silent": ({**TURN, "chosen": [assistant("")]}, "chosen is empty: no message has any content"),
    "template": (
        {
            **TURN,
            "chat_template_kwargs": {"chat_template": "{{ raise_exception('no system role') }}"},
        },
        "the chat template refuses the conversation: TemplateError: no system role",
    ),
    "options": (
        {**TURN, "chat_template_kwargs": "calm"},
        "chat_template_kwargs is str 'calm'; expected a dict",
    ),
    "tools": ({**TURN, "tools": "{nonsense"}, "tools is str '{nonsense'; expected JSON"),
}
BAD_PAIRS_WITHOUT_PROMPT = {
    "strangers": (
        {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
        "chosen and rejected begin with different messages; expected both to hold the prompt",
    ),
    "same": ({"chosen": "a b c", "rejected": "a b c"}, "chosen and rejected are identical"),
    "empty": ({"chosen": "", "rejected": "x"}, "chosen is empty; expected text"),
}
COMPLETION = {"prompt": "The sky is", "completion": " blue.", "label": True}
BAD_COMPLETIONS = {
    "label None": ({**COMPLETION, "label": None}, "label is None; expected True, False, 1 or 0"),
    "label 2": ({**COMPLETION, "label": 2}, "label is int 2; expected True, False, 1 or 0"),
    "label text": ({**COMPLETION, "label": "good"}, "label is str 'good'; expected True, False"),
    "label float": ({**COMPLETION, "label": 1.0}, "label is float 1.0; expected True, False"),
    "None": ({**COMPLETION, "completion": None}, "completion is None; expected text or a list"),
    "empty": ({**COMPLETION, "completion": ""}, "completion is empty; expected text"),
    "mixed": ({**COMPLETION, "prompt": [user("?")]}, "prompt is messages, completion is text"),
    "long": (
        {**COMPLETION, "prompt": "sky" + " sky" * 23},
        "the prompt has 24 tokens and leaves none",
    ),
}


def check_bad_row(tokenize, good, bad, reason, tokenizer):
    """In a stream, whose rows need not be alike; and, where a table can hold it, in a `Dataset`."""
    tokenize = partial(tokenize, max_length=24, on_bad_rows="error")
    stream = tokenize(dataset_of([good, bad], streaming=True), tokenizer)
    with pytest.raises(ValueError, match=f"^train row 1: .*{reason}"):
        list(stream)
    table = Dataset.from_list([bad] * 2)
    with pytest.raises(ValueError, match=f"^dev: 2 of 2 rows are bad.*dev row 0: .*{reason}"):
        tokenize(table, tokenizer, name="dev")


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs_are_named(case, tokenizer):
    check_bad_row(tokenize_pairs, PAIR, *BAD_PAIRS[case], tokenizer)


@pytest.mark.parametrize("case", BAD_PAIRS_WITHOUT_PROMPT)
def test_bad_pairs_without_prompt_are_named(case, tokenizer):
    good = {"chosen": "a b", "rejected": "a c"}
    check_bad_row(tokenize_pairs, good, *BAD_PAIRS_WITHOUT_PROMPT[case], tokenizer)


@pytest.mark.parametrize("case", BAD_COMPLETIONS)
def test_bad_completions_are_named(case, tokenizer):
    check_bad_row(tokenize_unpaired, COMPLETION, *BAD_COMPLETIONS[case], tokenizer)


@pytest.mark.parametrize("case", ["None", "same", "empty", "long"])
def test_bad_pairs_are_named_when_unpaired(case, tokenizer):
    bad, reason = BAD_PAIRS[case]
    with pytest.raises(ValueError, match=f"^train: 1 of 2 rows are bad|^train row 1: .*{reason}"):
        tokenize_unpaired(
            Dataset.from_list([PAIR, bad]), tokenizer, max_length=24, on_bad_rows="error"
        )


@pytest.mark.parametrize("num_proc", [None, 2])
def test_at_most_five_bad_rows_are_described(num_proc, tokenizer):
    rows = [PAIR if i % 3 else {**PAIR, "chosen": None} for i in range(30)]
    with pytest.raises(ValueError, match="of 30 rows are bad") as caught:
        tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=None, num_proc=num_proc)
    first, *others = str(caught.value).split(" | ")
    assert first.startswith("train: 10 of 30 rows are bad")
    assert "the first 5 problems: train row 0: chosen is None" in first
    assert [other.split(":")[0] for other in others] == [f"train row {i}" for i in (3, 6, 9, 12)]
    assert "\n" not in str(caught.value)


def test_bad_rows_can_be_dropped_with_one_warning(tokenizer):
    rows = [PAIR if i % 3 else {**PAIR, "chosen": None} for i in range(30)]
    with pytest.warns(UserWarning, match="train: dropped 10 of 30 rows") as caught:
        made = tokenize_pairs(
            Dataset.from_list(rows), tokenizer, max_length=None, on_bad_rows="drop"
        )
    assert len(caught) == 1
    assert "train row 12: chosen is None" in str(caught[0].message)
    assert "train row 15" not in str(caught[0].message)
    assert made["row"][:] == [i for i in range(30) if i % 3]
    assert made.column_names == PAIR_COLUMNS


def test_half_a_pair_can_be_dropped(tokenizer):
    rows = [PAIR, {**PAIR, "rejected": "<|im_end|>"}]
    with pytest.warns(UserWarning, match="dropped 1 of 2 rows"):
        made = tokenize_unpaired(
            Dataset.from_list(rows), tokenizer, max_length=None, on_bad_rows="drop"
        )
    assert list(zip(made["row"], made["label"], strict=True)) == [(0, True), (1, True), (0, False)]


def test_a_stream_drops_bad_rows_and_says_so_ever_more_rarely(tokenizer):
    rows = [PAIR if i % 3 else {**PAIR, "chosen": None} for i in range(60)]
    made = tokenize_pairs(
        dataset_of(rows, streaming=True), tokenizer, max_length=None, on_bad_rows="drop"
    )
    with pytest.warns(UserWarning, match="dropped") as caught:
        kept = [row["row"] for row in made]
    assert kept == [i for i in range(60) if i % 3]
    counts = [str(w.message).split("(")[1].split(" ")[0] for w in caught]
    assert counts == ["1", "2", "3", "4", "5", "8", "16"]


def test_no_row_left_is_an_error(tokenizer):
    rows = Dataset.from_list([{**PAIR, "chosen": ""}])
    with (
        pytest.warns(UserWarning, match="dropped 1 of 1"),
        pytest.raises(ValueError, match="train: no row is left"),
    ):
        tokenize_pairs(rows, tokenizer, max_length=None, on_bad_rows="drop")


@pytest.mark.parametrize("label", [True, False, 0, 1])
def test_one_label_alone_is_an_error(label, tokenizer):
    rows = Dataset.from_list([{**COMPLETION, "label": label}] * 3)
    with pytest.raises(ValueError, match=f"train: every label is {bool(label)}; expected both"):
        tokenize_unpaired(rows, tokenizer, max_length=None)


def test_labels_of_0_and_1_are_bools(tokenizer):
    rows = Dataset.from_list([{**COMPLETION, "label": label} for label in (1, 0, 1)])
    made = tokenize_unpaired(rows, tokenizer, max_length=None)
    assert [row["label"] for row in made] == [True, False, True]


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_are_named(streaming, tokenizer):
    rows = dataset_of([{"question": "a", "chosen": "b"}], streaming)
    with pytest.raises(ValueError, match=r"train: .*chosen, rejected .*; rejected missing, found"):
        tokenize_pairs(rows, tokenizer, max_length=None)
    with pytest.raises(ValueError, match="prompt, completion, label missing, found question"):
        tokenize_unpaired(rows, tokenizer, max_length=None)


@pytest.mark.parametrize("on_bad_rows", ["raise", "drop"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_tokenizer_that_lacks_what_rows_need(streaming, on_bad_rows, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = bare.chat_template = None
    for rows, reason in ((TEXT, "expected an eos_token"), (CHAT, "expected a chat_template")):
        with pytest.raises(ValueError, match=f"^train row 0: .*{reason}"):
            list(
                tokenize_pairs(
                    dataset_of(rows, streaming), bare, max_length=None, on_bad_rows=on_bad_rows
                )
            )


@pytest.mark.parametrize("streaming", [False, True])
def test_no_rows_is_an_error(streaming, tokenizer):
    rows = dataset_of([], streaming)
    with pytest.raises(ValueError, match="train: the dataset has no rows"):
        tokenize_pairs(rows, tokenizer, max_length=None)


def test_wrong_arguments(tokenizer):
    rows = Dataset.from_list(TEXT)
    with pytest.raises(ValueError, match=r"on_bad_rows must be one of drop_overlong.* got 'skip'"):
        tokenize_pairs(rows, tokenizer, max_length=None, on_bad_rows="skip")
    with pytest.raises(ValueError, match="max_length must be at least 2 tokens or None, got 1"):
        tokenize_pairs(rows, tokenizer, max_length=1)
    with pytest.raises(ValueError, match=r"train: expected a datasets.Dataset .* got list"):
        tokenize_pairs(TEXT, tokenizer, max_length=None)
