"""The maths of the preference losses: of one pair or completion, value and slopes, in fp32.

Letters: ρ the log-ratio `log π_θ(y|x) - log π_ref(y|x)` of a completion (divided by its tokens in a
length-normalised term), c and r the scores of chosen and rejected, which are ρ unless an
f-divergence other than the reverse KL makes them of ρ, β the strength of the pull towards the
reference, u = β·(c - r), a = β·ρ of the chosen, b = β·ρ of the rejected, ε the label smoothing, λ
the weight of a label.

    sigmoid (dpo)  -(1-ε)·log σ(u) - ε·log σ(-u)
    robust         (-(1-ε)·log σ(u) + ε·log σ(-u)) / (1-2ε)
    hinge          max(0, 1 - u)
    ipo            (c - r - 1/(2β))²
    exo_pair       σ(u)·(log σ(u) - log(1-ε)) + σ(-u)·(log σ(-u) - log ε)
    discopop       -log σ(u)·(1-m) + exp(-u)·m, m = σ(u/τ)
    nca_pair       -log σ(a) - ½·log σ(-a) - ½·log σ(-b)
    bco_pair       -log σ(a) - log σ(-b)
    sppo_hard      (ρ_c - 1/(2β))² + (ρ_r + 1/(2β))²
    apo_zero       1 - σ(a) + σ(b)
    apo_down       σ(a) + 1 - σ(β·(ρ_c - ρ_r))
    sft            -log π_θ of the chosen, divided by the chosen's tokens of the whole batch

    kto                λ - λ·σ(±β·(ρ - max(KL, 0)))   +, λ of the desirable; -, λ of the undesirable
    apo_zero_unpaired  λ - λ·σ(±β·ρ)

The scores that an f-divergence makes: forward_kl 1 - exp(-ρ), js_divergence log 2 + log σ(ρ),
alpha_divergence (exp(min((α-1)·ρ, 80)) - 1)/(α-1).

Where a factor is 0, a product is 0 even if the other factor has overflowed: a pair that a loss is
done with keeps a slope of 0 where its score is infinite. NaN stays NaN.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_TERMS = 4
SCORED = ("sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop")  # take an f-divergence
PAIRED = (*SCORED, "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sft")
UNPAIRED = ("kto", "apo_zero_unpaired")
ALIASES = {"dpo": "sigmoid", "sigmoid_norm": "sigmoid"}
LOSSES = (*PAIRED, *UNPAIRED, *ALIASES)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "kl",
)


class Term(NamedTuple):
    """One loss of a weighted sum."""

    loss: str  # of LOSSES
    weight: float = 1.0
    length_normalized: bool = False  # whatever the name: sigmoid_norm is an alias of sigmoid


@dataclass(frozen=True)
class PreferenceOptions:
    """What the losses take besides tensors; the letters are those of the module."""

    beta: float
    label_smoothing: float = 0.0  # ε
    discopop_tau: float = 0.05  # τ
    desirable_weight: float = 1.0  # λ
    undesirable_weight: float = 1.0
    f_divergence: str = "reverse_kl"  # of DIVERGENCES
    f_alpha: float = 0.5  # α

    def divergence(self) -> str:
        """The name that the kernel branches on: the limit α = 1 is the reverse KL."""
        limit = self.f_divergence == "alpha_divergence" and abs(self.f_alpha - 1.0) < 1e-6
        return "reverse_kl" if limit else self.f_divergence

    def numbers(self) -> dict[str, float]:
        """The scalars of the kernel; what loses digits in fp32 is made here, in double."""
        smoothing = self.label_smoothing
        return {
            "beta": self.beta,
            "target": 0.5 / self.beta,
            "smoothing": smoothing,
            "debias": 1.0 / (1.0 - 2.0 * smoothing) if smoothing < 0.5 else 0.0,  # robust's
            "log_keep": math.log1p(-smoothing),
            "log_flip": math.log(smoothing) if smoothing else 0.0,
            "rate": 1.0 / self.discopop_tau,
            "exponent": self.f_alpha - 1.0,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }


def check_terms(terms: Sequence[Term], options: PreferenceOptions) -> None:
    names = {term.loss for term in terms}
    assert 1 <= len(terms) <= MAX_TERMS, terms
    assert names <= {*PAIRED} or names <= {*UNPAIRED}, names
    assert options.beta > 0.0, options
    limit = 0.5 if names & {"sigmoid", "robust"} else 1.0
    assert 0.0 <= options.label_smoothing < limit, options
    assert "exo_pair" not in names or options.label_smoothing > 0.0, options
    assert options.discopop_tau > 0.0, options
    assert options.f_divergence in DIVERGENCES, options
    assert options.f_divergence == "reverse_kl" or names <= {*SCORED, "sft"}, (options, names)


def scalars(
    terms: Sequence[Term], options: PreferenceOptions, nll_tokens: float | None
) -> dict[str, float]:
    """The arguments of the kernel by name; sft is summed apart from the other terms."""
    others = [term.weight for term in terms if term.loss != "sft"]
    others += [0.0] * (MAX_TERMS - len(others))
    return {
        **{f"weight_{i}": float(weight) for i, weight in enumerate(others)},
        "nll_weight": float(sum(term.weight for term in terms if term.loss == "sft")),
        "nll_tokens": -1.0 if nll_tokens is None else float(nll_tokens),
        **options.numbers(),
    }


class Preference(NamedTuple):
    """What `preference_forward` returns, all float32."""

    loss: Tensor  # ()
    rewards: Tensor  # (S,) or (2·S,), β·ρ of whole completions, 0 of mismatched ones
    logps: Tensor  # (S,) or (2·S,), summed (weighted) log-probs of the policy
    totals: Tensor  # (7, 2): sum and count of METRICS
    gradient: Tensor  # (N,), d loss / d logps


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], relative error of a few units: x/(u - 1) undoes rounding to u."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _expm1(x):
    """(exp(x) - 1, exp(x)); x/log(u) undoes the rounding of u = exp(x), where it is near 1."""
    u = tl.exp(x)
    near = tl.abs(x) < 1.0
    log_u = tl.log(tl.where(near & (u != 1.0), u, 2.0))
    corrected = tl.where(u == 1.0, x, (u - 1.0) * (x / log_u))
    return tl.where(near, corrected, u - 1.0), u


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))  # exp may overflow to inf: 0


@triton.jit
def _sigmoid_slope(x):
    """σ(x)·σ(-x); 1 - q adds nothing to the error of q, which in the product cancels near q = ½."""
    q = _sigmoid(-tl.abs(x))
    return q * (1.0 - q)


@triton.jit
def _times(factor, x):
    """factor·x, 0 where the factor is, whatever x."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def _score(ratio, exponent, DIVERGENCE: tl.constexpr):
    """(score, d score / d ρ) of whole completions."""
    score = ratio
    slope = tl.full(ratio.shape, 1.0, tl.float32)
    if DIVERGENCE == "forward_kl":
        score, slope = _expm1(-ratio)
        score = -score
    elif DIVERGENCE == "js_divergence":
        score = 0.6931471805599453 + _log_sigmoid(ratio)
        slope = _sigmoid(-ratio)
    elif DIVERGENCE == "alpha_divergence":
        power = exponent * ratio
        clamped = power > 80.0
        score, slope = _expm1(tl.where(clamped, 80.0, power))
        score /= exponent
        slope = tl.where(clamped, 0.0, slope)
    return score, slope


