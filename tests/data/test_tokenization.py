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
from tests.diagonal import diagonal
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


@cache
def copy_of(tokenizer):
    """TRL may change its own, once; a copy takes 0.2 s."""
    return copy.deepcopy(tokenizer)


@cache
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
            processing_class=copy_of(tokenizer),
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


@pytest.mark.parametrize(("rows", "max_length"), diagonal(2, ["text", "chat"], [40, 62, 97, 160]))
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


@pytest.mark.parametrize(("case", "max_length"), diagonal(2, CASES, [None, 97]))
def test_kto_from_pairs_is_that_of_trl(case, max_length, tokenizer, trl_batch):
    name, kind = case
    tokenizer, rows = variant(tokenizer, kind), ROWS[name]
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


@pytest.mark.parametrize(
    ("rows", "kto"), diagonal(2, ["text", "chat", "implicit text", "implicit chat"], [False, True])
)
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
