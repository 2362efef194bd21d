"""What is done to a model that a trainer is given: dropout of every kind is off."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from tests.model.test_attention import COMMON
from tests.training.test_trainer import make
from tralign_fast.training.pretrained import disable_dropout

GPT: Any = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 97}
BART = {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "vocab_size": 97}
PARTS = {"attention_dropout": 0.5, "activation_dropout": 0.5}
GPT_DROPOUT: Any = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
MODELS = {
    # numbers on modules, layers left out
    "OPT": (t.OPTForCausalLM, t.OPTConfig, {
        **COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5, "layerdrop": 0.5,
        "attention_dropout": 0.5,
    }),
    "BioGPT": (t.BioGptForCausalLM, t.BioGptConfig, {
        **COMMON, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5,
        "layerdrop": 0.5, "activation_dropout": 0.5,
    }),
    "XGLM": (t.XGLMForCausalLM, t.XGLMConfig, {**BART, **PARTS, "dropout": 0.5, "layerdrop": 0.5}),
    "GPT-BigCode": (t.GPTBigCodeForCausalLM, t.GPTBigCodeConfig, {**GPT, **GPT_DROPOUT}),
    "Llama": (t.LlamaForCausalLM, t.LlamaConfig, {**COMMON, "attention_dropout": 0.5}),
    # read in the config at every forward
    "Falcon": (t.FalconForCausalLM, t.FalconConfig, {
        **COMMON, "hidden_dropout": 0.5, "attention_dropout": 0.5,
    }),
    "Persimmon": (t.PersimmonForCausalLM, t.PersimmonConfig, {
        **COMMON, "attention_dropout": 0.5, "hidden_dropout": 0.5,
    }),
    # modules
    "GPT-2": (t.GPT2LMHeadModel, t.GPT2Config, {**GPT, **GPT_DROPOUT}),
    "Phi": (t.PhiForCausalLM, t.PhiConfig, {
        **COMMON, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5,
    }),
}  # fmt: skip


def outputs(model):
    """Of training-mode forwards with several seeds."""
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        random.seed(seed)
        with torch.no_grad():
            found.append(model(input_ids=torch.arange(3, 17)[None]).logits)
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_no_dropout_is_left(name, implementation):
    if name == "XGLM":
        implementation = "eager"  # its only one
    model_class, config, options = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config(**{**options, "attn_implementation": implementation}))
    model.train()
    before = outputs(model)
    assert any(not torch.equal(other, before[0]) for other in before)
    disable_dropout(model)
    first, *others = outputs(model)
    assert all(torch.equal(other, first) for other in others)
    assert torch.equal(model.eval()(input_ids=torch.arange(3, 17)[None]).logits, first)


def test_what_is_no_probability_stays():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.drop_path, self.token_dropout, self.dropped = 0.1, 0.2, True, 3
            self.scale = 0.5
            self.layers = nn.ModuleList([nn.Dropout1d(0.3), nn.AlphaDropout(0.3)])

    module = Module()
    disable_dropout(module)
    assert (module.dropout, module.drop_path, module.token_dropout, module.dropped) == (0, 0, 1, 3)
    assert module.token_dropout is True
    assert module.scale == 0.5
    assert [layer.p for layer in module.layers] == [0.0, 0.0]


def test_a_config_that_no_forward_reads_keeps_its_entries():
    """A model that is trained on by somebody else, with dropout, finds it in its config."""
    model = t.GPT2LMHeadModel(t.GPT2Config(**GPT, **GPT_DROPOUT))
    disable_dropout(model)
    assert {model.config.to_dict()[name] for name in GPT_DROPOUT} == {0.5}


def test_a_trainer_switches_it_off(small_tokenizer, tmp_path):
    model_class, config, options = MODELS["OPT"]
    options = {**options, "vocab_size": len(small_tokenizer)}
    losses = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model = model_class(config(**options))
        trainer = make(model, small_tokenizer, tmp_path, max_steps=2, seed=seed)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]
