"""Losses of packed tokens: sums, weights, combinations, and what is refused."""

import itertools
import math
import warnings

import numpy
import pytest
import torch

from tralign_fast import dpo_loss, ipo_loss, kto_loss, preference_loss
from tralign_fast.ops.losses import LOSSES
from tralign_fast.ops.objective import objective_of
from tralign_fast.ops.preference import METRICS
from tralign_fast.ops.segments import pair_weights
from tralign_fast.ops.sequence_losses import pair_loss

LENGTHS = [3, 1, 5, 2, 4, 6]  # three chosen, three rejected


@pytest.fixture
def packed():
    """(token log-probs, reference's sums, offsets, sums per sequence with a graph)."""
    generator = torch.Generator().manual_seed(0)
    tokens = (-3 * torch.rand(sum(LENGTHS), generator=generator)).requires_grad_()
    reference = -1.5 * torch.tensor(LENGTHS) + torch.randn(len(LENGTHS), generator=generator)
    offsets = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    sums = torch.stack([part.sum() for part in tokens.split(LENGTHS)])
    return tokens, reference, offsets, sums


def same(out, direct, tokens, rewards=True):
    torch.testing.assert_close(out.loss, direct.loss)
    if rewards:
        close = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
        torch.testing.assert_close(out.chosen_rewards, direct.chosen_rewards, **close)
        torch.testing.assert_close(out.rejected_rewards, direct.rejected_rewards, **close)
    (ours,) = torch.autograd.grad(out.loss, tokens, retain_graph=True)
    (theirs,) = torch.autograd.grad(direct.loss, tokens, retain_graph=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [n for n, s in LOSSES.items() if s.paired and not s.inputs])
def test_every_loss_of_pairs_takes_packed_tokens(name, packed):
    tokens, reference, offsets, sums = packed
    divisor = torch.tensor(LENGTHS) if LOSSES[name].length_normalized else torch.ones(6)
    each = (*(sums / divisor).chunk(2), *(reference / divisor).chunk(2))
    out = preference_loss(tokens, reference, offsets, loss=name, beta=0.2)
    same(out, pair_loss(name, *each, beta=0.2), tokens, rewards=False)
    whole = dpo_loss(*sums.chunk(2), *reference.chunk(2), beta=0.2)
    torch.testing.assert_close(out.chosen_rewards, whole.chosen_rewards, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalized", [False, True])
def test_length_normalization_can_be_chosen(normalized, packed):
    tokens, reference, offsets, sums = packed
    divisor = torch.tensor(LENGTHS) if normalized else torch.ones(6)
    each = (*(sums / divisor).chunk(2), *(reference / divisor).chunk(2))
    for name, function in (("ipo", ipo_loss), ("dpo", dpo_loss)):
        out = preference_loss(
            tokens, reference, offsets, loss=name, beta=0.2, length_normalized=normalized
        )
        same(out, function(*each, beta=0.2), tokens, rewards=False)


def test_lengths_that_differ_from_the_tokens_owned(packed):
    """A prompt without a token leaves the completion's first one unscored, but counted."""
    tokens, reference, offsets, sums = packed
    lengths = torch.tensor(LENGTHS) + 1.0
    each = (*(sums / lengths).chunk(2), *(reference / lengths).chunk(2))
    out = preference_loss(tokens, reference, offsets, loss="ipo", beta=0.2, lengths=lengths)
    same(out, ipo_loss(*each, beta=0.2), tokens, rewards=False)


def test_aot_sorts_the_margins(packed):
    tokens, reference, offsets, sums = packed
    margin = (sums[:3] - sums[3:]).sort().values
    delta = 0.2 * (margin - (reference[:3] - reference[3:]).sort().values)
    expected = -torch.nn.functional.logsigmoid(delta).mean()
    out = preference_loss(tokens, reference, offsets, loss="aot", beta=0.2)
    torch.testing.assert_close(out.loss, expected)
    (ours,) = torch.autograd.grad(out.loss, tokens, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, tokens)
    torch.testing.assert_close(ours, theirs)


def test_hypo_takes_a_reference_that_is_wrong_for_one_without_preference(packed):
    tokens, reference, offsets, sums = packed
    chosen, rejected = reference.clone().chunk(2)
    rejected[:2] = chosen[:2] + torch.tensor([2.0, -2.0])  # the first pair's is pessimistic
    reference = torch.cat([chosen, rejected])
    margin = (sums[:3] - sums[3:]).double()
    against = torch.tensor([max(0.0, float(c - r)) for c, r in zip(chosen, rejected, strict=True)])
    assert (against == 0).any()
    assert (against > 0).any()
    expected = torch.log1p(torch.exp(-0.2 * (margin - against.double()))).mean().float()
    out = preference_loss(tokens, reference, offsets, loss="hypo", beta=0.2)
    torch.testing.assert_close(out.loss, expected)
    (ours,) = torch.autograd.grad(out.loss, tokens, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, tokens)
    torch.testing.assert_close(ours, theirs)


def test_losses_add_up_with_their_weights(packed):
    """MPO's three terms: the parts by themselves, and the sum."""
    tokens, reference, offsets, sums = packed
    each = (*sums.chunk(2), *reference.chunk(2))
    nll = -tokens[: sum(LENGTHS[:3])].mean()
    expected = 0.8 * pair_loss("sigmoid", *each, beta=0.2).loss
    expected = expected + 0.2 * pair_loss("bco_pair", *each, beta=0.2).loss + 1.5 * nll
    out = preference_loss(
        tokens, reference, offsets, loss=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.5], beta=0.2,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, expected)
    (ours,) = torch.autograd.grad(out.loss, tokens, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, tokens)
    torch.testing.assert_close(ours, theirs)


