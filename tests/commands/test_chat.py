"""chat: what is said to one model and to two, and what is refused."""

from __future__ import annotations

import argparse
import sys

import pytest
import torch

from tests.conftest import make_small_tokenizer, make_tiny_llama
from tralign_fast import cli
from tralign_fast.commands import chat
from tralign_fast.commands.chat import Side, sides_of, talk
from tralign_fast.commands.samples import complete

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with a chat template, an adapter on it that changes what is said."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = make_small_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = make_tiny_llama(tokenizer)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.config._name_or_path = model.name_or_path = str(folder / "base")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def terminal(monkeypatch):
    """Lines that are typed."""

    def types(*lines: str) -> None:
        typed = iter(lines)

        def read(_: str) -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)

    return types


def given(**more):
    return argparse.Namespace(
        **{"max_new_tokens": 6, "temperature": 0.0, "seed": 0, "system": None, **more}
    )


def test_an_answer_is_that_of_generate_and_the_next_one_knows_it(folders):
    (side,) = sides_of(str(folders / "base"), None, None)
    talk([side], given(), iter(["the cat", "a dog", "/exit", "more"]))
    roles = [message["role"] for message in side.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    for end in (1, 3):
        ids = chat._ids(side.tokenizer, side.messages[:end])
        (text,) = complete(side.model, side.tokenizer, [ids], 6)
        assert side.messages[end]["content"] == text
    talk([side], given(system="be kind"), iter(["the cat", "/new", "a dog"]))
    assert [m["content"] for m in side.messages[:2]] == ["be kind", "a dog"]
    assert len(side.messages) == 3


def test_before_and_after_are_one_model_with_its_adapter_off_and_on(folders, capsys, terminal):
    base, adapter = str(folders / "base"), str(folders / "adapter")
    before, after = sides_of(base, adapter, "its start")
    assert before.model is after.model
    assert (before.name, after.name) == (base, adapter)
    talk([before, after], given(), iter(["the cat"]))
    (alone,) = sides_of(base, None, None)
    talk([alone], given(), iter(["the cat"]))
    said = [side.messages[-1]["content"] for side in (before, after, alone)]
    assert said[0] == said[2] != said[1]
    capsys.readouterr()
    terminal("the cat", "/what", "/exit")
    assert cli.main(["chat", adapter, "--before", base, "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("/exit or Ctrl-D ends") == 2  # at the beginning, and for what it does not know
    assert "│" in out


def test_an_answer_that_is_stopped_stays(folders, monkeypatch, capsys):
    (one,) = sides_of(str(folders / "base"), None, None)
    sides = [Side(name, one.model, one.tokenizer) for name in "ab"]
    original = chat._Streamer.on_finalized_text

    def interrupted(self, text, stream_end=False):
        original(self, text, stream_end)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat._Streamer, "on_finalized_text", interrupted)
    talk(sides, given(), iter(["the cat"]))
    assert [m["role"] for m in sides[0].messages] == ["user", "assistant"]
    assert [m["role"] for m in sides[1].messages] == ["user", "assistant"]
    assert sides[1].messages[-1]["content"] == ""


def test_the_oldest_turns_go_where_there_is_no_room(folders):
    (side,) = sides_of(str(folders / "base"), None, None)
    side.model.config.max_position_embeddings = 60
    side.messages = [{"role": "system", "content": "kind"}]
    for turn in range(8):
        side.messages += [{"role": "user", "content": f"cat {turn}"},
                          {"role": "assistant", "content": "yes"}]  # fmt: skip
    side.messages.append({"role": "user", "content": "last"})
    ids = side.prompt(8)
    assert len(ids) + 8 <= 60
    text = side.tokenizer.decode(ids)
    assert "kind" in text
    assert "last" in text
    assert "cat 0" not in text


def test_a_template_that_refuses_a_role_says_so(folders):
    tokenizer = make_small_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match="template refuses this: no system role"):
        chat._ids(tokenizer, [{"role": "system", "content": "kind"}])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./none"], "./none: no such folder"),
        (["BASE", "--adapter", "BASE"], "expected a folder with adapter_config.json"),
        (["BASE", "--before"], "names no start; expected --before MODEL"),
        (["BASE", "--before", "./none"], "./none: no such folder"),
        (["BASE", "--max_new_tokens", "0"], "expected --max_new_tokens ≥ 1"),
        (["BASE", "--temprature", "1"], "did you mean --temperature?"),
        ([], "required: MODEL"),
    ],
)
def test_what_is_refused(words, message, folders, refused, terminal):
    terminal()
    err = refused("chat", *(word.replace("BASE", str(folders / "base")) for word in words))
    assert message in err
    assert err.count("tralign-fast: error:") == 1


def test_without_a_terminal_generate_is_named(refused):
    assert "tralign-fast generate MODEL --prompt TEXT" in refused("chat", "any")
