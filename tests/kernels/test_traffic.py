"""The bytes that benchmarks.report states are the bytes that the kernels ask for."""

import pytest
import torch

from tests.kernels.conftest import INTERPRETED
from tralign_kernels import (
    AdafactorOptions,
    AdamWOptions,
    PreferenceOptions,
    Term,
    adafactor_step_,
    adamw,
    adamw_step_,
    ema,
    ema_update_,
    head_tiles,
    linear_logprob,
    linear_logprob_builds,
    linear_logprob_forward_,
    linear_powers,
    linear_powers_,
    logprob,
    logprob_backward_,
    logprob_forward_,
    lora_merge,
    lora_merge_,
    optimizer_builds,
    preference,
    preference_forward,
    scale_rows_,
)
from tralign_kernels.launch import DotLaunch

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="loads are counted in the interpreter")
HALF = torch.bfloat16


@pytest.fixture
def asked(monkeypatch):
    """A list of the bytes of every load and store, as the interpreter makes them."""
    from triton.runtime.interpreter import interpreter_builder

    counts = []
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def count(pointers, mask):
        counts.append(int(mask.data.sum()) * pointers.dtype.element_ty.primitive_bitwidth // 8)

    def counted_load(pointers, mask, *rest):
        count(pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers, value, mask, *rest):
        count(pointers, mask)
        return store(pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", counted_load)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", counted_store)
    return counts


def test_logprob(asked):
    N, W = 3, 5000
    logits, targets = torch.randn(N, W).to(HALF), torch.zeros(N, dtype=torch.int64)
    vectors = torch.zeros(N, 2), torch.zeros(N)
    logprob_forward_(logits, targets, 0, *vectors)
    assert sum(asked) == logprob.traffic(False, N, W, 2, 4096)["moved"]
    asked.clear()
    logprob_forward_(logits, targets, 0, *vectors, statistics=torch.zeros(5, N))
    assert sum(asked) == logprob.traffic(False, N, W, 2, 2048, statistics=True)["moved"]
    asked.clear()
    logprob_backward_(logits, targets, 0, *vectors)
    assert (
        sum(asked) == logprob.traffic(True, N, W, 2, logprob.BACKWARD_LAUNCH["cuda"].block)["moved"]
    )


def test_linear_logprob(asked, monkeypatch):
    launch = DotLaunch(16, 32, 16, 4, 2)
    monkeypatch.setattr(linear_logprob, "SMALL_LAUNCH", {"sm_80": (launch,)})
    monkeypatch.setattr(head_tiles, "SPLIT", 64)
    monkeypatch.setattr(linear_logprob, "_combine_kernel", {(1,): lambda *_, **__: None})
    N, W, H = 19, 150, 37
    bias = torch.zeros(W, dtype=HALF)
    linear_logprob_forward_(
        torch.ones(N, H, dtype=HALF), torch.ones(W, H, dtype=HALF),
        torch.zeros(N, dtype=torch.int64), 0, torch.zeros(N, 2), torch.zeros(N), bias=bias,
    )  # fmt: skip
    assert sum(asked) == linear_logprob_builds.traffic(N, W, H, 2, launch, bias=True)["moved"]


def test_linear_powers(asked, monkeypatch):
    launch = DotLaunch(16, 32, 16, 4, 2)
    monkeypatch.setattr(linear_powers, "POWERS_LAUNCH", {"sm_80": (launch,)})
    for table in ("POWERS_LAUNCH", "STATISTICS_LAUNCH"):
        monkeypatch.setattr(linear_logprob, table, {"sm_80": (launch,)})
    monkeypatch.setattr(head_tiles, "SPLIT", 64)
    monkeypatch.setattr(linear_logprob, "_combine_kernel", {(1,): lambda *_, **__: None})
    N, W, H = 19, 144, 32
    bias, powers = torch.zeros(W, dtype=HALF), torch.zeros(N, W, dtype=HALF)
    matrices = torch.ones(N, H, dtype=HALF), torch.ones(W, H, dtype=HALF)
    targets, logsumexp, logps = torch.arange(N), torch.zeros(N, 2), torch.zeros(N)
    linear_logprob_forward_(
        *matrices, targets, 0, torch.zeros(N, 2), logps, bias=bias, powers=powers
    )
    forward = linear_logprob_builds.traffic(N, W, H, 2, launch, bias=True, powers=True)
    assert sum(asked) == forward["moved"]
    for powers_too in (False, True):
        asked.clear()
        linear_logprob_forward_(
            *matrices, targets, 0, torch.zeros(N, 2), logps, bias=bias,
            powers=powers if powers_too else None, statistics=torch.zeros(5, N),
        )  # fmt: skip
        stated = linear_logprob_builds.traffic(N, W, H, 2, launch, True, powers_too, True)
        assert sum(asked) == stated["moved"]
    for repair in (False, True):
        asked.clear()
        linear_powers_(*matrices, targets, 0, logsumexp, logps, powers, bias=bias, repair=repair)
        stated = linear_logprob_builds.powers_traffic(N, W, H, launch, bias=True, repair=repair)
        assert sum(asked) == stated["moved"]
    asked.clear()
    scale_rows_(matrices[0], matrices[0], logsumexp, logps, 1.0)
    block = linear_powers.SCALE_LAUNCH["cuda"].block
    assert sum(asked) == linear_logprob_builds.scale_traffic(N, H, block)["moved"]


@pytest.mark.parametrize("case", ["sigmoid", "sums", "lengths", "kto", "mismatched"])
def test_preference(asked, case):
    N, offsets = 300, torch.tensor([0, 100, 130, 131, 300])
    weights = {"token_weights": torch.ones(N), "example_weights": torch.ones(2)}
    labels, kl = torch.ones(4, dtype=torch.bool), torch.zeros(())
    terms, tensors = {
        "sigmoid": ([Term("sigmoid")], weights),
        "sums": ([Term("sigmoid"), Term("sft")], {}),
        "lengths": ([Term("ipo", 1.0, True)], {"lengths": torch.ones(4)}),
        "kto": ([Term("kto")], {"is_desirable": labels, "kl": kl}),
        "mismatched": ([Term("kto")], {"is_desirable": labels[:2]}),
    }[case]
    options = PreferenceOptions(0.1)
    preference_forward(
        torch.zeros(N), torch.zeros(4), offsets, terms=terms, options=options, **tensors
    )
    both = case == "sigmoid"
    flags = (both, both, case == "lengths", case == "kto", case == "mismatched")
    launch = preference.PREFERENCE_LAUNCH["cuda"]
    constexprs = preference._constexprs(terms, options, *flags, launch)
    assert sum(asked) == preference.traffic(N, 4, constexprs)["moved"]


def test_ema(asked):
    size = 2 * ema._CHUNK + 5
    ema_update_([torch.zeros(size, dtype=HALF)], [torch.ones(size)], 0.3, rounding="stochastic")
    assert sum(asked) == ema.traffic(size, 16, 32)["moved"]


def test_lora_merge(asked):
    R, C, rank = 70, 67, 5
    tensors = [torch.ones(R, C, dtype=HALF), torch.ones(R, C, dtype=HALF)]
    factors = torch.ones(rank, C), torch.ones(R, rank)
    lora_merge_(*tensors, *factors, 1.0, 0.3, rounding="nearest")
    stated = lora_merge.traffic(R, C, rank, 2, 4, lora_merge.LORA_LAUNCH["sm_80"])
    assert sum(asked) == stated["moved"]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(35, 300), (20, 8400)])
def test_adafactor(asked, shape, scaled):
    R, C = shape
    weight, one = torch.ones(R, C, dtype=HALF), torch.zeros(())
    options = AdafactorOptions(0.1, 2, -0.8, 1e-30, scale=scaled)
    squares = torch.ones(R), torch.ones(C)
    adafactor_step_(weight, weight.clone(), squares, one, torch.zeros(1), one.clone(), options)
    assert sum(asked) == sum(
        t["moved"] for t in optimizer_builds.adafactor_traffic(R, C, 2, scaled)
    )


@pytest.mark.parametrize("state_size", [2, 4])
def test_adamw(asked, state_size):
    size = adamw._CHUNK + 40
    weight = torch.ones(size, dtype=HALF)
    states = torch.ones(2, size, dtype=HALF if state_size == 2 else torch.float32)
    numbers = torch.zeros(()), torch.zeros(())
    adamw_step_(weight, weight.clone(), *states, *numbers, AdamWOptions(0.1))
    assert sum(asked) == sum(
        t["moved"] for t in optimizer_builds.adamw_traffic(size, 2, state_size)
    )
