"""Losses over packed log-probs: against fp64 and tralign_fast.ops.losses, forward and gradient."""

from itertools import product

import pytest
import torch

from tests.diagonal import diagonal
from tests.kernels.conftest import INTERPRETED
from tralign_fast import LOSSES as REGISTRY
from tralign_fast import dpo_loss, logprobs_from_logits, preference_loss
from tralign_fast.ops.segments import segment_sums
from tralign_kernels import (
    PreferenceOptions,
    Term,
    preference,
    preference_forward,
    preference_naive,
)
from tralign_kernels.preference_terms import (
    DIVERGENCES,
    LOSSES,
    METRICS,
    PAIRED,
    SCORED,
    UNPAIRED,
)

NAN = float("nan")
# a pair; two; one token, none, those of an iteration, one more; more pairs than are read side by
# side
LENGTHS = {2: [130, 7], 4: [3, 1, 2, 5], 6: [5, 128, 1, 129, 0, 300], 38: [*range(1, 39)]}
KTO = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
SMOOTH = {"beta": 0.3, "label_smoothing": 0.2}
MPO = [Term("sigmoid", 0.8), Term("bco_pair", 0.2), Term("sft", 1.0)]
FOUR = [Term("exo_pair", 0.5, True), Term("ipo", 2.0, True), Term("hinge"), Term("discopop", 0.1)]
ALPHA = {"f_divergence": "alpha_divergence"}
# terms, options, names of the tensors besides
CASES = [
    *(([Term(loss)], SMOOTH | KTO, ()) for loss in (*PAIRED, *UNPAIRED)),
    *(([Term(loss, 0.7, True)], SMOOTH | KTO, ()) for loss in (*PAIRED, *UNPAIRED)),
    ([Term("sigmoid")], {"beta": 0.1}, ()),
    ([Term("discopop")], {"beta": 0.1, "discopop_tau": 2.0}, ()),
    (MPO, {"beta": 0.1}, ()),
    (MPO, {"beta": 0.1}, ("token_weights", "nll_tokens")),
    (FOUR, SMOOTH, ("example_weights",)),
    (FOUR, SMOOTH | ALPHA, ("token_weights", "example_weights")),
    (FOUR, SMOOTH, ("lengths",)),
    ([Term("apo_zero_unpaired", 1.0, True)], {"beta": 0.1}, ("lengths",)),
    ([Term("sft"), Term("apo_down", -0.5), Term("sft", 0.2)], {"beta": 0.1}, ("nll_tokens",)),
    *(
        ([Term(loss, 1.0, loss == "ipo"), Term("sft")], SMOOTH | {"f_divergence": name}, ())
        for loss, name in product(SCORED, DIVERGENCES[1:])
    ),
    ([Term("sigmoid")], {"beta": 0.1, **ALPHA, "f_alpha": 1.5}, ()),
    ([Term("sigmoid")], {"beta": 0.1, **ALPHA, "f_alpha": 1.0}, ()),
    ([Term("kto")], {"beta": 0.1, **KTO}, ("kl",)),
    ([Term("kto")], {"beta": 0.1, **KTO}, ("kl", "mismatched", "token_weights")),
    ([Term("kto"), Term("apo_zero_unpaired", 0.5)], {"beta": 0.1}, ("example_weights",)),
]


