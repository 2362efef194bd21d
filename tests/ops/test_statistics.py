"""Statistics that come with the log-probs, against the equations in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import DEVICE
from tralign_fast import linear_logprobs
from tralign_fast.ops.logprobs import linear_logprobs_and_statistics
from tralign_fast.ops.statistics import STATISTICS
from tralign_fast.ops.transform import LogitTransform

PLAIN = LogitTransform()
TRANSFORMS = [PLAIN, LogitTransform(2.0), LogitTransform(0.7, 5.0, 0.8)]


def make(N: int, V: int, dtype=torch.float32, spread: float = 1.0):
    """Half of the targets are the likeliest columns."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, 32, generator=g), torch.randn(V, 32, generator=g) * 0.3
    bias = torch.randn(V, generator=g)
    hidden, weight, bias = ((t * spread**0.5).to(DEVICE, dtype) for t in (hidden, weight, bias))
    targets = torch.randint(0, V, (N,), generator=g).to(DEVICE)
    targets[::2] = (hidden.float() @ weight.float().t() + bias.float()).argmax(1)[::2]
    return hidden, weight, bias, targets


def exact(z: Tensor, targets: Tensor) -> dict[str, Tensor]:  # z in fp64
    log_p = z.log_softmax(1)
    return {
        "entropy": torch.special.entr(log_p.exp()).sum(1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(1),
        "mean_logits": z.mean(1),
        "is_top1": z.argmax(1) == targets,
    }


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("budget", [0, 1024])
@pytest.mark.parametrize("spread", [1.0, 60.0])  # logsumexps in and out of the ordinary
@pytest.mark.parametrize("N", [70, 9])  # more and fewer rows than hidden units
def test_values(transform, budget, spread, N):
    hidden, weight, bias, targets = make(N, 999, spread=spread)
    logps, found = linear_logprobs_and_statistics(
        hidden.requires_grad_(), weight, targets, STATISTICS, bias=bias, transform=transform,
        logits_budget_mb=budget,
    )  # fmt: skip
    options = {**transform.options(), "logits_budget_mb": budget}
    assert logps.equal(linear_logprobs(hidden, weight, targets, bias=bias, **options))
    z = transform.apply_(hidden.detach().double() @ weight.double().t() + bias.double())
    expected = exact(z, targets)
    assert list(found) == list(STATISTICS)
    eager = exact(transform.apply_(hidden.detach() @ weight.t() + bias).double(), targets)
    for name, value in found.items():
        assert not value.requires_grad
        if name != "is_top1":
            error, own = ((v - expected[name]).abs().max() for v in (value, eager[name]))
            assert error <= 2 * own + 1e-5, name
    if transform.softcap is None or spread == 1.0:  # else most scores are the cap, in fp32
        assert 0 < int(found["is_top1"].sum()) < N
        assert found["is_top1"].equal(expected["is_top1"])


@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_bf16(spread):
    """Of logits as they are rounded, but for their mean, which is taken before."""
    hidden, weight, bias, targets = make(70, 999, torch.bfloat16, spread)
    _, found = linear_logprobs_and_statistics(hidden, weight, targets, STATISTICS, bias=bias)
    z = torch.nn.functional.linear(hidden, weight, bias).double()
    expected = exact(z, targets)
    assert found["is_top1"].equal(expected["is_top1"])
    for name in ("entropy", "log_sum_sq_probs"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    size = z.abs().mean(1) * 2**-8
    assert ((found["mean_logits"] - expected["mean_logits"]).abs() <= size).all()


@pytest.mark.parametrize("budget", [0, 1024])
def test_masked_columns(budget):
    """Columns of -inf, whole tiles among them, have no probability."""
    hidden, weight, bias, targets = make(40, 1500)
    bias[:300], bias[700:] = -torch.inf, -torch.inf
    targets = targets.clamp(300, 699)
    names = ("entropy", "log_sum_sq_probs", "is_top1")
    _, found = linear_logprobs_and_statistics(
        hidden, weight, targets, names, bias=bias, logits_budget_mb=budget
    )
    expected = exact(hidden.double() @ weight.double()[300:700].t() + bias[300:700], targets - 300)
    for name in names[:2]:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    assert found["is_top1"].equal(expected["is_top1"])


def test_of_equal_scores_the_first_is_the_largest():
    """As argmax, and TRL: also where the two lie in different tiles."""
    hidden = torch.ones(3, 1, device=DEVICE)
    weight = torch.zeros(1024, 1, device=DEVICE)
    weight[[100, 150, 900]] = 1.0
    targets = torch.tensor([100, 150, 900], device=DEVICE)
    _, found = linear_logprobs_and_statistics(
        hidden, weight, targets, ["is_top1"], logits_budget_mb=0
    )
    assert found["is_top1"].tolist() == [True, False, False]


def test_no_row_and_unknown_names():
    hidden, weight, _, targets = make(4, 50)
    _, found = linear_logprobs_and_statistics(hidden[:0], weight, targets[:0], STATISTICS)
    assert [len(found[name]) for name in STATISTICS] == [0] * 4
    with pytest.raises(ValueError, match=r"statistics are entropy, .*, got perplexity"):
        linear_logprobs_and_statistics(hidden, weight, targets, ["perplexity"])


def test_registered_with_torch_library():
    from tralign_fast.ops import head_operator

    hidden, weight, _, targets = make(6, 20)
    args = (hidden, weight, targets, None, [1.0, 0.0, 1.0], "torch", torch.float32, 8, 8, 0.0)
    torch.library.opcheck(
        head_operator.linear_logprobs_op, (*args, "entropy is_top1"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
