"""Gradient checkpointing of a model's first layers alone, beside that of all and of none."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Zamba2Config,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.model.test_checkpointing import CASES, SIZES, gradients
from tralign_fast.model.checkpointed_layers import FirstLayers, how_many
from tralign_fast.model.checkpointing import lean_checkpoints
from tralign_fast.model.prepare import compile_layers

LAYERS = SIZES["num_hidden_layers"]


def enable(model, use_reentrant=False):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def runs(model):
    """How often each layer's MLP runs in a step."""
    counts: Counter[int] = Counter()
    layers = model.get_decoder().layers
    handles = [
        layer.mlp.register_forward_pre_hook(lambda *_, i=index: counts.update([i]))
        for index, layer in enumerate(layers)
    ]
    gradients(model)
    for handle in handles:
        handle.remove()
    return [counts[index] for index in range(len(layers))]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["full", "attention dropout", "LoRA", "LoRA with dropout"])
def test_losses_and_gradients_are_those_of_all_and_of_no_layers_to_the_bit(name, use_reentrant):
    model = CASES[name]()
    if name != "full":
        model.enable_input_require_grads()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            undo = lean_checkpoints(model)
            enable(model, use_reentrant)
            gradients(model)  # the first backward looks at the layers' ends
            loss, wanted = gradients(model)
            undo()
            model.gradient_checkpointing_disable()
            found = [gradients(model)]
            for layers in range(LAYERS + 1):
                undo = lean_checkpoints(model, layers)
                enable(model, use_reentrant)
                found += [gradients(model), gradients(model)]
                undo()
        for theirs in found:
            assert torch.equal(theirs[0], loss)
            assert theirs[1].keys() == wanted.keys()
            for parameter, gradient in wanted.items():
                assert torch.equal(theirs[1][parameter], gradient), parameter


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(("layers", "count"), [(0, 0), (1, 1), (2, 2), (3, 3), (0.5, 2), (0.3, 1)])
def test_layers_behind_the_first_ones_run_once(layers, count, lean):
    model = CASES["full"]()
    undo = lean_checkpoints(model, layers)
    if not lean:  # PyTorch's own checkpoint
        model.model.layers[0].register_forward_hook(lambda *_: None)
        enable(model, use_reentrant=True)
        model.enable_input_require_grads()
    for _ in range(2):  # also those that are switched on later, as transformers' Trainer does
        assert runs(model) == [2] * count + [1] * (LAYERS - count)
        model.gradient_checkpointing_disable()
        assert runs(model) == [1] * LAYERS
        enable(model, use_reentrant=not lean)
    copied = copy.deepcopy(model)
    enable(copied, use_reentrant=not lean)
    assert runs(copied) == [2] * count + [1] * (LAYERS - count)
    undo()
    assert runs(model) == [2] * LAYERS
    enable(model)
    assert runs(model) == [2] * LAYERS


def test_compiled_layers_behind_the_first_ones_run_once():
    model = CASES["full"]()
    wanted = gradients(model)
    lean_checkpoints(model, 1)
    compile_layers(model, backend="eager")
    found = gradients(model)
    assert torch.equal(found[0], wanted[0])
    for name, gradient in wanted[1].items():
        assert torch.equal(found[1][name], gradient), name
    kept = [layer.gradient_checkpointing for layer in model.model.layers]
    assert kept == [True, False, False]


def whole_layer():
    """PEFT puts the layer, and a copy that it trains, into a wrapper."""
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], modules_to_save=["layers.1"]
    )
    model = get_peft_model(CASES["full"](), config)
    model.enable_input_require_grads()
    return model.train()


def compiled_layer():
    model = CASES["full"]()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


