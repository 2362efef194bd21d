"""FusedLinear*Loss against the installed Liger: values, auxiliary outputs and gradients."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from tralign_fast.integrations.liger import LOSS_TYPES, FusedLinearDPOLoss, FusedLinearKTOLoss

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
IGNORE = -100
# Liger's own tests of these losses: atol, rtol
LIGERS = {torch.float32: (1e-5, 5e-4), torch.bfloat16: (5e-2, 5e-1)}
OURS = {"rtol": 1e-5, "atol": 1e-6}


def assert_close(a, b, dtype):
    """Liger's tolerances, and in fp32 1e-5 of the tensor's largest entry, which is tighter."""
    atol, rtol = LIGERS[dtype]
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol, check_dtype=False)
    if dtype == torch.float32:
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1e-1)


def tensors(sequences=6, length=9, hidden=16, vocab=53, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    target = torch.randint(0, vocab, (sequences, length), generator=g)
    target[:, : length // 3] = IGNORE  # a prompt
    target[1, -2:] = IGNORE  # padding
    return {
        "input": rand(sequences, length, hidden),
        "weight": rand(vocab, hidden) * 0.5,
        "target": target,
        "bias": rand(vocab),
        "ref_input": rand(sequences, length, hidden),
        "ref_weight": rand(vocab, hidden) * 0.5,
        "ref_bias": rand(vocab),
        "labels": torch.rand(sequences, generator=g) < 0.5,
    }


def call(module, t, *, bias=True, kl=None, frozen=()):
    """(loss, aux, gradients of input, weight, bias)."""
    leaves = {
        name: t[name].clone().requires_grad_(name not in frozen)
        for name in ("input", "weight", "bias")
    }
    ref = {}
    if module.use_ref_model:
        ref = {k: t[k] for k in ("ref_input", "ref_weight")}
        ref["ref_bias"] = t["ref_bias"] if bias else None
    own_bias = leaves["bias"] if bias else None
    if "KTO" in type(module).__name__:
        loss, aux = module(
            leaves["input"], leaves["weight"], t["target"], own_bias, t["labels"], kl=kl, **ref
        )
    else:
        loss, aux = module(leaves["weight"], leaves["input"], t["target"], own_bias, **ref)
    (loss * 1.7).backward()  # a gradient that is not 1
    return loss.detach(), aux, {name: leaf.grad for name, leaf in leaves.items()}


def compare(ours, theirs, t, dtype=torch.float32, **kwargs):
    loss, aux, grads = call(ours, t, **kwargs)
    expected, expected_aux, expected_grads = call(theirs, t, **kwargs)
    assert_close(loss, expected, dtype)
    assert loss.dtype == expected.dtype == torch.float32
    assert len(aux) == len(expected_aux)
    for a, b in zip(aux, expected_aux, strict=True):
        assert a.shape == torch.as_tensor(b).shape
        assert not a.requires_grad
        assert_close(a, torch.as_tensor(b), dtype)
    for name, grad in grads.items():
        other = expected_grads[name]
        assert (grad is None) == (other is None), name
        if grad is not None:
            assert grad.dtype == other.dtype
            assert_close(grad, other, dtype)


def options(loss_type):
    return {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.2}}.get(
        loss_type, {}
    )


LIGERS_TYPES = sorted(chunked_loss.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES)


@pytest.mark.parametrize("loss_type", LIGERS_TYPES)
def test_dpo_equals_liger_for_every_loss_type(loss_type):
    kwargs = {"loss_type": loss_type, "compiled": False, **options(loss_type)}
    compare(FusedLinearDPOLoss(**kwargs), chunked_loss.LigerFusedLinearDPOLoss(**kwargs), tensors())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"beta": 0.4},
        {"compute_nll_loss": True, "alpha": 0.3},
        {"average_log_prob": True},
        {"average_log_prob": True, "compute_nll_loss": True},
        {"use_ref_model": False},
        {"chunk_size": 3},
        {"ignore_index": 7, "label_smoothing": 0.1, "discopop_tau": 0.2},
        {"loss_type": "discopop", "discopop_tau": 0.3},
    ],
    ids=str,
)
def test_dpo_options_equal_liger(kwargs, bias):
    t = tensors(seed=1)
    if "ignore_index" in kwargs:
        t["target"] = t["target"].masked_fill(t["target"] == IGNORE, kwargs["ignore_index"])
    kwargs = {"compiled": False, **kwargs}
    ours, theirs = FusedLinearDPOLoss(**kwargs), chunked_loss.LigerFusedLinearDPOLoss(**kwargs)
    compare(ours, theirs, t, bias=bias)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("input",)])
def test_frozen_tensors_get_no_gradient(frozen):
    kwargs = {"compiled": False}
    compare(
        FusedLinearDPOLoss(**kwargs), chunked_loss.LigerFusedLinearDPOLoss(**kwargs),
        tensors(), frozen=frozen,
    )  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("kl", [None, 0.7, -0.4, 1])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"use_ref_model": True}, {"use_ref_model": True, "average_log_prob": True, "beta": 0.3}],
    ids=str,
)
def test_kto_equals_liger(kwargs, kl, as_tensor, bias):
    kwargs = {"compiled": False, **kwargs}
    ours, theirs = FusedLinearKTOLoss(**kwargs), chunked_loss.LigerFusedLinearKTOLoss(**kwargs)
    given = torch.tensor([kl]) if as_tensor and kl is not None else kl
    compare(ours, theirs, tensors(seed=2), bias=bias, kl=given)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_bf16_within_ligers_tolerances(kind):
    kwargs = {"compiled": False, "use_ref_model": True}
    ours = {"DPO": FusedLinearDPOLoss, "KTO": FusedLinearKTOLoss}[kind](**kwargs)
    theirs = getattr(chunked_loss, f"LigerFusedLinear{kind}Loss")(**kwargs)
    t = tensors(dtype=torch.bfloat16)
    compare(
        ours, theirs, t, dtype=torch.bfloat16, kl=torch.tensor([0.2]) if kind == "KTO" else None
    )


def test_options_and_arguments_have_ligers_names_and_defaults():
    for ours, theirs in (
        (FusedLinearDPOLoss, chunked_loss.LigerFusedLinearDPOLoss),
        (FusedLinearKTOLoss, chunked_loss.LigerFusedLinearKTOLoss),
    ):
        for method in ("__init__", "forward"):
            a, b = (inspect.signature(getattr(c, method)).parameters for c in (ours, theirs))
            assert [(p.name, p.default) for p in a.values()] == [
                (p.name, p.default) for p in b.values()
            ]
    assert {*LIGERS_TYPES} <= {*LOSS_TYPES}


def test_ipo_equals_autograd():
    t = tensors(seed=3)
    loss, aux, grads = call(FusedLinearDPOLoss(loss_type="ipo", beta=0.2), t)
    leaves = {n: t[n].double().requires_grad_() for n in ("input", "weight", "bias")}

    def means(hidden, weight, bias):
        logp = F.linear(hidden, weight, bias).log_softmax(-1)
        mask = t["target"] != IGNORE
        picked = logp.gather(-1, t["target"].clamp(min=0)[..., None])[..., 0]
        return (picked * mask).sum(1) / mask.sum(1)

    ref = means(*(t[n].double() for n in ("ref_input", "ref_weight", "ref_bias")))
    chosen, rejected = (means(*leaves.values()) - ref).chunk(2)
    expected = ((chosen - rejected - 1 / (2 * 0.2)) ** 2).mean()
    (expected * 1.7).backward()
    torch.testing.assert_close(loss.double(), expected.detach(), **OURS)
    for name, leaf in leaves.items():
        torch.testing.assert_close(grads[name].double(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert [a.shape for a in aux] == [(3,), (3,), (), (), (), (3,), (3,)]


ONES = {"hidden": torch.ones(2, 4, 2), "weight": torch.ones(3, 2)}
TARGET = torch.ones(2, 4, dtype=torch.int64)


def kto_with(convert):
    t = tensors()
    call(FusedLinearKTOLoss(), {**t, "labels": convert(t["labels"])})


def dpo(weight=ONES["weight"], hidden=ONES["hidden"], **options):
    FusedLinearDPOLoss(**options)(weight, hidden, TARGET)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: FusedLinearDPOLoss(loss_type="kto"),
            "expected one of dpo, sigmoid, ipo",
        ),
        (
            lambda: FusedLinearDPOLoss(loss_type="exo_pair"),
            r"number in \(0, 1\) for exo",
        ),
        (lambda: FusedLinearDPOLoss(loss_type="sgmoid"), "did you mean 'sigmoid'"),
        (
            lambda: FusedLinearDPOLoss(loss_type="robust", label_smoothing=0.5),
            r"label_smoothing: expected a number in \[0, 0.5\) for robust",
        ),
        (lambda: call(FusedLinearDPOLoss(), tensors(5)), "as many rejected, got 5"),
        (lambda: dpo(), "needs ref_input and ref_weight"),
        (lambda: dpo(hidden=torch.ones(8, 2)), r"expected hidden states \(S, T, H\)"),
        (
            lambda: dpo(torch.ones(3, 2, device="meta"), use_ref_model=False),
            "tensors on several devices",
        ),
        (
            lambda: FusedLinearKTOLoss()(*ONES.values(), TARGET),
            r"expected bool preference_labels \(2,\), got None",
        ),
        (lambda: call(FusedLinearKTOLoss(), tensors(), kl=torch.ones(6)), "kl: expected one num"),
        *(
            (lambda kl=kl: call(FusedLinearKTOLoss(), tensors(), kl=kl), "kl: expected a tensor of")
            for kl in ([0.3], "0.3", math.nan, -math.inf, True, torch.tensor(True))
        ),
        *(
            (
                lambda convert=convert: kto_with(convert),
                r"expected bool preference_labels \(6,\), got (list|ndarray|torch)",
            )
            for convert in (
                torch.Tensor.tolist,
                torch.Tensor.numpy,
                torch.Tensor.int,
                torch.Tensor.float,
                lambda labels: labels.int() * 2 - 1,
                lambda labels: labels[:3],
                lambda labels: labels[:, None],
            )
        ),
        *(
            (
                lambda alpha=alpha: FusedLinearDPOLoss(alpha=alpha, compute_nll_loss=True),
                "alpha: expected a number ≥ 0 and finite, got",
            )
            for alpha in (math.nan, math.inf, -1.0, "1", None, [1.0], True)
        ),
        (lambda: FusedLinearDPOLoss(label_smoothing="a"), r"label_smoothing: .* in \[0, 1\], got"),
        (lambda: FusedLinearDPOLoss(discopop_tau=0.0), "discopop_tau: expected a number > 0"),
        (lambda: FusedLinearDPOLoss(ignore_index=None), "ignore_index: expected an int, got None"),
        (lambda: FusedLinearKTOLoss(ignore_index=1.5), "ignore_index: expected an int, got 1.5"),
        (lambda: FusedLinearDPOLoss(compute_nll_loss="no"), "compute_nll_loss: expected True or"),
        (lambda: FusedLinearKTOLoss(average_log_prob="no"), "average_log_prob: expected True or"),
        *(
            (
                lambda name=name, value=value: call(
                    FusedLinearDPOLoss(), {**tensors(), name: value}
                ),
                ": expected a tensor, got list",
            )
            for name, value in (("ref_input", [[1.0]]), ("ref_weight", [1.0]), ("ref_bias", [1.0]))
        ),
        (lambda: dpo(weight=[[1.0]], use_ref_model=False), "weight: expected a tensor, got list"),
        (lambda: dpo(hidden=None, use_ref_model=False), "hidden states: expected a tensor, got No"),
    ],
)
def test_bad_input_is_one_line(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