@triton.jit
def _pair_term(chosen, rejected, numbers, LOSS: tl.constexpr):
    """(loss, d/d chosen, d/d rejected) of pairs, from their scores (which are ρ of most losses)."""
    beta, target, smoothing, debias, log_keep, log_flip, rate = numbers
    u = beta * (chosen - rejected)
    if LOSS == "ipo":
        distance = chosen - rejected - target
        loss = distance * distance
        slope = 2.0 * distance
        other_slope = -slope
    elif LOSS == "sppo_hard":
        near, far = chosen - target, rejected + target
        loss = near * near + far * far
        slope, other_slope = 2.0 * near, 2.0 * far
    elif LOSS == "nca_pair" or LOSS == "bco_pair" or LOSS == "apo_zero" or LOSS == "apo_down":
        a, b = beta * chosen, beta * rejected
        if LOSS == "nca_pair":
            loss = -_log_sigmoid(a) - 0.5 * _log_sigmoid(-a) - 0.5 * _log_sigmoid(-b)
            slope, other_slope = 0.5 * _sigmoid(a) - _sigmoid(-a), 0.5 * _sigmoid(b)
        elif LOSS == "bco_pair":
            loss = -_log_sigmoid(a) - _log_sigmoid(-b)
            slope, other_slope = -_sigmoid(-a), _sigmoid(b)
        elif LOSS == "apo_zero":
            loss = _sigmoid(-a) + _sigmoid(b)
            slope, other_slope = -_sigmoid_slope(a), _sigmoid_slope(b)
        else:
            loss = _sigmoid(a) + _sigmoid(-u)
            other_slope = _sigmoid_slope(u)
            slope = _sigmoid_slope(a) - other_slope
        slope, other_slope = beta * slope, beta * other_slope
    else:
        if LOSS == "hinge":
            loss = tl.where(u >= 1.0, 0.0, 1.0 - u)
            slope = tl.where(u >= 1.0, 0.0, tl.where(u < 1.0, -1.0, u))  # NaN stays
        elif LOSS == "exo_pair":
            loss = _times(_sigmoid(u), _log_sigmoid(u) - log_keep)
            loss += _times(_sigmoid(-u), _log_sigmoid(-u) - log_flip)
            slope = _times(_sigmoid_slope(u), u + (log_flip - log_keep))
        elif LOSS == "discopop":
            logistic = -_log_sigmoid(u)
            m, rest = _sigmoid(u * rate), _sigmoid(-u * rate)
            # exp(-u)·σ(u/τ) in one exponential where exp(-u) overflows and σ does not reach it
            tail = tl.exp(tl.where(u < 0.0, _times(rate - 1.0, u), -u))
            mixed = tail * tl.where(u < 0.0, rest, m)
            loss = _times(rest, logistic) + mixed
            turn = rate * _sigmoid_slope(u * rate)  # dm/du
            slope = -_sigmoid(-u) * rest - _times(turn, logistic) + _times(mixed, rate * rest - 1.0)
        else:
            keep, flip = 1.0 - smoothing, smoothing
            if LOSS == "robust":
                keep, flip = keep * debias, -flip * debias
            loss = -keep * _log_sigmoid(u) - _times(flip, _log_sigmoid(-u))
            slope = flip * _sigmoid(u) - keep * _sigmoid(-u)
        slope = beta * slope
        other_slope = -slope
    return loss, slope, other_slope


