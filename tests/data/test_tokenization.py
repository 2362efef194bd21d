"""Token ids against TRL's own trainers on the same rows, and what is said about bad rows."""

from __future__ import annotations

import copy
import json
import warnings
from functools import cache, partial

import pytest
from datasets import Dataset, IterableDataset
from datasets.utils import logging as datasets_logging

from tests.conftest import make_tiny_llama
from tralign_fast.data import tokenize_pairs, tokenize_unpaired
from tralign_fast.demo.smollm2 import load_smollm2_tokenizer

PAIR_COLUMNS = ["row", "prompt_ids", "chosen_ids", "rejected_ids"]
UNPAIRED_COLUMNS = ["row", "prompt_ids", "completion_ids", "label", "borrowed_ids"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TEXT = [
    {"prompt": "The sky is", "chosen": " blue and wide.", "rejected": " green."},
    {"prompt": "Name a colour:\n", "chosen": "Red is one.", "rejected": "No<|im_end|>"},
    {"prompt": "", "chosen": "Something from nothing.", "rejected": "Nothing at all"},
    {"prompt": "Größe? 日本語 🙂", "chosen": " naïve ☕ answer", "rejected": "\n\n  spaces  "},
    {"prompt": "A" + " list" * 60, "chosen": " one two three" * 20, "rejected": " four" * 40},
]
# the pieces join into tokens that span the boundary
MERGING = [
    {"prompt": "The answer is ", "chosen": "blue", "rejected": "7"},
    {"prompt": "hello wor", "chosen": "ld of dogs", "rejected": "k of dogs"},
    {"prompt": "2+2=", "chosen": "=4", "rejected": "4"},
    {"prompt": "No merge:", "chosen": " here", "rejected": " there"},
]
CHAT = [
    {
        "prompt": [user("What is the sky?")],
        "chosen": [assistant("Blue, mostly.")],
        "rejected": [assistant("Green.")],
    },
    {
        "prompt": [
            {"role": "system", "content": "Be terse."},
            user("Hi"),
            assistant("Hello"),
            user("?"),
        ],
        "chosen": [assistant("Yes?"), user("Who are you?"), assistant("A model, in short.")],
        "rejected": [assistant("I do not understand this question at all, sorry. " * 4)],
    },
    {
        "prompt": [user("Continue"), assistant("Once upon")],
        "chosen": [assistant(" a time")],
        "rejected": [assistant(" a clock")],
    },
]
IMPLICIT_TEXT = [
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "Q: 2+2? A: 4", "rejected": "Q: 2+2? A: 4 or 5"},  # one continues the other
    {"chosen": "Say wordy", "rejected": "Say wordless"},  # parts inside a word
    {"chosen": "Left", "rejected": "Right"},  # nothing in common
]
IMPLICIT_CHAT = [
    {
        "chosen": [user("Sky?"), assistant("Blue.")],
        "rejected": [user("Sky?"), assistant("Green.")],
    },
    {
        "chosen": [user("Hi"), assistant("Hello"), user("Sky?"), assistant("Blue.")],
        "rejected": [user("Hi"), assistant("Hello"), user("Sky?"), assistant("Who knows?")],
    },
    {
        "chosen": [user("Hi"), assistant("Hello"), user("Sky?"), assistant("Blue.")],
        "rejected": [user("Hi"), assistant("Hello"), user("Sea?"), assistant("Blue too.")],
    },
    {
        "chosen": [user("Hi"), assistant("Hello")],
        "rejected": [user("Hi"), assistant("Hello"), user("Bye"), assistant("Bye")],
    },
]
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather in a city",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
        }
    ]
)
WITH_OPTIONS = [
    {**CHAT[0], "tools": TOOLS, "chat_template_kwargs": {"mood": "calm"}},
    {**CHAT[2], "tools": TOOLS, "chat_template_kwargs": {"mood": "angry"}},
]
ROWS = {
    "text": TEXT,
    "merging": MERGING,
    "chat": CHAT,
    "implicit text": IMPLICIT_TEXT,
    "implicit chat": IMPLICIT_CHAT,
    "options": WITH_OPTIONS,
}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if mood %}[{{ mood }}]{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# alone, the prompt ends in an empty thought, which no full conversation holds
THINKING = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")


def unpair(rows):
    keep = [(row, column) for row in rows for column in ("rejected", "chosen")]
    return [
        {
            **{k: v for k, v in row.items() if k not in ("chosen", "rejected")},
            "completion": row[column],
            "label": column == "chosen",
        }
        for row, column in keep
    ]


@cache  # it takes 2.5 s to load
def with_bos():
    from tokenizers.processors import TemplateProcessing

    other = load_smollm2_tokenizer()  # a copy may share its backend
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert other("x")["input_ids"][0] == 1
    return other


def variant(tokenizer, kind):
    """SmolLM2's tokenizer with another chat template, or with a BOS before every text."""
    if kind == "plain":
        return tokenizer
    if kind == "bos":
        return with_bos()
    other = copy.deepcopy(tokenizer)
    other.chat_template = {"options": TEMPLATE, "thinking": THINKING}[kind]
    return other


@pytest.fixture(scope="module")
def tiny_model(tokenizer):
    return make_tiny_llama(tokenizer, hidden_size=16, num_hidden_layers=1)


@pytest.fixture
def trl_batch(tiny_model, tmp_path):
    """All rows as one batch of the real DPOTrainer or KTOTrainer."""

    def batch(rows, tokenizer, max_length, kto=False, streaming=False):
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

        config, trainer = (KTOConfig, KTOTrainer) if kto else (DPOConfig, DPOTrainer)
        options = {"max_steps": 1} if streaming else {}
        built = trainer(
            model=copy.deepcopy(tiny_model),
            ref_model=copy.deepcopy(tiny_model),
            args=config(
                str(tmp_path),
                use_cpu=True,
                bf16=False,
                report_to="none",
                max_length=max_length,
                per_device_train_batch_size=2,
                **options,
            ),
            train_dataset=dataset_of(rows, streaming),
            processing_class=copy.deepcopy(tokenizer),
        )
        return built.data_collator(list(built.train_dataset))

    return batch


def dataset_of(rows, streaming=False):
    if streaming:
        return IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows)))
    return Dataset.from_list(rows)