def make(sequences, device, terms, names=(), seed=0):
    """(logps, ref_logps, offsets), and the tensors and numbers that the terms take besides."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS[sequences])
    if any(term.length_normalized for term in terms):
        lengths = lengths.clamp_min(1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    N = int(offsets[-1])
    logps = -torch.rand(N, generator=generator)
    ref_logps = -lengths / 2 + 3 * torch.randn(sequences, generator=generator)
    unpaired = terms[0].loss in UNPAIRED
    kto = any(term.loss == "kto" for term in terms)
    own = sequences // 2 if kto and ("kl" not in names or "mismatched" in names) else sequences
    examples = own if unpaired else sequences // 2
    others = {
        "token_weights": torch.rand(N, generator=generator),
        "example_weights": torch.rand(examples, generator=generator) + 0.5,
        "lengths": lengths + 1.0,
        "kl": torch.tensor(0.7),
    }
    given = {name: tensor.to(device) for name, tensor in others.items() if name in names}
    if unpaired:
        labels = torch.rand(examples, generator=generator) < 0.5
        given["is_desirable"] = labels.to(device)
    if "nll_tokens" in names:
        given["nll_tokens"] = 77.0
    return (logps.to(device), ref_logps.to(device), offsets.to(device)), given


def forward(*inputs, **options):
    """`preference_forward` with NaN in what it does not write."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        return preference_forward(*inputs, **options)
    finally:
        torch.use_deterministic_algorithms(before)


def cpu(values):
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def name_of(value):
    if isinstance(value, tuple):  # a case
        return "-".join(filter(None, map(name_of, value)))
    if isinstance(value, list):
        return "+".join(t.loss + "_normalized" * t.length_normalized for t in value)
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("case", "sequences"), diagonal(3, CASES, [2, 6, 38]), ids=name_of)
def test_against_fp64(device, case, sequences):
    terms, options, names = case
    inputs, given = make(sequences, device, terms, names)
    options = PreferenceOptions(**options)
    actual = forward(*inputs, terms=terms, options=options, **given)
    inputs, given = [t.cpu() for t in inputs], cpu(given) | {"terms": terms, "options": options}
    exact = preference_naive(*inputs, **given)
    torchs = preference_naive(*inputs, **given, dtype=torch.float32)
    # the sums of fp32 log-probs have rounded before a loss sees them, which it passes on: what half
    # an ulp of the largest sum makes of each result
    ulp = 2**-24 * max(inputs[1].abs().max().item(), 150.0)
    moved = [
        preference_naive(
            inputs[0], inputs[1].double() + ulp * signs.repeat_interleave(sequences // 2),
            inputs[2], **given,
        )
        for signs in torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    ]  # fmt: skip
    for i, (name, want) in enumerate(zip(exact._fields, exact, strict=True)):
        got = actual[i].cpu()
        assert got.dtype == torch.float32
        assert got.shape == want.shape
        error, torch_error = ((x.double() - want).abs().max() for x in (got, torchs[i]))
        floor = max((other[i] - want).abs().max() for other in moved) + 2**-24 * want.abs().max()
        assert error <= 2 * torch_error + floor, (name, error, torch_error, floor)


def test_metrics_by_hand(device):
    """Two pairs, the second ranked wrongly; then the same four as completions with labels."""
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0], device=device)
    ref_logps = torch.tensor([-2.0, -2.0, -2.0, -5.0], device=device)
    offsets = torch.arange(5, device=device)
    options = PreferenceOptions(0.5)
    out = forward(logps, ref_logps, offsets, terms=[Term("ipo")], options=options)
    assert out.rewards.tolist() == [0.5, 0.0, -0.5, 0.5]
    assert out.logps.tolist() == logps.tolist()
    paired = [[0.5, 2], [0.0, 2], [1, 2], [0.5, 2], [-3, 2], [-7, 2], [0, 0]]
    assert out.totals.tolist() == paired
    labels = torch.tensor([True, False, True, True], device=device)
    given = {"is_desirable": labels, "kl": torch.tensor(-3.0, device=device)}
    out = forward(logps, ref_logps, offsets, terms=[Term("kto")], options=options, **given)
    unpaired = [[0.5, 3], [0.0, 1], [0, 0], [0, 0], [-8, 3], [-2, 1], [0, 1]]
    assert out.totals.tolist() == unpaired
    terms = [Term("apo_zero_unpaired")]
    out = forward(logps, ref_logps, offsets, terms=terms, options=options, is_desirable=labels)
    assert out.totals.tolist() == [*unpaired[:6], [0, 0]]
    assert len(METRICS) == 7


