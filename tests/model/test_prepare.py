"""What `prepare_model` does to a model, and that all of it is taken back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from tests.model.test_attention import build, collate, examples
from tralign_fast.model import prepare
from tralign_fast.model.patching import causal_lm_of, has_forward
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import enable_logprobs, sequence_logps
from tralign_fast.ops.cpu import onednn


@pytest.fixture(autouse=True)
def faster_products(monkeypatch):
    """Whatever this machine's PyTorch does best: linear layers are patched too."""
    monkeypatch.setattr(onednn, "is_faster", lambda: True)


def snapshot(model) -> dict[Any, Any]:
    """All that a change leaves behind: attributes of modules and configs, and their values."""
    found = {}
    for name, module in model.named_modules():
        found[name, "type"] = type(module)
        for key, value in vars(module).items():
            found[name, key] = value if isinstance(value, bool | str | int | float) else id(value)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            found[name, "config.to_dict"] = config.to_dict()
            found[name, "vars(config)"] = dict(vars(config))
    return found


def quantised():
    bnb = pytest.importorskip("bitsandbytes")
    model = build("llama")
    for layer in model.model.layers:
        linear = layer.mlp.up_proj
        four_bit = bnb.nn.Linear4bit(32, 64, bias=False, quant_type="nf4")
        four_bit.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4"
        )
        four_bit.support_avx512bf16_for_cpu = True  # as where the processor has it
        layer.mlp.up_proj = four_bit.to("cpu")
    return model


def tied():
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    return model


def adapted():
    options: Any = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    return get_peft_model(build("llama"), LoraConfig(r=2, **options))


MODELS = {
    "llama": lambda: build("llama"),
    "tied": tied,
    "gemma2": lambda: build("gemma2"),
    "gpt-oss, padded": lambda: build("gpt-oss"),
    "peft": adapted,
    "4-bit": quantised,
}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def outputs(model):
    model.eval()
    with torch.no_grad():
        mask = torch.ones_like(IDS)
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
        return model(input_ids=IDS).logits, model.generate(input_ids=IDS, **options)


@pytest.mark.parametrize("name", MODELS)
def test_undo_takes_everything_back(name, tmp_path):
    model = MODELS[name]()
    if name == "4-bit":  # its first evaluation is one of a prepared model, else it is repacked
        logits: Any = None
        tokens: Any = None
        model(input_ids=IDS)
    else:
        logits, tokens = outputs(model)
    before, was = snapshot(model), model.config._attn_implementation
    prepared = prepare_model(model)
    assert prepared.packs == ("padded" not in name)
    if prepared.packs:
        assert (
            model.config._attn_implementation == f"tralign_{'eager' if name == 'gemma2' else was}"
        )
    assert snapshot(model) != before
    layout = "shared" if prepared.packs else "padded"
    sequence_logps(model, collate(layout)).sum().backward()
    model.zero_grad()
    prepared.undo()
    assert snapshot(model) == before
    prepared.undo()  # once more does nothing
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="returned no log-probs"):
        sequence_logps(model, collate("padded"))
    if logits is None:
        return
    for ours, theirs in zip(outputs(model), (logits, tokens), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, logits)
    # transformers' own attention holds what cannot be pickled
    head = model.get_output_embeddings()
    hidden = torch.randn(2, 32)
    assert torch.equal(pickle.loads(pickle.dumps(head))(hidden), head(hidden))
    causal_lm_of(model).save_pretrained(tmp_path)
    if name != "peft":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("name", ["llama", "peft"])
def test_a_prepared_model_is_no_pickle_and_says_so(name, tmp_path):
    model = MODELS[name]().eval()
    prepared = prepare_model(model)
    expected = sequence_logps(model, collate())
    copied = copy.deepcopy(model)
    for attempt in (
        lambda: torch.save(model, tmp_path / "model.pt"),
        lambda: pickle.dumps(model),
        lambda: torch.save(copied, tmp_path / "model.pt"),
    ):
        with pytest.raises(TypeError, match=r"^a prepared model cannot .*take the changes back"):
            attempt()
    assert torch.equal(sequence_logps(copied, collate()), expected)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    prepared.undo()
    if name == "llama":  # transformers' own functions of PEFT's cannot
        again = pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_leaving_a_block_takes_everything_back():
    model = build("llama").train()
    model.model.layers[0].eval()  # frozen by hand
    before = snapshot(model)
    with prepare_model(model) as prepared:
        assert prepared.packs
        assert snapshot(model) != before
    assert snapshot(model) == before


def test_a_model_that_is_refused_is_left_as_it_was():
    model = build("llama")
    model.lm_head.bias = nn.Parameter(torch.zeros(97))
    original = type(model.lm_head).forward
    model.lm_head.forward = lambda x: 3 * original(model.lm_head, x)
    before = snapshot(model)
    with pytest.raises(ValueError, match="its logits are not softcap"):
        prepare_model(model)
    assert snapshot(model) == before
    model = quantised()
    model.model.layers[2].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    before = snapshot(model)
    with pytest.raises(ValueError, match="has repacked its 4-bit weight"):
        prepare_model(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0], [0, 2, 1]])
