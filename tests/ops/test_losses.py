import math

import pytest
import torch
import torch.nn.functional as F

from tralign_fast import LOSSES, dpo_loss, ipo_loss, kto_loss, preference_loss

B = 7


@pytest.fixture
def logps():
    torch.manual_seed(0)
    return [(-50 + 10 * torch.randn(B)).requires_grad_(i < 2) for i in range(4)]


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_equation(logps, beta, smoothing):
    chosen, rejected, ref_chosen, ref_rejected = (t.double() for t in logps)
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)
    p = torch.sigmoid(beta * delta)
    expected = (-(1 - smoothing) * p.log() - smoothing * (1 - p).log()).mean()
    out = dpo_loss(*logps, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.chosen_rewards, beta * (logps[0] - logps[2]).detach())
    torch.testing.assert_close(out.rejected_rewards, beta * (logps[1] - logps[3]).detach())


def test_dpo_gradient_is_minus_beta_sigma(logps):
    dpo_loss(*logps, beta=0.3).loss.backward()
    delta = (logps[0] - logps[2]) - (logps[1] - logps[3])
    expected = -0.3 * torch.sigmoid(-0.3 * delta.detach()) / B
    torch.testing.assert_close(logps[0].grad, expected)
    torch.testing.assert_close(logps[1].grad, -expected)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ipo_is_the_equation(logps, beta):
    out = ipo_loss(*logps, beta=beta)
    delta = (logps[0] - logps[2]) - (logps[1] - logps[3])
    torch.testing.assert_close(out.loss, ((delta - 1 / (2 * beta)) ** 2).mean())
    out.loss.backward()
    torch.testing.assert_close(logps[0].grad, 2 * (delta.detach() - 1 / (2 * beta)) / B)


@pytest.mark.parametrize("kl", [-3.0, 0.0, 2.5])
def test_kto_is_the_equation(logps, kl):
    policy, _, reference, _ = logps
    label = torch.tensor([True, False, True, True, False, False, True])
    out = kto_loss(
        policy,
        reference,
        label,
        torch.tensor(kl),
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    expected = []
    for r, good in zip((policy - reference).tolist(), label.tolist(), strict=True):
        z = max(kl, 0.0)
        value = 1 / (1 + math.exp(-0.2 * (r - z if good else z - r)))
        weight = 1.5 if good else 0.5
        expected.append(weight - weight * value)
    assert out.loss.item() == pytest.approx(sum(expected) / B, rel=1e-5)
    assert out.chosen_rewards.isnan().tolist() == (~label).tolist()
    assert out.rejected_rewards.isnan().tolist() == label.tolist()
    out.loss.backward()
    assert (policy.grad[label] < 0).all()
    assert (policy.grad[~label] > 0).all()


def test_no_gradient_reaches_the_reference_or_the_kl(logps):
    reference = [t.detach().requires_grad_() for t in logps[2:]]
    dpo_loss(*logps[:2], *reference, beta=0.1).loss.backward()
    assert all(t.grad is None for t in reference)
    kl = torch.tensor(1.0, requires_grad=True)
    label = torch.ones(B, dtype=torch.bool)
    kto_loss(logps[0], reference[0], label, kl, beta=0.1).loss.backward()
    assert kl.grad is None
    assert reference[0].grad is None


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_half_precision_inputs_are_computed_in_fp32(name, logps):
    half = [t.detach().bfloat16() for t in logps]
    out = LOSSES[name].function(*half, beta=0.1)
    expected = LOSSES[name].function(*[t.float() for t in half], beta=0.1)
    assert out.loss.dtype == torch.float32
    assert out.loss == expected.loss


def test_extreme_margins_stay_finite():
    big = torch.tensor([1e4], requires_grad=True)
    zero = torch.zeros(1)
    for sign in (1, -1):
        out = dpo_loss(sign * big, zero, zero, zero, beta=1.0)
        grad = torch.autograd.grad(out.loss, big)[0]
        assert torch.isfinite(out.loss)
        assert torch.isfinite(grad).all()
        torch.testing.assert_close(out.loss, F.softplus(torch.tensor(-sign * 1e4)))


def test_names():
    assert LOSSES["sigmoid"] is LOSSES["dpo"]
    assert not LOSSES["kto"].paired
    assert LOSSES["ipo"].length_normalized


def test_bad_arguments_say_what_was_expected(logps):
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        dpo_loss(logps[0][:3], *logps[1:], beta=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\)"):
        dpo_loss(*logps, beta=0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="bool is_desirable"):
        kto_loss(logps[0], logps[2], torch.ones(B), torch.tensor(0.0), beta=0.1)


def test_preference_loss_sums_packed_tokens():
    """Loss, rewards and the gradient of every token, by the functions it is made of."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 5, 2])
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    tokens = (-torch.rand(11, generator=generator)).requires_grad_()
    reference = torch.randn(4, generator=generator)
    sums = torch.stack([part.sum() for part in tokens.split(lengths.tolist())])
    for normalized in (False, True):
        divisor = lengths if normalized else torch.ones(4)
        direct = ipo_loss(*(sums / divisor).chunk(2), *(reference / divisor).chunk(2), beta=0.2)
        out = preference_loss(
            tokens, reference, offsets, loss="ipo", length_normalized=normalized, beta=0.2
        )
        torch.testing.assert_close(out.loss, direct.loss)
        torch.testing.assert_close(
            out.chosen_rewards, 0.2 * (sums - reference)[:2].detach(), rtol=1e-5, atol=1e-6
        )
        (ours,) = torch.autograd.grad(out.loss, tokens, retain_graph=True)
        (expected,) = torch.autograd.grad(direct.loss, tokens, retain_graph=True)
        torch.testing.assert_close(ours, expected)


def test_preference_loss_names_what_is_wrong():
    logps, reference, offsets = torch.zeros(4), torch.zeros(2), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match="loss must be one of"):
        preference_loss(logps, reference, offsets, loss="hinge", beta=0.1)
    with pytest.raises(ValueError, match="label_smoothing"):
        preference_loss(logps, reference, offsets, loss="ipo", beta=0.1, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"offsets \(S \+ 1,\)"):
        preference_loss(logps, reference, offsets[:2], loss="dpo", beta=0.1)
    with pytest.raises(ValueError, match="needs is_desirable"):
        preference_loss(logps, reference, offsets, loss="kto", beta=0.1)
