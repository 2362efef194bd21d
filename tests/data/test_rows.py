"""Columns by other names, images, rows that come tokenised, and what is dropped by default."""

from __future__ import annotations

import copy
import warnings

import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from tralign_fast.data import tokenize_pairs, tokenize_unpaired

TWO = {"chosen": " blue", "rejected": " green"}
KTO = {"completion": " blue", "label": True}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def of(rows, streaming=False):
    if streaming:
        return IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows)))
    return Dataset.from_list(rows)


def pairs(rows, tokenizer, streaming=False, **options):
    options = {"max_length": None, **options}
    return list(tokenize_pairs(of(rows, streaming), tokenizer, **options))


def unpaired(rows, tokenizer, streaming=False, **options):
    options = {"max_length": None, "one_label": True, **options}
    return list(tokenize_unpaired(of(rows, streaming), tokenizer, **options))


# --- which column is the prompt -------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["question", "instruction", "input", "query"])
def test_a_question_is_taken_for_the_prompt_and_said_once(column, streaming, small_tokenizer):
    rows = [{column: "the sky is", **TWO}] * 3
    with pytest.warns(UserWarning, match=f"no column prompt; the column {column} is") as caught:
        made = pairs(rows, small_tokenizer, streaming)
    assert len(caught) == 1
    assert made == pairs([{"prompt": "the sky is", **TWO}] * 3, small_tokenizer)
    with pytest.warns(UserWarning, match=f"{column} is taken for it"):
        made = unpaired([{column: "the sky is", **KTO}] * 2, small_tokenizer, streaming)
    assert made == unpaired([{"prompt": "the sky is", **KTO}] * 2, small_tokenizer)


@pytest.mark.parametrize(("columns", "named"), [
    ({"instruction": "Say it", "input": "sky"}, "instruction, input"),
    ({"instruction": "Say it", "input": ""}, "instruction, input"),
    ({"system": "Be terse", "question": "sky?"}, "question, system"),
    ({"history": [["a", "b"]], "instruction": "sky?"}, "instruction, history"),
    ({"system": "Be terse"}, "system"),
    ({"question": " blu"}, "question"),  # chosen holds it already
])  # fmt: skip
def test_columns_that_make_a_prompt_in_many_ways_are_refused(columns, named, small_tokenizer):
    for tokenize, rest in ((pairs, TWO), (unpaired, TWO), (unpaired, KTO)):
        with pytest.raises(ValueError, match=f"train: no column prompt .* but {named}, of") as e:
            tokenize([{**columns, **rest}], small_tokenizer)
        assert "\n" not in str(e.value)


def test_a_row_that_repeats_its_question_is_bad(small_tokenizer):
    rows = [{"question": "sky", **TWO}, {"question": "sky", "chosen": "sky a", "rejected": "sky b"}]
    with (
        pytest.warns(UserWarning, match="question is taken"),
        pytest.raises(ValueError, match="row 1: chosen and rejected begin with the question; exp"),
    ):
        pairs(rows, small_tokenizer)


def test_what_is_not_read_beside_a_prompt_is_said(small_tokenizer):
    rows = [{"prompt": "the sky is", "system": "Be terse", **TWO}]
    with pytest.warns(UserWarning, match="train: the column is not read: system"):
        pairs(rows, small_tokenizer)
    talk = {"chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")]}
    with pytest.warns(UserWarning, match="train: the column is not read: question"):
        assert pairs([{"question": "a", **talk}], small_tokenizer) == pairs([talk], small_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs([{"prompt": "the sky is", "system": "", "source": "x", **TWO}], small_tokenizer)


# --- text alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["image", "images", "videos", "audio", "pixel_values"])
def test_images_beside_text_are_refused(column, small_tokenizer):
    row = {"prompt": "the sky is", column: ["a.png"]}
    for tokenize, rest in ((pairs, TWO), (unpaired, TWO), (unpaired, KTO)):
        with pytest.raises(ValueError, match=f"^train row 0: has {column}[:;] "):
            tokenize([{**row, **rest}], small_tokenizer)
    for nothing in (None, []):
        assert pairs([{"prompt": "the sky is", column: nothing, **TWO}], small_tokenizer)


@pytest.mark.parametrize("feature", [Image(), List(Image())])
def test_a_column_of_images_is_refused_unread(feature, small_tokenizer):
    text = {name: Value("string") for name in ("prompt", "chosen", "rejected")}
    rows = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "photo": [None]}
    dataset = Dataset.from_dict(rows, Features({**text, "photo": feature}))
    with pytest.raises(ValueError, match=r"train: the column photo holds Image: .*vision-related"):
        tokenize_pairs(dataset, small_tokenizer, max_length=None)


