"""Head and loss as one node by Triton, beside the two calls in PyTorch."""

import pytest
import torch

from tests.ops import test_linear_preference as plain
from tralign_fast import LOSSES, linear_preference_loss
from tralign_fast.ops import logprobs
from tralign_kernels import linear_logprob, linear_powers
from tralign_kernels.launch import DotLaunch


def compare(needs=(True, True, True), **options):
    inputs = plain.make(plain.N)
    ours = plain.run(linear_preference_loss, inputs, needs, backend="triton", **options)
    plain.assert_same(ours, plain.run(plain.in_two, inputs, needs, backend="torch", **options))


@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if spec.kernel])
def test_every_loss(name, device) -> None:
    compare(loss=name, **plain.wanted(name))


@pytest.mark.parametrize("index", range(3))
def test_each_gradient_alone(index, device) -> None:
    needs = [i == index for i in range(3)]
    compare(needs, loss="dpo", beta=0.3, logits_budget_mb=0)


def test_a_sum_of_losses_scaled(device) -> None:
    compare(
        loss=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5], beta=0.3, factor=-3.0
    )


def test_no_scored_token(device) -> None:
    inputs = plain.make(0, offsets=[0] * 5)
    options = {"loss": "dpo", "beta": 0.3}
    ours = plain.run(linear_preference_loss, inputs, backend="triton", **options)
    plain.assert_same(ours, plain.run(plain.in_two, inputs, backend="torch", **options))


def test_powers_may_be_kept(device, monkeypatch) -> None:
    """The coefficients of the loss take the factor's place of the log-probs' gradients."""
    launch = DotLaunch(rows=32, columns=128, depth=32, num_warps=4, num_stages=2)
    for module, table in (
        (linear_logprob, "POWERS_LAUNCH"), (linear_powers, "POWERS_LAUNCH"),
    ):  # fmt: skip
        monkeypatch.setattr(module, table, dict.fromkeys(getattr(module, table), (launch,)))
    asked = []
    own = logprobs.powers.keeps_powers
    monkeypatch.setattr(
        logprobs.powers, "keeps_powers", lambda *a: asked.append(own(*a)) or asked[-1]
    )
    g = torch.Generator().manual_seed(0)
    inputs = plain.make(plain.N)
    inputs[0] = torch.randn(plain.N, 32, generator=g).to(device, torch.bfloat16)
    inputs[1] = (0.4 * torch.randn(304, 32, generator=g)).to(device, torch.bfloat16)
    inputs[2] = torch.randn(304, generator=g).to(device, torch.bfloat16)
    options = {"loss": "dpo", "beta": 0.3, "factor": 0.5}
    out, grads = plain.run(
        linear_preference_loss, inputs, backend="triton", kept="powers", **options
    )
    other, others = plain.run(plain.in_two, inputs, backend="torch", **options)
    assert asked == [True, False]  # the node, and the two calls
    torch.testing.assert_close(out.loss, other.loss, rtol=1e-3, atol=0)
    for a, b in zip(grads, others, strict=True):
        assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()