def test_kl_inside_is_the_mean_log_ratio_of_the_mismatched(device):
    terms, options = [Term("kto")], PreferenceOptions(0.1, **KTO)
    (logps, ref_logps, offsets), given = make(38, device, terms)
    for shift in (2.0, -2.0):  # of the mean log-ratio: above 0, and clamped
        ref = ref_logps - shift
        inside = forward(logps, ref, offsets, terms=terms, options=options, **given)
        kl = (inside.logps - ref)[19:].mean()
        assert (kl > 0) == (shift > 0)
        outside = forward(logps, ref, offsets, terms=terms, options=options, kl=kl, **given)
        torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-7)
        assert (inside.gradient[offsets[19] :] == 0).all()
        assert (inside.rewards[19:] == 0).all()
        assert inside.totals[6].tolist() == pytest.approx([max(kl.item(), 0), 1])
        # without the mismatched
        own = (logps[: offsets[19]], ref[:19], offsets[:20])
        alone = forward(*own, terms=terms, options=options, kl=kl, **given)
        assert alone.loss.equal(outside.loss)
        assert alone.gradient.equal(outside.gradient[: offsets[19]])
        assert alone.rewards.equal(outside.rewards[:19])


@pytest.mark.parametrize(
    ("name", "other"), [("dpo", "sigmoid"), ("sigmoid_norm", "sigmoid")], ids=str
)
def test_aliases(device, name, other):
    inputs, _ = make(38, device, [Term(name, 1.0, True)])
    options = PreferenceOptions(0.1)
    first = forward(*inputs, terms=[Term(name, 1.0, True)], options=options)
    second = forward(*inputs, terms=[Term(other, 1.0, True)], options=options)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_one_launch(device, monkeypatch, loss):
    launches, kernel = [], preference._preference_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(preference, "_preference_kernel", Counted())
    inputs, given = make(38, device, [Term(loss)])
    options = PreferenceOptions(0.1)
    first = forward(*inputs, terms=[Term(loss)], options=options, **given)
    second = forward(*inputs, terms=[Term(loss)], options=options, **given)
    assert launches == [(1,), (1,)]
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [1e-4, 30.0, 400.0])
def test_extreme_margins(device, scale):
    """Losses of 1e-13 keep their digits, of 400 do not overflow; both signs."""
    margins = torch.tensor([1.0, -1.0], device=device) * scale
    logps = torch.cat([margins, torch.zeros(2, device=device)])
    ref_logps, offsets = torch.zeros(4, device=device), torch.arange(5, device=device)
    given = {"terms": [Term("sigmoid")], "options": PreferenceOptions(1.0)}
    for pair in (0, 1):
        inputs = (logps[pair::2].contiguous(), ref_logps[:2], offsets[:3])
        got = forward(*inputs, **given)
        want = preference_naive(*(t.cpu() for t in inputs), **given)
        torch.testing.assert_close(got.loss.cpu().double(), want.loss, rtol=2e-6, atol=1e-44)
        torch.testing.assert_close(
            got.gradient.cpu().double(), want.gradient, rtol=2e-6, atol=1e-44
        )


@pytest.mark.parametrize(
    ("loss", "scale"),
    diagonal(2, [*PAIRED, *UNPAIRED, "js_divergence", "alpha_divergence"], [1e3, 1e4]),
)
def test_extreme_log_ratios(device, loss, scale):
    """Every pair of ±scale and 0: what is finite in fp64 is finite here, and the same."""
    values = torch.tensor([scale, -scale, 0.0])
    logps = torch.cartesian_prod(values, values).T.reshape(-1).to(device)  # 9 chosen, 9 rejected
    S = len(logps)
    ref_logps, offsets = torch.zeros(S, device=device), torch.arange(S + 1, device=device)
    divergence = {"f_divergence": loss} if loss in DIVERGENCES else {}
    options = PreferenceOptions(0.1, label_smoothing=0.1, f_alpha=1.5, **divergence)
    given = {"terms": [Term("sigmoid" if divergence else loss)], "options": options}
    labels = {"is_desirable": torch.arange(S, device=device) % 2 == 0} if loss in UNPAIRED else {}
    if loss == "kto":
        labels["kl"] = torch.tensor(1.0, device=device)
    got = forward(logps, ref_logps, offsets, **given, **labels)
    want = preference_naive(logps.cpu(), ref_logps.cpu(), offsets.cpu(), **given, **cpu(labels))
    assert want.gradient.isfinite().all()
    torch.testing.assert_close(got.loss.cpu().double(), want.loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.gradient.cpu().double(), want.gradient, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "exo_pair", "discopop"])