PARTS = [
    ({"type": "image", "image": "a.png"}, "of the type 'image'"),
    ({"type": "image_url", "image_url": {"url": "x"}}, "of the type 'image_url'"),
    ({"type": "text", "text": "a", "image": "a.png"}, "with image"),
    ({"type": "text", "text": None}, "of the type 'text'"),
    ({"text": "a"}, "dict {'text': 'a'}"),
    ("a", "str 'a'"),
]
IN_PARTS = (
    "{% for m in messages %}<start>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("part", "what"), PARTS)
def test_parts_that_are_not_text_are_refused(part, what, small_tokenizer):
    good = {"type": "text", "text": "the sky"}
    row = {
        "prompt": [user([good, part])],
        "chosen": [assistant("blue")],
        "rejected": [assistant("red")],
    }
    with pytest.raises(ValueError, match=r"row 0: prompt\[0\] has a part ") as caught:
        pairs([row], small_tokenizer, streaming=True)
    assert f"has a part {what}" in str(caught.value)


def test_lists_of_text_parts_are_what_the_template_makes_of_them(small_tokenizer):
    def row(*texts):
        content = [{"type": "text", "text": text} for text in texts]
        return {
            "chosen": [user(content), assistant("a")],
            "rejected": [user(content), assistant("b")],
        }

    knows = copy.deepcopy(small_tokenizer)
    knows.chat_template = IN_PARTS
    plain = {
        "chosen": [user("the sky"), assistant("a")],
        "rejected": [user("the sky"), assistant("b")],
    }
    assert pairs([row("the ", "sky")], knows, True) == pairs([plain], small_tokenizer)
    # a template of text alone prints the list as Python does
    with pytest.raises(
        ValueError, match="row 0: a content is a list of parts, which the chat temp"
    ):
        pairs([row("the sky")], small_tokenizer, streaming=True)


@pytest.mark.parametrize("content", [5, {"text": "a"}, True])
def test_content_that_is_no_text_is_bad_whatever_stands_beside_it(content, small_tokenizer):
    row = {
        "prompt": [{**user(content), "name": "bob"}],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    }
    with pytest.raises(ValueError, match=r"row 0: prompt\[0\] has the content .*; expected text"):
        pairs([row], small_tokenizer)


# --- what is dropped ------------------------------------------------------------------------------

LONG = {"prompt": "red " * 60, **TWO}
CUT = {"prompt": "red", "chosen": " blue" * 60 + " a", "rejected": " blue" * 60 + " b"}
BAD = {"prompt": "red", "chosen": None, "rejected": " b"}
FINE = {"prompt": "red", **TWO}


@pytest.mark.parametrize("streaming", [False, True])
def test_overlong_rows_are_dropped_counted_and_named(streaming, small_tokenizer):
    rows = [FINE, LONG, FINE, CUT, LONG]
    with pytest.warns(UserWarning, match="dropped") as caught:
        made = pairs(rows, small_tokenizer, streaming, max_length=32)
    assert [row["row"] for row in made] == [0, 2]
    if not streaming:
        assert len(caught) == 1
        message = str(caught[0].message)
        assert message.startswith("train: dropped 3 of 5 rows: train row 1: the prompt has ")
        assert "train row 3: chosen and rejected are identical once cut" in message
        assert "\n" not in message
    for policy in ("error", "raise"):
        with pytest.raises(ValueError, match=r"3 of 5 rows are bad|row 1: the prompt has"):
            pairs(rows, small_tokenizer, streaming, max_length=32, on_bad_rows=policy)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_bad_rows_end_the_run_beside_overlong_ones(streaming, small_tokenizer):
    rows = [LONG, FINE, BAD]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"^train row 2: chosen is None"):
            pairs(rows, small_tokenizer, streaming, max_length=32)
        made = pairs(rows, small_tokenizer, streaming, max_length=32, on_bad_rows="drop")
    assert [row["row"] for row in made] == [1]


def test_overlong_rows_of_kto_are_dropped(small_tokenizer):
    rows = [{"prompt": prompt, **KTO} for prompt in ("red", "red " * 60, "blue")]
    with pytest.warns(UserWarning, match="train: dropped 1 of 3 rows: train row 1: the prompt has"):
        made = unpaired(rows, small_tokenizer, max_length=32)
    assert [row["row"] for row in made] == [0, 2]
    with pytest.warns(UserWarning, match="dropped 1 of 2 rows"):
        made = unpaired([FINE, LONG], small_tokenizer, max_length=32)
    assert [(row["row"], row["label"]) for row in made] == [(0, True), (0, False)]