def test_a_part_of_a_batch_divides_its_nll_by_the_whole(packed):
    tokens, reference, offsets, _ = packed
    out = preference_loss(tokens, reference, offsets, loss="sft", beta=0.1, nll_tokens=18.0)
    torch.testing.assert_close(out.loss, -tokens[: sum(LENGTHS[:3])].sum() / 18)


def test_kto_makes_its_kl_of_the_mismatched(packed):
    tokens, reference, offsets, sums = packed
    label = torch.tensor([True, False, True])
    for shift in (2.0, -2.0):  # a KL above 0, and one that is clamped
        ref = torch.cat([reference[:3], sums[3:].detach() - shift])
        out = preference_loss(tokens, ref, offsets, loss="kto", is_desirable=label, beta=0.2)
        kl = torch.tensor(max(shift, 0.0))
        direct = kto_loss(sums[:3], ref[:3], label, kl, beta=0.2)
        same(out, direct, tokens)
        given = preference_loss(
            tokens, ref, offsets, loss="kto", is_desirable=label, kl=kl[None], beta=0.2
        )
        assert given.loss == out.loss
        assert out.rewards[3:].tolist() == [0, 0, 0]
        total, count = out.totals[METRICS.index("kl")]
        assert (total, count) == (pytest.approx(kl), 1)


def test_unpaired_apo_has_no_kl(packed):
    tokens, reference, offsets, sums = packed
    label = torch.tensor([True, False, True, True, False, False])
    out = preference_loss(
        tokens, reference, offsets, loss="apo_zero_unpaired", is_desirable=label, beta=0.2,
        undesirable_weight=2.0,
    )  # fmt: skip
    p = torch.sigmoid(0.2 * (sums - reference))
    expected = torch.where(label, 1 - p, 2 * p).mean()
    torch.testing.assert_close(out.loss, expected)
    assert out.totals[METRICS.index("kl")].tolist() == [0, 0]


SCORES = {
    "reverse_kl": lambda r: r,
    "forward_kl": lambda r: 1 - (-r).exp(),
    "js_divergence": lambda r: math.log(2) - torch.log1p((-r).exp()),
    "alpha_divergence": lambda r: ((0.3 - 1) * r).expm1() / (0.3 - 1),
}