def of_trl(batch, prefix=""):
    """[(prompt ids, completion ids)] of a padded batch."""
    split = []
    fields = (batch[f"{prefix}{f}"] for f in ("input_ids", "attention_mask", "completion_mask"))
    for ids, attended, scored in zip(*(field.tolist() for field in fields), strict=True):
        real = [(i, s) for i, a, s in zip(ids, attended, scored, strict=True) if a]
        split.append(([i for i, s in real if not s], [i for i, s in real if s]))
    return split


def of_pairs(dataset):
    rows = list(dataset)
    return [(r["prompt_ids"], r[column]) for column in ("chosen_ids", "rejected_ids") for r in rows]


def halves(items):
    return items[: len(items) // 2], items[len(items) // 2 :]


def of_unpaired(dataset, max_length=None):
    """What the collator makes of the rows: completions cut to what their own prompt leaves."""
    return [
        (p, c if max_length is None else c[: max_length - len(p)])
        for p, c in ((r["prompt_ids"], r["completion_ids"]) for r in dataset)
    ]


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


CASES = [(rows, "plain") for rows in ROWS if rows != "options"]
CASES += [("text", "bos"), ("merging", "bos"), ("options", "options")]
CASES += [("chat", "thinking"), ("implicit chat", "thinking")]


@pytest.mark.parametrize(("rows", "kind"), CASES)
def test_pairs_are_those_of_trl(rows, kind, tokenizer, trl_batch):
    tokenizer = variant(tokenizer, kind)
    expected = of_trl(trl_batch(ROWS[rows], tokenizer, None))
    made = quiet(tokenize_pairs, Dataset.from_list(ROWS[rows]), tokenizer, max_length=None)
    assert made.column_names == PAIR_COLUMNS
    assert made["row"][:] == list(range(len(ROWS[rows])))
    assert of_pairs(made) == expected


@pytest.mark.parametrize("max_length", [40, 62, 97, 160])
@pytest.mark.parametrize("rows", ["text", "chat"])
def test_pairs_are_cut_and_dropped_as_in_trl(rows, max_length, tokenizer, trl_batch):
    chosen, rejected = halves(of_trl(trl_batch(ROWS[rows], tokenizer, max_length)))
    # TRL also trains on pairs that the cut made identical
    alike = [c == r for c, r in zip(chosen, rejected, strict=True)]
    assert sum(alike) == (rows == "chat" and max_length == 40)
    expected = [pair for pair, same in zip(chosen + rejected, alike * 2, strict=True) if not same]
    made = quiet(
        tokenize_pairs,
        Dataset.from_list(ROWS[rows]),
        tokenizer,
        max_length=max_length,
        on_bad_rows="drop",
    )
    assert of_pairs(made) == expected
    assert max(len(p) + len(c) for p, c in of_pairs(made)) <= max_length


@pytest.mark.parametrize(("rows", "kind"), [c for c in CASES if not c[0].startswith("implicit")])
def test_kto_rows_are_those_of_trl(rows, kind, tokenizer, trl_batch):
    tokenizer, rows = variant(tokenizer, kind), unpair(ROWS[rows])
    expected = trl_batch(rows, tokenizer, None, kto=True)
    made = quiet(tokenize_unpaired, Dataset.from_list(rows), tokenizer, max_length=None)
    assert made.column_names == UNPAIRED_COLUMNS
    assert made["row"][:] == list(range(len(rows)))
    assert made["label"][:] == expected["label"].tolist()
    assert of_unpaired(made) == of_trl(expected)


@pytest.mark.parametrize("max_length", [None, 97])
@pytest.mark.parametrize(("rows", "kind"), CASES)
def test_kto_from_pairs_is_that_of_trl(rows, kind, max_length, tokenizer, trl_batch):
    tokenizer, rows = variant(tokenizer, kind), ROWS[rows]
    expected = trl_batch(rows, tokenizer, max_length, kto=True)
    made = quiet(
        tokenize_unpaired,
        Dataset.from_list(rows),
        tokenizer,
        max_length=max_length,
        on_bad_rows="drop",
    )
    assert made["label"][:] == expected["label"].tolist()
    assert of_unpaired(made, max_length) == of_trl(expected)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_pairs_are_unpaired_in_trls_order(num_proc, tokenizer):
    from trl import unpair_preference_dataset

    rows = [{"prompt": f"{i}:", "chosen": f" {i} yes", "rejected": f" {i} no"} for i in range(2100)]
    expected = unpair_preference_dataset(Dataset.from_list(rows), num_proc=num_proc)
    made = tokenize_unpaired(Dataset.from_list(rows), tokenizer, max_length=None, num_proc=num_proc)
    assert made["label"][:] == expected["label"][:]
    assert made["row"][:] == [int(prompt[:-1]) for prompt in expected["prompt"]]
    text = tokenizer.decode(made[1500]["prompt_ids"] + made[1500]["completion_ids"])
    assert text == expected[1500]["prompt"] + expected[1500]["completion"] + "<|im_end|>"


@pytest.mark.parametrize("rows", ["text", "chat", "implicit text", "implicit chat"])
@pytest.mark.parametrize("kto", [False, True])
def test_streams_are_those_of_trl(rows, kto, tokenizer, trl_batch):
    expected = trl_batch(ROWS[rows], tokenizer, 97, kto=kto, streaming=True)
    cut = partial(of_unpaired, max_length=97)
    tokenize, of_rows = (tokenize_unpaired, cut) if kto else (tokenize_pairs, of_pairs)
    stream = dataset_of(ROWS[rows], streaming=True)
    made = quiet(tokenize, stream, tokenizer, max_length=97, on_bad_rows="drop")
    assert isinstance(made, IterableDataset)
    assert made.column_names == (UNPAIRED_COLUMNS if kto else PAIR_COLUMNS)
    assert quiet(of_rows, made) == of_trl(expected)


def test_a_stream_is_read_as_it_is_used(tokenizer):
    read = []

    def rows():
        for i in range(1000):
            read.append(i)
            yield {"prompt": f"{i}:", "chosen": " a", "rejected": " b", "extra" * (i % 2): i}

    made = tokenize_pairs(IterableDataset.from_generator(rows), tokenizer, max_length=None)
    first = [row for row, _ in zip(made, range(3), strict=False)]
    assert [row["row"] for row in first] == [0, 1, 2]
    assert all(sorted(row) == sorted(PAIR_COLUMNS) for row in first)
    assert max(read) < 10


@pytest.mark.parametrize("typed", [False, True])
def test_a_stream_made_of_a_dataset(typed, tokenizer):
    rows = Dataset.from_list(CHAT)
    made = tokenize_pairs(
        rows.to_iterable_dataset(num_shards=2) if typed else dataset_of(CHAT, streaming=True),
        tokenizer,
        max_length=None,
    )
    assert list(made) == list(tokenize_pairs(rows, tokenizer, max_length=None))


@pytest.mark.parametrize("streaming", [False, True])
def test_tokenised_datasets_stay_as_they_are(streaming, tokenizer):
    rows = dataset_of(TEXT[::-1], streaming)
    for tokenize in (tokenize_pairs, tokenize_unpaired):
        once = tokenize(rows, tokenizer, max_length=None)
        assert list(tokenize(once, tokenizer, max_length=None)) == list(once)
    pairs = Dataset.from_list(list(tokenize_pairs(rows, tokenizer, max_length=None)))
    some = tokenize_pairs(pairs.select([3, 1]), tokenizer, max_length=None)
    assert some["row"][:] == [3, 1]  # rows keep the number of the dataset that they came from


def test_formats_and_other_columns_do_not_matter(tokenizer):
    expected = list(tokenize_pairs(Dataset.from_list(TEXT), tokenizer, max_length=None))
    rows = Dataset.from_list([{**row, "row": "r", "problem": 0.5, "merged": 1} for row in TEXT])
    assert list(tokenize_pairs(rows, tokenizer, max_length=None)) == expected
    assert list(tokenize_pairs(rows.to_iterable_dataset(), tokenizer, max_length=None)) == expected
    assert list(tokenize_pairs(rows.with_format("numpy"), tokenizer, max_length=None)) == expected


def test_two_processes_give_the_same_rows(tokenizer):
    rows = Dataset.from_list(TEXT * 3)
    alone = tokenize_pairs(rows, tokenizer, max_length=None)
    both = tokenize_pairs(rows, tokenizer, max_length=None, num_proc=2)
    assert list(alone) == list(both)


def test_rows_from_the_cache_of_map_are_reported_too(tokenizer, tmp_path):
    Dataset.from_list([*MERGING, {**MERGING[0], "chosen": None}]).save_to_disk(tmp_path)
    for _ in range(2):
        rows = Dataset.load_from_disk(tmp_path)
        with pytest.raises(ValueError, match="train row 4: chosen is None"):
            tokenize_pairs(rows, tokenizer, max_length=None)
        with warnings.catch_warnings(record=True) as caught:
            tokenize_pairs(rows, tokenizer, max_length=None, on_bad_rows="drop")
        dropped, merged = (str(w.message) for w in caught)
        assert "train: dropped 1 of 5 rows" in dropped
        assert "train: in 3 of 5 tokenised rows" in merged


def test_pairs_with_nothing_in_common_have_an_empty_prompt(tokenizer):
    """TRL looks at the character before the first, finds the last one, and cuts there."""
    rows = Dataset.from_list([{"chosen": "Left ", "rejected": "Right"}])
    (row,) = tokenize_pairs(rows, tokenizer, max_length=None)
    assert row["prompt_ids"] == []
    assert tokenizer.decode(row["chosen_ids"]) == "Left <|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "Right<|im_end|>"


def test_the_bar_names_the_dataset(tokenizer, capfd):
    was_on = datasets_logging.is_progress_bar_enabled()
    datasets_logging.enable_progress_bar()
    tokenize_pairs(Dataset.from_list(TEXT), tokenizer, max_length=None, name="eval")
    if not was_on:
        datasets_logging.disable_progress_bar()
    assert "Tokenizing eval" in capfd.readouterr().err


def test_a_merged_boundary_warns_once_with_an_example(tokenizer):
    with pytest.warns(UserWarning, match="prompt's last tokens change") as caught:
        tokenize_pairs(Dataset.from_list(MERGING), tokenizer, max_length=None)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("train: in 3 of 4 tokenised rows")
    assert "e.g. row 0: ' ' became ' blue'" in message
    stream = tokenize_pairs(dataset_of(MERGING, streaming=True), tokenizer, max_length=None)
    with pytest.warns(UserWarning, match="at least one row .* e.g. row 0: ' '") as caught:
        list(stream)
    assert len(caught) == 1


def test_no_merged_boundary_no_warning(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_pairs(Dataset.from_list(CHAT), tokenizer, max_length=None)


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