def test_several_callers_take_theirs_back_in_any_order(order):
    model = build("llama")
    before = snapshot(model)
    undos = [
        prepare_model(model, logits_budget_mb=1).undo,
        enable_logprobs(model, logits_budget_mb=2),
        prepare_model(model, logits_budget_mb=3).undo,
    ]
    expected = sequence_logps(model, collate("padded"))
    seen = []
    model.model.layers[-1].mlp.down_proj.register_forward_hook(
        lambda _, args, __: seen.append(args[0].shape[1])
    )
    assert_scored_once(model, seen, expected)
    left = {0, 1, 2}
    for index in order:
        undos[index]()
        left.remove(index)
        if left & {0, 2}:  # one that packs is left
            assert_scored_once(model, seen, expected)
        elif left:
            torch.testing.assert_close(sequence_logps(model, collate("padded")), expected)
            with pytest.raises(RuntimeError, match="got a packed row, but its attention"):
                sequence_logps(model, collate())
    model.model.layers[-1].mlp.down_proj._forward_hooks.clear()
    assert {k for k, _ in snapshot(model).items()} == {k for k, _ in before.items()}
    assert snapshot(model) == before


def assert_scored_once(model, seen, expected):
    batch = collate()
    seen.clear()
    torch.testing.assert_close(sequence_logps(model, batch), expected, rtol=1e-5, atol=3e-5)
    # the last MLP has the scored rows, also where two callers had it so
    assert seen == [
        sum(1 + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in examples())
    ]


def test_log_probs_and_the_rest_are_taken_back_apart():
    model = build("llama")
    prepared = prepare_model(model)
    undo = enable_logprobs(model)
    undo()
    assert model.config._attn_implementation == "tralign_sdpa"
    sequence_logps(model, collate())  # prepare_model's own
    undo = enable_logprobs(model)
    prepared.undo()
    sequence_logps(model, collate("padded"))
    undo()
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)


def test_what_others_have_set_since_stays():
    model = build("llama")
    prepared = prepare_model(model)
    model.set_attn_implementation("eager")
    prepared.undo()
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("hook_first", [False, True])
def test_a_wrapper_of_somebody_else_keeps_working(hook_first):
    """accelerate's hooks replace the forward too, under or over the change."""

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = build("llama"), Count()
    logits, _ = outputs(model)
    before = snapshot(model)
    if hook_first:
        add_hook_to_module(model, hook)
        hooked = snapshot(model)
        prepared = prepare_model(model)
        other = copy.deepcopy(model)
        prepared.undo()
        assert snapshot(model) == hooked
    else:
        prepared = prepare_model(model)
        add_hook_to_module(model, hook)
        other = copy.deepcopy(model)
        prepared.undo()
    calls = hook.calls
    assert torch.equal(model(input_ids=IDS).logits, logits)
    assert hook.calls == calls + 1
    # a copy that was made in between is prepared still, and runs its own weights
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    assert hook.calls == calls + 1
    assert not torch.equal(sequence_logps(other, collate()), sequence_logps_of(model, collate()))
    again = prepare_model(model)
    sequence_logps(model, collate())
    again.undo()
    remove_hook_from_module(model)
    assert torch.equal(model(input_ids=IDS).logits, logits)
    if hook_first:  # accelerate leaves the class's forward on the instance
        assert vars(model).pop("forward").__func__ is type(model).forward
        assert snapshot(model) == before


def sequence_logps_of(model, batch):
    with prepare_model(model):
        return sequence_logps(model, batch)


def test_it_does_not_keep_the_model_alive():
    model = build("llama")
    prepared, seen = prepare_model(model), weakref.ref(model)
    sequence_logps(model, collate())
    del model
    gc.collect()
    assert seen() is None
    prepared.undo()


def test_a_copy_of_a_prepared_model_has_a_handover_of_its_own():
    model = build("llama")
    prepared = prepare_model(model)
    other = copy.deepcopy(model)
    prepared.undo()
    batch, padded = collate(), collate("padded")
    expected = sequence_logps(other, padded)
    torch.testing.assert_close(sequence_logps(other, batch), expected, rtol=1e-5, atol=3e-5)
    # a forward that fails between attention and MLP leaves no layout to the next
    handle = other.model.layers[-1].post_attention_layernorm.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        sequence_logps(other, batch)
    handle.remove()
    torch.testing.assert_close(sequence_logps(other, padded), expected)


def fail(*_):
    raise ArithmeticError


def test_compiled_layers_are_given_back():
    model = build("llama")
    before = snapshot(model)
    prepared = prepare_model(model)
    prepared.compile_layers(backend="eager")
    layer = model.model.layers[0]

    def is_compiled(module):  # by the one way or the other, as transformers checkpoints
        return module._compiled_call_impl is not None or has_forward(module, "compiled")

    assert is_compiled(layer)
    second = prepare_model(model)
    second.compile_layers(backend="eager")
    prepared.undo()
    assert is_compiled(layer)
    # a copy computes with weights of its own
    other, ids = copy.deepcopy(model), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        for parameter in other.model.layers.parameters():
            parameter.mul_(1.5)
        found = other(ids).logits
        second.undo()
        assert not is_compiled(layer)
        plain = type(model)(model.config).eval()
        plain.load_state_dict(other.state_dict())
        torch.testing.assert_close(found, plain(ids).logits)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="found no decoder layers in Linear"):
        prepare.compile_layers(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