@pytest.mark.parametrize("divergence", SCORES)
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge"])
def test_f_divergences_change_the_scores(name, divergence, packed):
    tokens, reference, offsets, sums = packed
    score = SCORES[divergence](sums - reference)
    score = score / torch.tensor(LENGTHS) if name == "ipo" else score
    zeros = torch.zeros(3)
    direct = pair_loss(name, *score.chunk(2), zeros, zeros, beta=0.2)
    extra = {"f_alpha_divergence_coef": 0.3} if divergence == "alpha_divergence" else {}
    out = preference_loss(
        tokens, reference, offsets, loss=name, beta=0.2, f_divergence_type=divergence, **extra
    )
    same(out, direct, tokens, rewards=False)
    torch.testing.assert_close(
        out.chosen_rewards, 0.2 * (sums - reference)[:3].detach(), rtol=1e-5, atol=1e-6
    )


def test_weights_of_tokens_and_of_examples(packed):
    tokens, reference, offsets, _ = packed
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(len(tokens), generator=generator)
    factors = torch.tensor([0.5, 2.0, 1.0])
    sums = torch.stack([part.sum() for part in (tokens * weights).split(LENGTHS)])
    delta = 0.2 * ((sums - reference)[:3] - (sums - reference)[3:])
    expected = (-torch.nn.functional.logsigmoid(delta) * factors).mean()
    out = preference_loss(
        tokens, reference, offsets, loss="dpo", beta=0.2, token_weights=weights,
        example_weights=factors,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.logps, sums.detach())
    (ours,) = torch.autograd.grad(out.loss, tokens, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, tokens)
    torch.testing.assert_close(ours, theirs)


def test_weights_of_pairs_are_their_probability(packed):
    tokens, _, offsets, _ = packed
    squares = torch.linspace(-3, -1, len(tokens))
    means = [p.mean().item() for p in (tokens - squares).detach().split(LENGTHS)]
    expected = [math.exp(means[i] + means[i + 3]) for i in range(3)]
    assert pair_weights(tokens, squares, offsets).tolist() == pytest.approx(expected)


def test_metrics_are_sums_and_counts(packed):
    tokens, reference, offsets, sums = packed
    out = preference_loss(tokens, reference, offsets, loss="dpo", beta=0.2)
    rewards = (0.2 * (sums - reference)).detach()
    chosen, rejected = rewards.chunk(2)
    expected = {
        "rewards/chosen": chosen.sum(), "rewards/rejected": rejected.sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": sums[:3].sum(), "logps/rejected": sums[3:].sum(),
    }  # fmt: skip
    for name, (total, count) in zip(METRICS, out.totals.tolist(), strict=True):
        assert count == (3 if name in expected else 0), name
        assert total == pytest.approx(
            float(expected.get(name, torch.zeros(())).detach()), rel=1e-5, abs=1e-6
        ), name


def test_tokens_of_no_sequence_have_no_gradient(packed):
    tokens, reference, _, _ = packed
    offsets = torch.tensor([1, 4, 5, 9, 9, 12, 15])
    out = preference_loss(tokens, reference, offsets, loss="dpo", beta=0.2)
    (gradient,) = torch.autograd.grad(out.loss, tokens)
    assert (gradient[[0, *range(15, 21)]] == 0).all()
    assert (gradient[1:15] != 0).all()


@pytest.mark.parametrize(
    ("offsets", "inside"),
    [([0, 2, 5, 7, 20], 12), ([0, 5, 3, 7, 12], 12), ([-1, 2, 5, 7, 12], 12)],
)
def test_offsets_outside_the_tokens_are_refused(offsets, inside):
    """They ended a backward in heap corruption."""
    logps = torch.zeros(inside, requires_grad=True)
    with pytest.raises(ValueError, match=rf"offsets must rise within \[0, {inside}\]"):
        preference_loss(logps, torch.zeros(4), torch.tensor(offsets), loss="dpo", beta=0.1)