# --- rows that come tokenised ---------------------------------------------------------------------

IDS = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}
KTO_IDS = {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5], "label": True}


@pytest.mark.parametrize(("changes", "reason"), [
    ({"chosen_ids": []}, "chosen_ids is empty; expected at least one token"),
    ({"rejected_ids": [4, 5]}, "chosen_ids and rejected_ids are identical; expected two"),
    ({"rejected_ids": None}, "rejected_ids is None; expected a list of token ids"),
    ({"prompt_ids": "the"}, "prompt_ids is str 'the'; expected a list of token ids"),
    ({"prompt_ids": [1.5]}, r"prompt_ids is list \[1.5\]; expected a list of token ids"),
    ({"chosen_ids": [-1]}, r"chosen_ids is list \[-1\]; expected"),
    ({"chosen_ids": [True]}, r"chosen_ids is list \[True\]; expected"),
    ({"chosen_ids": [2**40]}, r"chosen_ids is list \[1099511627776\]; expected"),
])  # fmt: skip
def test_tokenised_pairs_get_the_checks_of_text(changes, reason, small_tokenizer):
    assert pairs([IDS], small_tokenizer)[0] == {"row": 0, **IDS}
    for streaming in (False, True):
        with pytest.raises(ValueError, match=f"^train row 0: {reason}"):
            pairs([{**IDS, **changes}], small_tokenizer, streaming)
    with pytest.raises(ValueError, match=f"^train row 1: {reason}"):
        pairs([IDS, {**IDS, **changes}], small_tokenizer, streaming=True)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"label": "good"}, "label is str 'good'; expected True, False, 1 or 0"),
    ({"label": None}, "label is None; expected True"),
    ({"label": 2}, "label is int 2; expected True"),
    ({"completion_ids": []}, "completion_ids is empty; expected at least one token"),
    ({"prompt_ids": None}, "prompt_ids is None; expected a list of token ids"),
])  # fmt: skip
def test_tokenised_completions_get_the_checks_of_text(changes, reason, small_tokenizer):
    for streaming in (False, True):
        with pytest.raises(ValueError, match=f"^train row 0: {reason}"):
            unpaired([{**KTO_IDS, **changes}], small_tokenizer, streaming)
    with pytest.raises(ValueError, match="every label is True; expected both"):
        unpaired([KTO_IDS], small_tokenizer, one_label=False)


def test_tokenised_rows_are_cut_and_dropped(small_tokenizer):
    rows = [IDS, {**IDS, "prompt_ids": [1] * 5}, {**IDS, "rejected_ids": [4, 6]}]
    with pytest.warns(
        UserWarning, match="dropped 2 of 3 rows: .* row 1: the prompt has 5 .* row 2"
    ):
        made = pairs(rows, small_tokenizer, max_length=4)
    assert made == [{"row": 0, **IDS, "chosen_ids": [4]}]


# --- borrowed completions -------------------------------------------------------------------------


def test_every_completion_borrows_from_another_prompt(small_tokenizer):
    g = range(1, 12)
    rows = [{"prompt_ids": [i // 3], "completion_ids": [100 + i], "label": i % 2} for i in g]
    for streaming in (False, True):
        made = unpaired(rows, small_tokenizer, streaming)
        prompt_of = {r["completion_ids"][0]: r["prompt_ids"] for r in made}
        assert len(made) == 11
        assert all(prompt_of[r["borrowed_ids"][0]] != r["prompt_ids"] for r in made)


def test_a_row_alone_in_its_batch_of_the_map_borrows_too(small_tokenizer):
    rows = [{"prompt_ids": [i], "completion_ids": [100 + i], "label": i % 2} for i in range(1001)]
    made = unpaired(rows, small_tokenizer)
    assert (made[-1]["row"], made[-1]["borrowed_ids"]) == (1000, [1099])
    assert [r["row"] for r in made] == list(range(1001))
    streamed = unpaired(rows[:9], small_tokenizer, streaming=True)
    assert (streamed[-1]["row"], streamed[-1]["borrowed_ids"]) == (8, [100])
    # neighbours that are dropped lend nothing
    bad = [{**row, "completion_ids": []} if 0 < row["prompt_ids"][0] < 999 else row for row in rows]
    with pytest.warns(UserWarning, match="dropped 998 of 1001"):
        made = unpaired(bad, small_tokenizer, on_bad_rows="drop")
    assert [(r["row"], r["borrowed_ids"]) for r in made] == [
        (0, [1099]),
        (999, [100]),
        (1000, [1099]),
    ]
    assert unpaired(rows[:1], small_tokenizer)[0]["borrowed_ids"] == []