def test_a_score_that_overflows_leaves_no_slope(device, loss):
    """A rejected completion of forward KL score 1 - exp(200): the pair is done with."""
    logps = torch.tensor([3.0, -200.0], device=device)
    inputs = (logps, torch.zeros(2, device=device), torch.arange(3, device=device))
    options = PreferenceOptions(0.1, f_divergence="forward_kl", label_smoothing=1e-3)
    if loss in ("sigmoid", "robust"):  # which smoothing would keep at work
        options = PreferenceOptions(0.1, f_divergence="forward_kl")
    got = forward(*inputs, terms=[Term(loss)], options=options)
    assert got.gradient.tolist() == [0.0, 0.0]
    assert got.loss.isfinite()


def test_an_alpha_near_one_keeps_the_digits_of_small_log_ratios(device):
    """exp((α-1)·ρ) - 1 = 3e-5, of which fp32 would keep nine bits."""
    logps = torch.tensor([0.03, -0.02], device=device)
    inputs = (logps, torch.zeros(2, device=device), torch.arange(3, device=device))
    options = PreferenceOptions(50.0, f_divergence="alpha_divergence", f_alpha=1.001)
    got = forward(*inputs, terms=[Term("ipo")], options=options)
    want = preference_naive(*(t.cpu() for t in inputs), terms=[Term("ipo")], options=options)
    torch.testing.assert_close(got.loss.cpu().double(), want.loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.gradient.cpu().double(), want.gradient, rtol=2e-6, atol=0)


def test_tokens_of_no_sequence_have_no_gradient(device):
    logps = torch.full((600,), NAN, device=device)
    logps[7:19] = -1.0
    offsets = torch.tensor([7, 9, 13, 13, 19], device=device)
    given = {"terms": [Term("sigmoid"), Term("sft", 0.1)], "options": PreferenceOptions(0.5)}
    out = forward(logps, torch.zeros(4, device=device), offsets, **given)
    assert out.loss.isfinite()
    assert (out.gradient[:7] == 0).all()
    assert (out.gradient[19:] == 0).all()
    assert (out.gradient[7:13] < 0).all()
    assert (out.gradient[13:19] > 0).all()


@pytest.mark.parametrize("loss", PAIRED[:-1])
def test_nan_spoils_its_pair_only(device, loss):
    terms, options = [Term(loss)], PreferenceOptions(0.5, label_smoothing=0.1)
    inputs, _ = make(38, device, terms)
    inputs[0][0] = NAN  # the first chosen
    out = forward(*inputs, terms=terms, options=options)
    assert out.loss.isnan()
    spoilt = out.gradient.isnan()
    offsets = inputs[2].tolist()
    assert spoilt[: offsets[1]].all()
    others = spoilt.clone()
    others[: offsets[1]] = False
    others[offsets[19] : offsets[20]] = False
    assert not others.any()
    if loss in SCORED:
        assert spoilt[offsets[19] : offsets[20]].all()


def test_nan_of_the_kl_reaches_the_loss(device):
    terms, options = [Term("kto")], PreferenceOptions(0.5)
    (logps, ref_logps, offsets), given = make(38, device, terms)
    logps[-1] = NAN
    assert forward(logps, ref_logps, offsets, terms=terms, options=options, **given).loss.isnan()
    logps[-1] = -1.0
    given["kl"] = torch.tensor(NAN, device=device)
    assert forward(logps, ref_logps, offsets, terms=terms, options=options, **given).loss.isnan()