BAD = {
    "did you mean 'hinge'": {"loss": "hing"},
    "loss_type: expected at least one": {"loss": []},
    "label_smoothing: the loss ipo does not take it": {"loss": "ipo", "label_smoothing": 0.1},
    "desirable_weight: the loss dpo does not take it": {"desirable_weight": 2.0},
    "cannot be added up: kto takes single completions": {"loss": ["dpo", "kto"]},
    "loss_weights: expected one weight for each": {"loss_weights": [1.0, 2.0]},
    "loss_weights: expected numbers ≥ 0": {"loss_weights": [math.nan]},
    "loss_weights: expected numbers ≥ 0 and": {"loss_weights": [-1.0]},
    "loss_weights: expected one above 0": {"loss_weights": [0.0]},
    "beta: expected a number > 0": {"beta": 0.0},
    "beta: expected a number > 0 and": {"beta": math.inf},
    "beta: the loss dpo needs it": {"beta": None},
    "f_divergence_type: expected one of": {"f_divergence_type": "kl"},
    "f_divergence_type: nca_pair is no function": {
        "loss": "nca_pair", "f_divergence_type": "forward_kl"
    },
    "f_alpha_divergence_coef: expected a finite": {"f_alpha_divergence_coef": math.nan},
    r"even for pairs and not 0, got \(4,\), \(2,\), \(2,\)": {"offsets": torch.tensor([0, 2])},
    "int64 offsets": {"offsets": torch.tensor([0, 2, 4], dtype=torch.int32)},
    "kto needs is_desirable": {"loss": "kto"},
    "takes pairs, no is_desirable": {"is_desirable": torch.ones(1, dtype=torch.bool)},
    "kto needs kl, or mismatched": {
        "loss": "kto", "is_desirable": torch.ones(2, dtype=torch.bool)
    },
    r"kl: expected one number.*\(2,\)": {
        "loss": "kto", "is_desirable": torch.ones(2, dtype=torch.bool), "kl": torch.zeros(2)
    },
    "expected a bool is_desirable": {"loss": "kto", "is_desirable": torch.ones(2)},
    "as many sequences as labels": {
        "loss": "kto", "is_desirable": torch.ones(3, dtype=torch.bool), "kl": torch.zeros(())
    },
    r"expected token_weights \(4,\)": {"token_weights": torch.ones(3)},
    r"expected example_weights \(1,\)": {"example_weights": torch.ones(2)},
    "sorts the examples": {"loss": "aot", "example_weights": torch.ones(1)},
    "sft sorts the examples of a batch or is a mean": {
        "loss": ["dpo", "sft"], "example_weights": torch.ones(1)
    },
    "nll_tokens must be positive": {"nll_tokens": 0.0},
    "f_alpha_divergence_coef: f_divergence_type='reverse_kl' does not take": {
        "f_alpha_divergence_coef": 0.7
    },
    "label_smoothing: the losses exo_pair, dpo have other defaults": {"loss": ["exo_pair", "dpo"]},
    "label_smoothing: the losses dpo, exo_pair have other defaults": {"loss": ["dpo", "exo_pair"]},
    "length_normalized: expected true or false, got 'yes'": {"length_normalized": "yes"},
    "loss_type: expected one of .*, got 3": {"loss": 3},
    "loss_type: expected one of .*, got None": {"loss": [None]},
    "loss_weights: expected one weight for each of dpo, ipo": {
        "loss": ["dpo", "ipo"], "loss_weights": 1.0
    },
    r"beta: expected a number > 0 and finite for dpo, got 1000000": {"beta": 10**400},
    "beta: expected a number > 0 and finite for dpo, got 1e-45": {"beta": 1e-45},
    "expected tensors on one device": {"offsets": torch.tensor([0, 2, 4], device="meta")},
    "expected a tensor offsets": {"offsets": [0, 2, 4]},
    "needs sequences of one token or more": {"loss": "ipo", "offsets": torch.tensor([0, 0, 4])},
    "one token or more": {"loss": "ipo", "lengths": torch.tensor([2.0, 0.0])},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_named(message):
    given = {"loss": "dpo", "beta": 0.1, "offsets": torch.tensor([0, 2, 4]), **BAD[message]}
    given = {k: v for k, v in given.items() if v is not None}
    with pytest.raises(ValueError, match=message) as caught:
        preference_loss(torch.zeros(4), torch.zeros(2), **given)
    assert "\n" not in str(caught.value)


def test_an_unchanged_policy_has_a_ratio_of_exactly_zero():
    """Sums do not depend on what stands beside a sequence."""
    from tralign_fast.ops.segments import segment_sums

    torch.manual_seed(0)
    lengths = [137, 512, 3, 1, 80, 300]
    tokens = -5 * torch.rand(sum(lengths))
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    alone = [segment_sums(t, torch.tensor([0, len(t)])) for t in tokens.split(lengths)]
    out = preference_loss(tokens, torch.cat(alone), offsets, loss="dpo", beta=0.1)
    assert out.chosen_rewards.tolist() == [0, 0, 0]
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_the_torch_backend_gives_no_notice(packed):
    tokens, reference, offsets, _ = packed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preference_loss(tokens, reference, offsets, loss="aot", beta=0.2)


def test_odd_tensors_are_taken_for_what_they_are(packed):
    """Whole lengths and weights, numbers of numpy, bf16 log-probs, a loss of weight 0."""
    tokens, reference, offsets, _ = packed
    plain = preference_loss(tokens, reference, offsets, loss="ipo", beta=0.2)
    for odd in (
        {"lengths": offsets.diff()},
        {"example_weights": torch.ones(3, dtype=torch.int64)},
        {"token_weights": torch.ones(len(tokens), dtype=torch.float64)},
        {"beta": numpy.float32(0.2)},
        {"loss": ["ipo", "aot"], "loss_weights": [1, 0]},
    ):
        given = {"loss": "ipo", "beta": 0.2, **odd}
        out = preference_loss(tokens, reference, offsets, **given)
        torch.testing.assert_close(out.loss, plain.loss)
    with pytest.raises(ValueError, match=r"logps must be real, got torch.complex64"):
        preference_loss(tokens.to(torch.complex64), reference, offsets, loss="ipo", beta=0.2)
    with pytest.raises(ValueError, match=r"S even for pairs and not 0, got \(0,\)"):
        preference_loss(tokens[:0], reference[:0], offsets[:1], loss="ipo", beta=0.2)
    objective = objective_of(LOSSES, "dpo", options={"beta": 0.1})
    with pytest.raises(ValueError, match="an Objective has its options"):
        preference_loss(tokens, reference, offsets, loss=objective, beta=0.3)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("name", ["dpo", "hinge", "robust", "exo_pair", "discopop"])
def test_ratios_far_out_have_finite_losses_and_gradients(name, divergence):
    """Of pairs that a loss is done with, and of one that it is far from."""
    tokens = torch.zeros(4, requires_grad=True)
    reference = torch.tensor([-300.0, 0.0, 150.0, 0.0])
    out = preference_loss(
        tokens, reference, torch.arange(5), loss=name, beta=0.1, f_divergence_type=divergence
    )
    (gradient,) = torch.autograd.grad(out.loss, tokens)
    assert torch.isfinite(out.loss)
    assert torch.isfinite(gradient).all()


def test_an_alpha_near_one_is_the_reverse_kl(packed):
    tokens, reference, offsets, _ = packed
    near = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 + 2e-6}
    out = preference_loss(tokens, reference, offsets, loss="dpo", beta=0.2, **near)
    plain = preference_loss(tokens, reference, offsets, loss="dpo", beta=0.2)
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_numbers_do_not_depend_on_the_default_dtype(default):
    """Scripts set it to load a model in bf16."""
    from tralign_fast import linear_logprobs, logprobs_from_logits

    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float32}
    hidden, weight = torch.randn(6, 8, **draw), torch.randn(40, 8, **draw)
    targets, offsets = torch.arange(6), torch.tensor([0, 2, 3, 5, 6])
    labels, ref = torch.tensor([True, False]), torch.full((4,), -7.0, dtype=torch.float32)

    def results():
        logps = linear_logprobs(hidden, weight, targets)
        options = {"beta": 0.1, "desirable_weight": 0.3, "is_desirable": labels}
        return [
            logps, logprobs_from_logits(hidden @ weight.t(), targets),
            preference_loss(logps, ref, offsets, loss="dpo", beta=0.1).loss,
            preference_loss(logps, ref, offsets, loss="kto", **options).loss,
        ]  # fmt: skip

    expected = results()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = results()
    finally:
        torch.set_default_dtype(before)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)
