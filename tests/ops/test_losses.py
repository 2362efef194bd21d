"""The equations of losses, against themselves in fp64."""

import dataclasses
import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F

from tralign_fast import LOSSES, dpo_loss, ipo_loss, kto_loss
from tralign_fast.ops.sequence_losses import pair_loss

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


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_half_precision_inputs_are_computed_in_fp32(loss, logps):
    half = [t.detach().bfloat16() for t in logps]
    out = loss(*half, beta=0.1)
    assert out.loss.dtype == torch.float32
    assert out.loss == loss(*[t.float() for t in half], beta=0.1).loss


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
    with pytest.raises(ValueError, match=r"label_smoothing: expected a number in \[0, 0.5\)"):
        dpo_loss(*logps, beta=0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="bool is_desirable"):
        kto_loss(logps[0], logps[2], torch.ones(B), torch.tensor(0.0), beta=0.1)
    label = torch.ones(B, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"kl: expected one number, .* got \(2,\)"):
        kto_loss(logps[0], logps[2], label, torch.zeros(2), beta=0.1)
    for beta in (0, -0.1, math.nan, math.inf, True, "0.1"):
        with pytest.raises(ValueError, match="beta: expected a number > 0"):
            ipo_loss(*logps, beta=beta)


# The equations again, in fp64 and by themselves, of (chosen, rejected, β, ε).
def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


EQUATIONS = {
    "sigmoid": lambda c, r, b, e: (
        -(1 - e) * log_sigmoid(b * (c - r)) - e * log_sigmoid(-b * (c - r))
    ),
    "robust": lambda c, r, b, e: (
        (e * log_sigmoid(-b * (c - r)) - (1 - e) * log_sigmoid(b * (c - r))) / (1 - 2 * e)
    ),
    "hinge": lambda c, r, b, e: (1 - b * (c - r)) * ((1 - b * (c - r)) > 0),
    "ipo": lambda c, r, b, e: ((c - r) - 1 / (2 * b)) ** 2,
    "exo_pair": lambda c, r, b, e: sum(
        q * (q / p).log()
        for q, p in ((torch.sigmoid(b * (c - r)), 1 - e), (torch.sigmoid(b * (r - c)), e))
    ),
    "nca_pair": lambda c, r, b, e: (
        -log_sigmoid(b * c) - (log_sigmoid(-b * c) + log_sigmoid(-b * r)) / 2
    ),
    "bco_pair": lambda c, r, b, e: -log_sigmoid(b * c) - log_sigmoid(-b * r),
    "sppo_hard": lambda c, r, b, e: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "aot_unpaired": lambda c, r, b, e: EQUATIONS["sigmoid"](c.sort().values, r.sort().values, b, e),
    "apo_zero": lambda c, r, b, e: 1 / (1 + (b * c).exp()) + 1 / (1 + (-b * r).exp()),
    "apo_down": lambda c, r, b, e: 1 / (1 + (-b * c).exp()) + 1 / (1 + (b * (c - r)).exp()),
    "discopop": lambda c, r, b, e: torch.lerp(
        -log_sigmoid(b * (c - r)), (-b * (c - r)).exp(), torch.sigmoid(b * (c - r) / 0.05)
    ),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_loss_of_pairs_is_its_equation(name, logps):
    options = {"beta": 0.3}
    if LOSSES[name].option("label_smoothing"):
        options["label_smoothing"] = 0.2
    out = pair_loss(name, *logps, **options)
    exact = [t.detach().double().requires_grad_(i < 2) for i, t in enumerate(logps)]
    chosen, rejected = exact[0] - exact[2], exact[1] - exact[3]
    expected = EQUATIONS[name](chosen, rejected, 0.3, 0.2).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(out.loss, logps[:2])
    theirs = torch.autograd.grad(expected, exact[:2])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_every_loss_of_pairs_has_an_equation_here():
    of_batches = {"aot", "hypo", "sft"}  # tests of preference_loss have them
    names = {n for n, s in LOSSES.items() if s.paired} - of_batches - {"dpo", "sigmoid_norm"}
    assert names == EQUATIONS.keys()


def test_the_registry_says_what_anyone_asks():
    for name, spec in LOSSES.items():
        assert spec.title, name
        assert "eprint        = {" + spec.paper.arxiv in spec.paper.bibtex
        assert spec.options[0].name == "beta"
        assert spec.function.__doc__, name
        for option in spec.options:
            assert option.default in option.range, (name, option.name)
            assert option.help.endswith("."), (name, option.name)
        assert not (spec.kernel and spec.couples_examples), name


def test_the_registry_has_every_loss_of_trl():
    from trl.trainer import dpo_trainer, kto_config

    source = inspect.getsource(dpo_trainer.DPOTrainer._compute_loss)
    theirs = set(re.findall(r'loss_type == "(\w+)"', source))
    (field,) = (f for f in dataclasses.fields(kto_config.KTOConfig) if f.name == "loss_type")
    theirs |= set(field.metadata["choices"])
    assert len(theirs) >= 17
    assert theirs <= LOSSES.keys()
