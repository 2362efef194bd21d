"""Losses over packed log-probs: against fp64 and tralign_fast.ops.losses, forward and gradient."""

import pytest
import torch

from tralign_fast import LOSSES, logprobs_from_logits, preference_loss
from tralign_kernels import preference, preference_forward, preference_naive

NAN = float("nan")
# of 6 and 24 sequences: one token, none, a block, past it
LENGTHS = {6: [5, 128, 1, 129, 0, 300], 24: [*range(1, 25)]}
KTO = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
CASES = [
    ("dpo", {"beta": 0.1}),
    ("dpo", {"beta": 0.3, "label_smoothing": 0.2}),
    ("ipo", {"beta": 0.1}),
    ("ipo", {"beta": 0.5, "length_normalized": True}),
    ("kto", {"beta": 0.1, **KTO}),
]


def make(sequences, device, loss, seed=0, normalized=False):
    """logps, ref_logps, offsets, and what KTO takes besides."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS[sequences])
    if normalized:
        lengths = lengths.clamp_min(1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    logps = -torch.rand(int(offsets[-1]), generator=generator)
    ref_logps = -lengths / 2 + 3 * torch.randn(sequences, generator=generator)
    labels = torch.rand(sequences, generator=generator) < 0.5
    kto = {"is_desirable": labels.to(device), "kl": torch.tensor(0.7, device=device)}
    return logps.to(device), ref_logps.to(device), offsets.to(device), kto if loss == "kto" else {}


@pytest.mark.parametrize("sequences", LENGTHS)
@pytest.mark.parametrize(("loss", "options"), CASES, ids=str)
def test_against_fp64(device, loss, options, sequences):
    normalized = options.get("length_normalized", False)
    *inputs, kto = make(sequences, device, loss, normalized=normalized)
    actual = preference_forward(*inputs, loss=loss, **options, **kto)
    cpu = [t.cpu() for t in inputs]
    kto = {k: v.cpu() for k, v in kto.items()}
    exact = preference_naive(*cpu, loss=loss, **options, **kto)
    torchs = preference_naive(*cpu, loss=loss, **options, **kto, dtype=torch.float32)
    # the sums of fp32 log-probs have rounded before a loss sees them, which the losses' slopes pass
    # on: an ulp of the largest sum, in the units of each result
    largest = max(cpu[1].abs().max().item(), 150.0)
    for name, got, torch_got, want in zip(exact._fields, actual, torchs, exact, strict=True):
        got = got.cpu()
        assert got.dtype == torch.float32
        assert got.shape == want.shape
        error, torch_error = ((x.double() - want).abs().max() for x in (got, torch_got))
        floor = 2**-24 * (want.abs().max() + largest * sensitivity(name, loss, options, exact))
        assert error <= 2 * torch_error + floor, (name, error, torch_error, floor)


def sensitivity(name, loss, options, exact):
    """How much a result moves with a log-ratio."""
    if name == "accuracy":
        return 0.0
    if name == "gradient":
        return 2.0 if loss == "ipo" else options["beta"] ** 2 * 2
    return options["beta"] if loss != "ipo" or name == "rewards" else exact.loss.sqrt() * 2


@pytest.mark.parametrize(("loss", "options"), CASES, ids=str)
def test_is_the_loss_of_tralign_fast(device, loss, options):
    """Loss, gradient, rewards: `preference_loss` of both backends."""
    normalized = options.get("length_normalized", False)
    logps, ref_logps, offsets, kto = make(24, device, loss, normalized=normalized)
    results = []
    for backend in ("triton", "torch"):
        leaf = logps.clone().requires_grad_()
        out = preference_loss(
            leaf * 1, ref_logps, offsets, loss=loss, backend=backend, **options, **kto
        )
        (3 * out.loss).backward()
        results.append((*out, leaf.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6, equal_nan=True)
    if loss == "dpo":
        chosen, rejected = torch.segment_reduce(logps, "sum", offsets=offsets).chunk(2)
        direct = LOSSES[loss].function(chosen, rejected, *ref_logps.chunk(2), **options)
        torch.testing.assert_close(results[0][0], direct.loss)


def test_one_launch(device, monkeypatch):
    launches, kernel = [], preference._preference_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(preference, "_preference_kernel", Counted())
    *inputs, _ = make(24, device, "dpo")
    first = preference_forward(*inputs, loss="dpo", beta=0.1)
    second = preference_forward(*inputs, loss="dpo", beta=0.1)
    assert launches == [(1,), (1,)]
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [1e-4, 30.0, 400.0])
def test_extreme_margins(device, scale):
    """Losses of 1e-13 keep their digits, of 400 do not overflow; both signs."""
    margins = torch.tensor([1.0, -1.0], device=device) * scale
    logps = torch.cat([margins, torch.zeros(2, device=device)])
    ref_logps, offsets = torch.zeros(4, device=device), torch.arange(5, device=device)
    for pair in (0, 1):
        inputs = (logps[pair::2].contiguous(), ref_logps[:2], offsets[:3])
        got = preference_forward(*inputs, loss="dpo", beta=1.0)
        want = preference_naive(*(t.cpu() for t in inputs), loss="dpo", beta=1.0)
        torch.testing.assert_close(got.loss.cpu().double(), want.loss, rtol=2e-6, atol=1e-44)
        torch.testing.assert_close(
            got.gradient.cpu().double(), want.gradient, rtol=2e-6, atol=1e-44
        )


def test_tokens_of_no_sequence_have_no_gradient(device):
    logps = torch.full((600,), NAN, device=device)
    logps[7:19] = -1.0
    offsets = torch.tensor([7, 9, 13, 13, 19], device=device)
    out = preference_forward(logps, torch.zeros(4, device=device), offsets, loss="dpo", beta=0.5)
    assert out.loss.isfinite()
    assert (out.gradient[:7] == 0).all()
    assert (out.gradient[19:] == 0).all()
    assert (out.gradient[7:13] < 0).all()
    assert (out.gradient[13:19] > 0).all()


def test_nan_spoils_its_pair_only(device):
    *inputs, _ = make(24, device, "dpo")
    inputs[0][0] = NAN  # the first chosen
    out = preference_forward(*inputs, loss="dpo", beta=0.5)
    assert out.loss.isnan()
    spoilt = out.gradient.isnan()
    offsets = inputs[2].tolist()
    assert spoilt[: offsets[1]].all()
    assert spoilt[offsets[12] : offsets[13]].all()
    assert spoilt.sum() == offsets[1] + offsets[13] - offsets[12]


def test_strided_vectors(device):
    logps, ref_logps, offsets, _ = make(6, device, "dpo")
    spread = [t.repeat_interleave(2)[::2] for t in (logps, ref_logps, offsets)]
    assert all(not t.is_contiguous() for t in spread)
    want = preference_forward(logps, ref_logps, offsets, loss="dpo", beta=0.5)
    got = preference_forward(*spread, loss="dpo", beta=0.5)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("loss", "options"), CASES, ids=str)
def test_from_logits(device, loss, options):
    """A trainer's logits: read once, and overwritten by their gradient."""
    logps, ref_logps, offsets, kto = make(24, device, loss)
    torch.manual_seed(0)
    source = torch.randn(len(logps), 50, device=device)
    targets = torch.randint(0, 50, (len(logps),), device=device)
    gradients = []
    for backend in ("triton", "torch"):
        leaf = source.clone().requires_grad_()
        logits = leaf * 1
        out = preference_loss(
            logprobs_from_logits(logits, targets, backend=backend),
            ref_logps, offsets, loss=loss, backend=backend, **options, **kto,
        )  # fmt: skip
        out.loss.backward()
        assert logits.detach().equal(leaf.grad)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_no_sequence_and_no_token(device):
    """No tokens at all: a loss of ln 2, as of a policy that is its reference."""
    logps, ref = torch.empty(0, device=device), torch.zeros(2, device=device)
    offsets = torch.zeros(3, dtype=torch.int64, device=device)
    out = preference_forward(logps, ref, offsets, loss="dpo", beta=0.5)
    torch.testing.assert_close(out.loss, torch.tensor(2.0, device=device).log())
    assert out.gradient.shape == (0,)