WRONG_OFFSETS = {
    "past the end": [0, 2, 5, 7, 20],
    "falling": [0, 5, 3, 7, 12],
    "falls at the end": [0, 2, 5, 12, 7],
    "below zero": [-4, 2, 5, 7, 12],
    "all past the end": [50, 60, 70, 80, 90],
    "huge": [-(2**62), 2, 2**40, 2**62, 2**62],
}


@pytest.mark.parametrize(
    ("name", "case"), diagonal(2, WRONG_OFFSETS, ["sigmoid", "sft", "kl inside", "kl given"])
)
def test_wrong_offsets_stay_inside_the_buffers(device, monkeypatch, name, case):
    offsets = WRONG_OFFSETS[name]
    places = watch_addresses(monkeypatch) if INTERPRETED else []
    token_weights, logps = (torch.ones(12, device=device) for _ in range(2))
    ref_logps, offsets = torch.zeros(4, device=device), torch.tensor(offsets, device=device)
    given = {"token_weights": token_weights}
    if "kl" in case:
        given["is_desirable"] = torch.tensor([True, False], device=device)
    if case == "kl given":
        given["kl"] = torch.tensor(0.5, device=device)
    terms = [Term("kto" if "kl" in case else case)]
    inputs = (logps, ref_logps, offsets)
    out = preference_forward(*inputs, terms=terms, options=PreferenceOptions(0.1), **given)
    assert out.loss.isnan()
    tensors = (*inputs, *given.values(), *out)
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
    assert bool(places) == INTERPRETED
    for place in places:
        assert any(begin <= place < end for begin, end in ranges), place


def watch_addresses(monkeypatch):
    """A list that the interpreter fills with the addresses of all loads and stores."""
    from triton.runtime.interpreter import interpreter_builder

    places = []
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def watched_load(pointers, mask, *rest):
        places.extend(pointers.data[mask.data.astype(bool)].tolist())
        return load(pointers, mask, *rest)

    def watched_store(pointers, value, mask, *rest):
        places.extend(pointers.data[mask.data.astype(bool)].tolist())
        return store(pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", watched_load)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", watched_store)
    return places


def test_strided_vectors(device):
    names = ("token_weights", "example_weights")
    terms, options = [Term("sigmoid")], PreferenceOptions(0.5)
    inputs, given = make(6, device, terms, names)
    spread = [t.repeat_interleave(2)[::2] for t in (*inputs, *given.values())]
    assert all(not t.is_contiguous() for t in spread)
    want = forward(*inputs, terms=terms, options=options, **given)
    given = dict(zip(names, spread[3:], strict=True))
    got = forward(*spread[:3], terms=terms, options=options, **given)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))


def test_no_sequence_and_no_token(device):
    """No tokens at all: a loss of ln 2, as of a policy that is its reference."""
    logps, ref = torch.empty(0, device=device), torch.zeros(2, device=device)
    offsets = torch.zeros(3, dtype=torch.int64, device=device)
    out = forward(logps, ref, offsets, terms=[Term("dpo")], options=PreferenceOptions(0.5))
    torch.testing.assert_close(out.loss, torch.tensor(2.0, device=device).log())
    assert out.gradient.shape == (0,)