@triton.jit
def over(x, count):
    """x / count to the nearest, of means and shares. Compiled for NVIDIA, `/` is x times a rounded
    1 / count: two roundings, by which 0.21 / 3 is an ulp off."""
    zero = tl.zeros((), tl.float32)  # the interpreter's scalars are Python's
    return tl.div_rn(zero + x, zero + count)


@triton.jit
def _share(length):
    return over(1.0, length)  # no token: 0/0 in normalised terms, NaN as in PyTorch


@triton.jit
def _add_pair_term(
    total, slope, other_slope, c, r, length, other_length, weight, numbers,
    LOSS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    if LOSS != "":
        if NORMALIZE:
            share, other_share = _share(length), _share(other_length)
            term, near, far = _pair_term(c * share, r * other_share, numbers, LOSS)
            near, far = near * share, far * other_share
        else:
            term, near, far = _pair_term(c, r, numbers, LOSS)
        total += weight * term
        slope += weight * near
        other_slope += weight * far
    return total, slope, other_slope


@triton.jit
def sum_pair_terms(
    ratio, other_ratio, length, other_length, exponent, numbers, weights, losses, normalize,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """(Σ weight·loss, its slopes by the log-ratios of chosen and rejected)."""
    c, c_slope = _score(ratio, exponent, DIVERGENCE)
    r, r_slope = _score(other_ratio, exponent, DIVERGENCE)
    total = tl.zeros(ratio.shape, tl.float32)
    near = tl.zeros(ratio.shape, tl.float32)
    far = tl.zeros(ratio.shape, tl.float32)
    for i in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
        total, near, far = _add_pair_term(
            total,
            near,
            far,
            c,
            r,
            length,
            other_length,
            weights[i],
            numbers,
            losses[i],
            normalize[i],
        )
    return total, _times(near, c_slope), _times(far, r_slope)


@triton.jit
def _add_label_term(
    total, slope, ratio, length, kl, pull, weight, LOSS: tl.constexpr, NORMALIZE: tl.constexpr
):
    if LOSS != "":
        own = ratio
        if NORMALIZE:
            own = own * _share(length)
        if LOSS == "kto":
            own = own - kl
        u = pull * own
        near = -pull * _sigmoid_slope(u)
        if NORMALIZE:
            near = near * _share(length)
        total += weight * _sigmoid(-u)
        slope += weight * near
    return total, slope


@triton.jit
def sum_label_terms(ratio, length, kl, pull, weights, losses, normalize):
    """(Σ weight·loss, its slope by the log-ratio) for λ = 1; pull: β, -β of the undesirable."""
    total = tl.zeros(ratio.shape, tl.float32)
    slope = tl.zeros(ratio.shape, tl.float32)
    for i in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
        total, slope = _add_label_term(
            total, slope, ratio, length, kl, pull, weights[i], losses[i], normalize[i]
        )
    return total, slope


def preference_naive(
    logps: Tensor,
    ref_logps: Tensor,
    offsets: Tensor,
    *,
    terms: Sequence[Term],
    options: PreferenceOptions,
    token_weights: Tensor | None = None,
    example_weights: Tensor | None = None,
    lengths: Tensor | None = None,
    is_desirable: Tensor | None = None,
    kl: Tensor | None = None,
    nll_tokens: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Preference:
    """The equations of the module in `dtype`, the gradient by autograd."""
    x = logps.detach().to(dtype).requires_grad_()
    weighted = x if token_weights is None else x * token_weights.to(dtype)
    sums = torch.stack([weighted[a:b].sum() for a, b in pairwise(offsets.tolist())])
    ratios = sums - ref_logps.to(dtype)
    lengths = offsets.diff() if lengths is None else lengths
    rewards = options.beta * ratios.detach()
    factor = 1.0 if example_weights is None else example_weights.to(dtype)
    totals = torch.zeros(len(METRICS), 2, dtype=dtype)
    if is_desirable is None:
        B = len(ratios) // 2
        tokens = offsets[B] - offsets[0] if nll_tokens is None else nll_tokens
        nll = -x[offsets[0] : offsets[B]].sum() / tokens
        (chosen, rejected), (c, r) = rewards.chunk(2), sums.detach().chunk(2)
        columns = (chosen, rejected, (chosen > rejected).to(dtype), chosen - rejected, c, r)
        losses = [
            nll if term.loss == "sft" else (factor * _naive_pairs(term, ratios, lengths, options))
            for term in terms
        ]
    else:
        S = len(is_desirable)
        kl = ratios[S:].mean() if kl is None else kl  # NaN without mismatched: no KL is used
        kl = kl.detach().to(dtype).clamp(min=0)
        own, none = rewards[:S], rewards[:0]
        rewards = torch.cat([own, torch.zeros_like(rewards[S:])])
        labels = (is_desirable, ~is_desirable)
        columns = (*(own[l] for l in labels), none, none, *(sums.detach()[:S][l] for l in labels))
        ratios, lengths = ratios[:S], lengths[:S]
        losses = [
            factor * _naive_completions(term, ratios, lengths, is_desirable, kl, options)
            for term in terms
        ]
        if any(term.loss == "kto" for term in terms):
            assert kl is not None
            totals[6] = torch.stack([kl, torch.ones_like(kl)])
    for total, column in zip(totals, columns, strict=False):
        total[0], total[1] = column.sum(), len(column)
    parts = [term.weight * value.mean() for term, value in zip(terms, losses, strict=True)]
    loss = torch.stack(parts).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    return Preference(loss.detach(), rewards, sums.detach(), totals, gradient)


def _naive_pairs(
    term: Term, ratios: Tensor, lengths: Tensor, options: PreferenceOptions
) -> Tensor:  # (B,)
    beta, smoothing, loss = options.beta, options.label_smoothing, ALIASES.get(term.loss, term.loss)
    scores, power = ratios, (options.f_alpha - 1) * ratios
    if options.f_divergence == "forward_kl":
        scores = 1 - torch.exp(-ratios)
    elif options.f_divergence == "js_divergence":
        scores = math.log(2) + logsigmoid(ratios)
    elif options.divergence() == "alpha_divergence":
        scores = torch.expm1(power.clamp(max=80)) / (options.f_alpha - 1)
    c, r = (scores / lengths if term.length_normalized else scores).chunk(2)
    u, a, b, target = beta * (c - r), beta * c, beta * r, 1 / (2 * beta)
    if loss == "sigmoid":
        return -(1 - smoothing) * logsigmoid(u) - smoothing * logsigmoid(-u)
    if loss == "robust":
        flipped = smoothing * logsigmoid(-u)
        return (flipped - (1 - smoothing) * logsigmoid(u)) / (1 - 2 * smoothing)
    if loss == "hinge":
        return torch.relu(1 - u)
    if loss == "ipo":
        return (c - r - target) ** 2
    if loss == "exo_pair":
        kept = torch.sigmoid(u) * (logsigmoid(u) - math.log1p(-smoothing))
        return kept + torch.sigmoid(-u) * (logsigmoid(-u) - math.log(smoothing))
    if loss == "discopop":
        v = u / options.discopop_tau
        # exp(-u)·σ(v), of which neither factor alone is finite everywhere
        return -logsigmoid(u) * torch.sigmoid(-v) + torch.exp(logsigmoid(v) - u)
    if loss == "nca_pair":
        return -logsigmoid(a) - logsigmoid(-a) / 2 - logsigmoid(-b) / 2
    if loss == "bco_pair":
        return -logsigmoid(a) - logsigmoid(-b)
    if loss == "sppo_hard":
        return (c - target) ** 2 + (r + target) ** 2
    if loss == "apo_zero":
        return 1 - torch.sigmoid(a) + torch.sigmoid(b)
    assert loss == "apo_down", loss
    return torch.sigmoid(a) + 1 - torch.sigmoid(u)


def _naive_completions(
    term: Term,
    ratios: Tensor,
    lengths: Tensor,
    is_desirable: Tensor,
    kl: Tensor,  # ()
    options: PreferenceOptions,
) -> Tensor:  # (S,)
    rho = ratios / lengths if term.length_normalized else ratios
    labels = (options.desirable_weight, options.undesirable_weight)
    weight = torch.where(is_desirable, *labels).to(rho.dtype)
    if term.loss == "apo_zero_unpaired":
        sigmoid = torch.sigmoid(options.beta * rho)
        return weight * torch.where(is_desirable, 1 - sigmoid, sigmoid)
    assert term.loss == "kto", term.loss
    distance = options.beta * torch.where(is_desirable, rho - kl, kl - rho)
    return weight - weight * torch.sigmoid(distance)
