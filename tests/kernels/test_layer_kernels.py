"""Liger's layer kernels themselves, in whole models: the numbers of the models' own code."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.kernels.conftest import INTERPRETED
from tests.model.test_layer_kernels import MODELS, assert_same, build, kinds, outcome
from tralign_fast.model.layer_kernels import KINDS
from tralign_fast.model.prepare import prepare_model
from tralign_fast.ops.backend import warn_once

pytest.importorskip("liger_kernel")


@pytest.fixture(autouse=True)
def liger(monkeypatch):
    """Liger's kernels as an interpreter can run them: Triton's knows no functions of libdevice, and
    hands numbers on without a type, which a compiler gives them."""
    warn_once.cache_clear()
    if not INTERPRETED:
        return
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    from tralign_fast.model import liger_ops

    convert = interpreter._implicit_cvt

    def typed(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", typed)
    monkeypatch.setattr(liger_ops._rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(liger_ops._geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_those_of_the_models_own_code(name, device, recwarn):
    plain = build(name).to(device)
    fast = copy.deepcopy(plain)
    prepare_model(plain, layer_kernels="none", probe=False)
    prepare_model(fast, layer_kernels="liger", probe=False)
    assert set(kinds(fast)) == {*KINDS}
    assert not [w for w in recwarn if "Liger" in str(w.message)]
    assert_same(outcome(fast, device), outcome(plain, device))


def test_adapters_in_layers_that_run_again_in_the_backward(device):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config).to(device)
    with prepare_model(model, layer_kernels="none", probe=False):
        truth = outcome(model, device)
    prepare_model(model, layer_kernels="liger", probe=False)
    assert set(kinds(model)) == {*KINDS}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(outcome(model, device), truth)