@pytest.mark.parametrize(
    ("terms", "options", "given"),
    [
        ([], {}, {}),
        ([Term("sigmoid")] * 5, {}, {}),
        ([Term("aot")], {}, {}),
        ([Term("sigmoid"), Term("kto")], {}, {}),
        ([Term("sigmoid")], {"label_smoothing": 0.5}, {}),
        ([Term("exo_pair")], {"label_smoothing": 0.0}, {}),
        ([Term("apo_zero")], {"f_divergence": "forward_kl"}, {}),
        ([Term("sigmoid")], {"f_divergence": "kl"}, {}),
        ([Term("kto")], {}, {"is_desirable": torch.ones(6, dtype=torch.bool)}),  # no KL
        ([Term("kto")], {}, {}),
        ([Term("sigmoid")], {}, {"is_desirable": torch.ones(6, dtype=torch.bool)}),
        ([Term("sft")], {}, {"example_weights": torch.ones(3)}),
        ([Term("sigmoid")], {}, {"example_weights": torch.ones(6)}),
        ([Term("sigmoid")], {}, {"token_weights": torch.ones(3)}),
    ],
)  # fmt: skip
def test_what_no_caller_may_ask(terms, options, given):
    inputs, _ = make(6, "cpu", [Term("sigmoid")])
    options = PreferenceOptions(**{"beta": 0.1, **options})
    with pytest.raises(AssertionError):
        preference_forward(*inputs, terms=terms, options=options, **given)


# What tralign_fast makes of it.
PUBLIC = [
    ("dpo", {"beta": 0.3, "label_smoothing": 0.2}),
    ("dpo", {"beta": 0.3, "f_divergence_type": "js_divergence"}),
    ("ipo", {"beta": 0.5, "length_normalized": False}),
    ("kto", {"beta": 0.1, **KTO}),
    (["sigmoid", "ipo", "sft"], {"beta": 0.2, "loss_weights": [0.8, 0.1, 1.5]}),
    *((name, {"beta": 0.2}) for name, spec in REGISTRY.items() if spec.kernel),
]


def make_public(sequences, device, loss, options):
    names = [loss] if isinstance(loss, str) else loss
    terms = [Term(name, 1.0, REGISTRY[name].length_normalized) for name in names]
    return make(sequences, device, terms, ("kl",) if loss == "kto" else ())


def test_the_registry_knows_what_the_kernel_has():
    assert {name for name, spec in REGISTRY.items() if spec.kernel} == {*LOSSES}


@pytest.mark.parametrize(("loss", "options"), PUBLIC, ids=str)
def test_is_the_loss_of_tralign_fast(device, loss, options):
    """Loss, gradient, rewards, log-probs, metrics: `preference_loss` of both backends."""
    (logps, ref_logps, offsets), kto = make_public(38, device, loss, options)
    results = []
    for backend in ("triton", "torch"):
        leaf = logps.clone().requires_grad_()
        out = preference_loss(
            leaf * 1, ref_logps, offsets, loss=loss, backend=backend, **options, **kto
        )
        (3 * out.loss).backward()
        results.append((*out, leaf.grad, out.rewards, out.logps, out.totals))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6, equal_nan=True)
    if loss == "dpo" and "label_smoothing" in options:
        chosen, rejected = torch.segment_reduce(logps, "sum", offsets=offsets).chunk(2)
        direct = dpo_loss(chosen, rejected, *ref_logps.chunk(2), **options)
        torch.testing.assert_close(results[0][0], direct.loss)


def test_an_unchanged_policy_has_a_ratio_of_exactly_zero(device):
    """The sums are those of a reference's log-probs, to the bit."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 600, (96,))
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
    logps = (-5 * torch.rand(int(lengths.sum()))).to(device)
    out = preference_loss(
        logps, segment_sums(logps, offsets), offsets, loss="dpo", beta=0.1, backend="triton"
    )
    assert not out.rewards.any()


def test_a_second_derivative_is_refused(device):
    (logps, ref_logps, offsets), _ = make_public(6, device, "dpo", {})
    leaf = logps.requires_grad_()
    out = preference_loss(leaf, ref_logps, offsets, loss="dpo", backend="triton", beta=0.1)
    with pytest.raises(RuntimeError, match="preference_loss has no second derivative"):
        torch.autograd.grad(out.loss, leaf, create_graph=True)


@pytest.mark.parametrize(("loss", "options"), PUBLIC, ids=str)
def test_from_logits(device, loss, options):
    """A trainer's logits: read once, and overwritten by their gradient."""
    (logps, ref_logps, offsets), kto = make_public(4, device, loss, options)
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
