"""Conversations as TRL tokenises them: tools, template keywords, reasoning; and templates that drop
what a pair differs in."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
from datasets import Dataset

from tests.conftest import make_small_tokenizer
from tralign_fast.data import tokenize_pairs, tokenize_unpaired

TOOL = {
    "type": "function",
    "function": {
        "name": "feed",
        "description": "Feeds a cat",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}
TEMPLATES = [
    "qwen3", "qwen2_5", "gptoss", "llama3_1", "deepseekv3", "glm4moe", "nemotron_3_nano", "qwen3_6",
    "gemma4",
]  # fmt: skip


def trls_rows(rows, tokenizer, method):
    """What TRL's trainer makes of rows, without a model."""
    from trl import DPOTrainer, KTOTrainer

    args = types.SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start"
    )
    trainer = types.SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0
    )
    prepare = (KTOTrainer if method == "kto" else DPOTrainer)._prepare_dataset
    return prepare(trainer, rows, tokenizer, args, "rows")


@pytest.fixture(scope="module")
def templates():
    trl = pytest.importorskip("trl")
    return Path(trl.__file__).parent / "chat_templates"


def call(name):
    function = {"name": "feed", "arguments": {"name": name}}
    return {"role": "assistant", "content": "", "tool_calls": [
        {"id": "a1", "type": "function", "function": function}
    ]}  # fmt: skip


def said(text, **fields):
    return {"role": "assistant", "content": text, **fields}


QUESTION = [{"role": "user", "content": "feed the cat"}]
ANSWERED = [*QUESTION, call("Ann"), {"role": "tool", "name": "feed", "content": "fed"}]
ROWS = {
    "tools": {"prompt": QUESTION, "chosen": [call("Ann")], "rejected": [call("Bob")],
              "tools": [TOOL]},
    "tools in json": {"prompt": QUESTION, "chosen": [call("Ann")], "rejected": [said("no")],
                      "tools": json.dumps([TOOL])},
    "a tool's answer": {"prompt": ANSWERED, "chosen": [said("done")], "rejected": [said("no")],
                        "tools": [TOOL]},
    "keywords": {"prompt": QUESTION, "chosen": [said("yes")], "rejected": [said("no")],
                 "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}},
    "reasoning_content": {"prompt": QUESTION, "chosen": [said("yes", reasoning_content="a cat")],
                          "rejected": [said("no", reasoning_content="a dog")]},
    "thinking": {"prompt": QUESTION, "chosen": [said("yes", thinking="a cat")],
                 "rejected": [said("no", thinking="a dog")]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_conversations_have_trls_tokens(method, template, kind, templates):
    tokenizer = make_small_tokenizer()
    tokenizer.chat_template = (templates / f"{template}.jinja").read_text()
    rows = Dataset.from_list([ROWS[kind], ROWS[kind]])
    try:
        theirs = trls_rows(rows, tokenizer, method)
    except Exception:  # a template that has no place for this
        theirs = None
    tokenize = tokenize_unpaired if method == "kto" else tokenize_pairs
    if theirs is None:
        with pytest.raises(ValueError, match="the chat template refuses the conversation"):
            tokenize(rows, tokenizer, max_length=None)
        return
    columns = ("completion_ids", "label") if method == "kto" else ("chosen_ids", "rejected_ids")
    if method == "dpo" and theirs["chosen_ids"][0] == theirs["rejected_ids"][0]:
        with pytest.raises(ValueError, match="does not print the difference"):
            tokenize(rows, tokenizer, max_length=None)
        return
    ours = tokenize(rows, tokenizer, max_length=None)
    for column in ("prompt_ids", *columns):
        assert ours[column][:] == theirs[column][:], column


def test_the_templates_print_what_the_rows_differ_in(templates):
    """Or the test above would compare less than it says."""
    printed = {}
    for template in TEMPLATES:
        tokenizer = make_small_tokenizer()
        tokenizer.chat_template = (templates / f"{template}.jinja").read_text()
        for kind, row in ROWS.items():
            try:
                ids = tokenize_pairs(Dataset.from_list([row]), tokenizer, max_length=None)
            except ValueError:
                continue
            printed.setdefault(kind, "")
            printed[kind] += tokenizer.decode(ids["prompt_ids"][0] + ids["chosen_ids"][0])
    assert [kind for kind in ROWS if kind not in printed] == []
    assert "Feeds a cat" in printed["tools"]
    assert "Feeds a cat" in printed["tools in json"]
    assert "a cat" in printed["reasoning_content"]
    assert "a cat" in printed["thinking"]


# --- templates that drop the difference -----------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "named"),
    [
        ([said("yes", thinking="a cat")], [said("yes", thinking="a dog")], "thinking"),
        ([said("yes", reasoning_content="a")], [said("yes")], "reasoning_content"),
        ([call("Ann")], [call("Bob")], "tool_calls"),
        ([call("Ann")], [said("", thinking="a")], "tool_calls, thinking"),
    ],
)
@pytest.mark.parametrize("tokenize", [tokenize_pairs, tokenize_unpaired])
def test_what_a_template_drops_is_told_from_equal_rows(
    tokenize, chosen, rejected, named, small_tokenizer
):
    row = {"prompt": QUESTION, "chosen": chosen, "rejected": rejected}
    message = f"differ in {named} alone, and the chat template does not print the difference"
    with pytest.raises(ValueError, match=message) as error:
        tokenize(Dataset.from_list([row]), small_tokenizer, max_length=64)
    assert "\n" not in str(error.value)
    same = {"prompt": QUESTION, "chosen": chosen, "rejected": chosen}
    with pytest.raises(ValueError, match="chosen and rejected are identical"):
        tokenize(Dataset.from_list([same]), small_tokenizer, max_length=64)


def test_what_is_alike_for_its_length_alone_is_still_dropped(small_tokenizer):
    long = "the cat runs under the river " * 8
    rows = Dataset.from_list([
        {"prompt": QUESTION, "chosen": [said(long + "a")], "rejected": [said(long + "b")]},
        {"prompt": QUESTION, "chosen": [said("yes")], "rejected": [said("no")]},
    ])  # fmt: skip
    with pytest.warns(UserWarning, match="identical once cut to max_length = 64"):
        assert tokenize_pairs(rows, small_tokenizer, max_length=64)["row"] == [1]
    assert len(tokenize_unpaired(rows, small_tokenizer, max_length=64)) == 4  # as TRL has them