@pytest.mark.parametrize("wrapped", [whole_layer, compiled_layer])
def test_a_layer_in_a_wrapper_is_a_layer(wrapped):
    model = wrapped()
    enable(model)
    loss, wanted = gradients(model)
    decoder = (model.get_base_model() if wrapped is whole_layer else model).get_decoder()
    for layers in range(LAYERS + 1):
        undo = lean_checkpoints(model, layers)
        flags = [
            {m.gradient_checkpointing for m in layer.modules() if isinstance(m, LlamaDecoderLayer)}
            for layer in decoder.layers
        ]
        assert flags == [{True}] * layers + [{False}] * (LAYERS - layers)
        found = gradients(model)
        undo()
        assert torch.equal(found[0], loss)
        assert found[1].keys() == wanted.keys()
        assert all(torch.equal(found[1][name], wanted[name]) for name in wanted)


def test_stages_of_layers_are_no_layers():
    model = CASES["full"]()
    layers = model.model.layers
    stage = torch.nn.Module()
    stage.blocks = torch.nn.ModuleList(layers)
    model.model.layers = torch.nn.ModuleList([stage] * 4)
    lean_checkpoints(model, 1)
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, False]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0], [0, 2, 1]])
def test_of_several_callers_the_newest_decides_until_its_undo(order):
    model = CASES["full"]()
    counts = [2, None, 1]
    undos = [lean_checkpoints(model, layers) for layers in counts]
    left = {0, 1, 2}
    for index in [None, *order]:
        if index is not None:
            undos[index]()
            left.remove(index)
        newest = counts[max(left)] if left else None
        wanted = [i < (LAYERS if newest is None else newest) for i in range(LAYERS)]
        for _ in range(2):
            assert [layer.gradient_checkpointing for layer in model.model.layers] == wanted
            copied = copy.deepcopy(model)
            enable(copied)
            assert [layer.gradient_checkpointing for layer in copied.model.layers] == wanted
            model.gradient_checkpointing_disable()
            assert not any(layer.gradient_checkpointing for layer in model.model.layers)
            enable(model)


def test_an_undo_leaves_layers_as_they_were_asked_to_be():
    model = CASES["full"]()
    model.model.layers[2].gradient_checkpointing = False  # by hand, as every_n_layers does
    before = [dict(vars(layer)) for layer in model.model.layers]
    lean_checkpoints(model, 1)()
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, True, False]
    assert [vars(layer).keys() for layer in model.model.layers] == [b.keys() for b in before]


def test_a_share_of_the_layers_is_rounded_up():
    assert [how_many(share, 30, "") for share in (0.01, 0.1, 0.5, 0.51, 0.99)] == [1, 3, 15, 16, 30]


def test_the_layers_are_those_of_the_language_model():
    """A vision tower, of which nobody asked, stays as it was; layers in a layer go with it."""
    text = LlamaConfig(**SIZES)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(
        LlavaConfig(vision_config=vision, text_config=text)
    )
    lean_checkpoints(model, 1)
    enable(model)
    flags = [
        (name, module.gradient_checkpointing)
        for name, module in model.named_modules()
        if "layers." in name and hasattr(module, "gradient_checkpointing")
    ]
    assert {flag for name, flag in flags if "vision" in name} == {True}
    assert [flag for name, flag in flags if "language" in name] == [True, False, False]
    hybrid = Zamba2Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=4, mamba_d_state=4, mamba_headdim=8,
        n_mamba_heads=4, mamba_ngroups=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(hybrid)
    lean_checkpoints(model, 3)
    enable(model)
    flags = [layer.gradient_checkpointing for layer in model.model.layers]
    assert flags == [True, True, True, False]
    assert model.model.layers[1].mamba_decoder.gradient_checkpointing
    assert not model.model.layers[3].mamba_decoder.gradient_checkpointing


def test_what_has_no_such_layers_is_refused():
    model = CASES["full"]()
    with pytest.raises(ValueError, match="layers=4: expected at most 3, the layers"):
        lean_checkpoints(model, 4)
    model.model.layers = torch.nn.ModuleDict({"only": model.model.layers[0]})
    with pytest.raises(ValueError, match="found no list of layers in LlamaForCausalLM"):
        FirstLayers(model, 0.5)
