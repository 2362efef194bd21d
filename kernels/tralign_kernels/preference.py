"""Log-probs of tokens → a weighted sum of preference losses, its gradient, rewards and metrics, in
one launch.

Letters: N scored tokens, S sequences, B pairs, the others as in `preference_terms`, which has the
equations of the losses.

Sequence s owns the tokens [offsets[s], offsets[s + 1]). Pairs are ordered as in a packed batch:
S = 2B, first B chosen, then B rejected. Unpaired: S completions, then maybe S mismatched ones,
whose mean log-ratio is the KL of `kto`. The loss is the weighted sum of the means of its terms over
the pairs (completions, where unpaired).

One program does all of it: 64 kB for 16,384 tokens, a few microseconds, for which the launches of
the same in PyTorch (some thirty) take longer than the work. Hence no atomics and no second pass:
sums are made in one order, and the mean over the pairs is there when the last pair is.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import backend, device_of
from .preference_terms import (
    ALIASES,
    MAX_TERMS,
    METRICS,
    PAIRED,
    UNPAIRED,
    Preference,
    PreferenceOptions,
    Term,
    check_terms,
    over,
    scalars,
    sum_label_terms,
    sum_pair_terms,
)


class PreferenceLaunch(NamedTuple):
    sequences: int  # that the program reads side by side
    tokens: int  # of each, in a tile
    tiles: int  # per iteration
    num_warps: int


# 16 chosen, then 16 rejected, 128 tokens of each at a time, 8 (4) loads of 4 bytes a thread in
# flight: a batch of 32 pairs of 512 tokens waits for memory 16 times. A tile is as wide as a warp:
# wider, a thread would hold the numbers of more than two sequences, and the maths of the terms,
# most of the code, would be compiled once for each of them.
PREFERENCE_LAUNCH = {
    "cuda": PreferenceLaunch(sequences=16, tokens=32, tiles=4, num_warps=8),
    "hip": PreferenceLaunch(sequences=16, tokens=64, tiles=2, num_warps=16),
}


@triton.jit
def _read(
    tensors, sequence, inside, N, beta,
    OWN, PLAIN,  # constants too
    TOKEN_WEIGHTS: tl.constexpr,
    SEQUENCES: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """(first token, length, Σ w·log-prob, Σ log-prob, log-ratio, reward, NaN if wrong offsets).

    Of sequences, (SEQUENCES,) each; stores the first sum and the reward. Nothing outside of [0, N)
    is read, and the sums of a sequence with wrong offsets are NaN. The second sum is the first
    unless PLAIN asks for it. Rewards of mismatched completions (not OWN) are 0.
    """
    logps_ptr, ref_ptr, offsets_ptr, token_weights_ptr, sums_ptr, rewards_ptr = tensors
    start = tl.load(offsets_ptr + sequence, mask=inside, other=0)
    end = tl.load(offsets_ptr + sequence + 1, mask=inside, other=0)
    wrong = tl.where((start < 0) | (end < start) | (end > N), float("nan"), 0.0)
    begin = tl.minimum(tl.maximum(start, 0), N)
    length = tl.maximum(tl.minimum(end, N) - begin, 0).to(tl.int32)
    # sums in fp64: they equal those of a reference, however it adds its tokens up
    sums = tl.zeros((SEQUENCES, TOKENS), tl.float64)
    plain_sums = tl.zeros((SEQUENCES, TOKENS), tl.float64)
    for first in range(0, tl.max(length), TOKENS * TILES):  # pyright: ignore[reportArgumentType]
        for i in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
            token = first + i * TOKENS + tl.arange(0, TOKENS)
            own = token[None, :] < length[:, None]
            place = begin[:, None] + token[None, :]
            logps = tl.load(logps_ptr + place, mask=own, other=0.0)
            if TOKEN_WEIGHTS:
                if PLAIN:
                    plain_sums += logps.to(tl.float64)
                logps *= tl.load(token_weights_ptr + place, mask=own, other=0.0)
            sums += logps.to(tl.float64)
    total = tl.sum(sums, axis=1).to(tl.float32) + wrong
    plain = total
    if TOKEN_WEIGHTS and PLAIN:
        plain = tl.sum(plain_sums, axis=1).to(tl.float32) + wrong
    ratio = total - tl.load(ref_ptr + sequence, mask=inside, other=0.0)
    reward = tl.zeros((SEQUENCES,), tl.float32)
    if OWN:
        reward = beta * ratio  # of whole completions, whatever a term divides by
    tl.store(sums_ptr + sequence, total, mask=inside)
    tl.store(rewards_ptr + sequence, reward, mask=inside)
    return begin, length, total, plain, ratio, reward, wrong


@triton.jit
def _read_mismatched(
    tensors,
    N,
    S,
    TOKEN_WEIGHTS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
):
    """(mean log-ratio of the mismatched, (SEQUENCES,): NaN where their offsets are wrong, or 0)."""
    ratios = tl.zeros((SEQUENCES,), tl.float32)
    spoilt = tl.zeros((SEQUENCES,), tl.float32)
    for first in range(0, S, SEQUENCES):
        sequence = S + first + tl.arange(0, SEQUENCES)
        _, _, _, _, ratio, _, wrong = _read(
            tensors, sequence, sequence < 2 * S, N, 0.0,
            False, False, TOKEN_WEIGHTS, SEQUENCES, TOKENS, TILES,
        )  # fmt: skip
        ratios += ratio  # outside: 0 - 0
        spoilt += wrong
    return over(tl.sum(ratios), S), spoilt


@triton.jit
def _store_gradient(
    gradient_ptr, token_weights_ptr, begin, length, slope, plain_slope,
    TOKEN_WEIGHTS: tl.constexpr, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Slopes by Σ w·log-prob, (SEQUENCES,), and by Σ log-prob, () → the gradient of the tokens."""
    for first in range(0, tl.max(length), TOKENS * TILES):  # pyright: ignore[reportArgumentType]
        for i in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
            token = first + i * TOKENS + tl.arange(0, TOKENS)
            own = token[None, :] < length[:, None]
            place = begin[:, None] + token[None, :]
            spread = tl.broadcast_to(slope[:, None], (SEQUENCES, TOKENS))
            if TOKEN_WEIGHTS:
                spread *= tl.load(token_weights_ptr + place, mask=own, other=0.0)
            tl.store(gradient_ptr + place, spread + plain_slope, mask=own)


@triton.jit
def _metrics(reward, other_reward, total, other_total, chosen, rejected):
    """(values, 1 where they count) of METRICS but the KL, (8, SEQUENCES).

    A sequence of an unpaired loss is chosen or rejected, never both: it has no margin.
    """
    row = tl.arange(0, 8)[:, None]
    reward, other_reward = reward[None, :], other_reward[None, :]
    chosen, rejected = chosen[None, :], rejected[None, :]
    right = tl.where(reward > other_reward, 1.0, 0.0)
    rewards = tl.where(row == 0, reward, other_reward)
    margins = tl.where(row == 2, right, reward - other_reward)
    totals = tl.where(row == 4, total[None, :], other_total[None, :])
    values = tl.where(row < 2, rewards, tl.where(row < 4, margins, totals))
    counts = ((row % 4 == 1) | chosen) & ((row % 4 == 0) | rejected) & (row < 6)
    return tl.where(counts, values, 0.0), tl.where(counts, 1.0, 0.0)


@triton.jit
def _examples(
    tensors, gradient_ptr, example_weights_ptr, lengths_ptr, desirable_ptr, N, examples, kl,
    nll_slope, desirable_weight, undesirable_weight, exponent, numbers, weights, terms, normalize,
    PAIRED: tl.constexpr, SFT: tl.constexpr, DIVERGENCE: tl.constexpr,
    TOKEN_WEIGHTS: tl.constexpr, EXAMPLE_WEIGHTS: tl.constexpr, LENGTHS: tl.constexpr,
    SEQUENCES: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """(losses (SEQUENCES,), metrics and their counts (8, SEQUENCES), end of the last sequence)."""
    beta, token_weights_ptr = numbers[0], tensors[3]
    losses = tl.zeros((SEQUENCES,), tl.float32)
    metrics = tl.zeros((8, SEQUENCES), tl.float32)
    counts = tl.zeros((8, SEQUENCES), tl.float32)
    last = tl.zeros((), tl.int64)
    for first in range(0, examples, SEQUENCES):
        example = first + tl.arange(0, SEQUENCES)
        inside = example < examples
        begin, length, total, plain, ratio, reward, _ = _read(
            tensors, example, inside, N, beta, True, SFT, TOKEN_WEIGHTS, SEQUENCES, TOKENS, TILES
        )
        divisor = length.to(tl.float32)
        if LENGTHS:
            divisor = tl.load(lengths_ptr + example, mask=inside, other=1.0)
        factor = tl.full((SEQUENCES,), 1.0, tl.float32)
        if EXAMPLE_WEIGHTS:
            factor = tl.load(example_weights_ptr + example, mask=inside, other=0.0)
        if PAIRED:
            other = examples + example
            other_begin, other_length, other_total, _, other_ratio, other_reward, wrong = _read(
                tensors, other, inside, N, beta,
                True, False, TOKEN_WEIGHTS, SEQUENCES, TOKENS, TILES,
            )  # fmt: skip
            losses += wrong  # sft alone does not see it in a sum
            other_divisor = other_length.to(tl.float32)
            if LENGTHS:
                other_divisor = tl.load(lengths_ptr + other, mask=inside, other=1.0)
            loss, slope, other_slope = sum_pair_terms(
                ratio, other_ratio, divisor, other_divisor, exponent, numbers,
                weights, terms, normalize, DIVERGENCE,
            )  # fmt: skip
            slope = over(factor * slope, examples)
            other_slope = over(factor * other_slope, examples)
            _store_gradient(
                gradient_ptr, token_weights_ptr, other_begin, other_length,
                other_slope, 0.0, TOKEN_WEIGHTS, SEQUENCES, TOKENS, TILES,
            )  # fmt: skip
            last = tl.maximum(last, tl.max(other_begin + other_length))
            chosen, rejected = inside, inside
        else:
            desirable = tl.load(desirable_ptr + example, mask=inside, other=0) != 0
            factor *= tl.where(desirable, desirable_weight, undesirable_weight)
            pull = tl.where(desirable, beta, -beta)
            loss, slope = sum_label_terms(ratio, divisor, kl, pull, weights, terms, normalize)
            slope = over(factor * slope, examples)
            other_reward, other_total = reward, total
            chosen, rejected = desirable, inside & (desirable == 0)
        loss = factor * loss
        if SFT:
            loss += nll_slope * examples * plain
        _store_gradient(
            gradient_ptr, token_weights_ptr, begin, length,
            slope, nll_slope, TOKEN_WEIGHTS, SEQUENCES, TOKENS, TILES,
        )  # fmt: skip
        last = tl.maximum(last, tl.max(begin + length))
        losses += tl.where(inside, loss, 0.0)
        values, counted = _metrics(reward, other_reward, total, other_total, chosen, rejected)
        metrics += values
        counts += counted
    return losses, metrics, counts, last


@triton.jit(do_not_specialize=["N", "examples"])
def _preference_kernel(
    logps_ptr,  # (N,) fp32
    ref_ptr,  # (S,) fp32, with MISMATCHED (2·S,)
    offsets_ptr,  # (S + 1,) int64, with MISMATCHED (2·S + 1,)
    token_weights_ptr,  # (N,) fp32
    example_weights_ptr,  # (examples,) fp32
    lengths_ptr,  # as ref
    desirable_ptr,  # (S,) bool, unpaired
    kl_ptr,  # () fp32
    gradient_ptr,  # (N,) fp32
    rewards_ptr,  # as ref
    sums_ptr,  # as ref
    totals_ptr,  # (7, 2) fp32
    loss_ptr,  # () fp32
    N, examples,  # B, or S unpaired
    weight_0, weight_1, weight_2, weight_3, nll_weight, nll_tokens,  # negative: the chosen's
    desirable_weight, undesirable_weight, exponent,  # α - 1
    beta, target, smoothing, debias, log_keep, log_flip, rate,
    LOSS_0: tl.constexpr, LOSS_1: tl.constexpr, LOSS_2: tl.constexpr, LOSS_3: tl.constexpr,
    NORMALIZE_0: tl.constexpr, NORMALIZE_1: tl.constexpr, NORMALIZE_2: tl.constexpr,
    NORMALIZE_3: tl.constexpr, PAIRED: tl.constexpr, SFT: tl.constexpr, DIVERGENCE: tl.constexpr,
    TOKEN_WEIGHTS: tl.constexpr, EXAMPLE_WEIGHTS: tl.constexpr, LENGTHS: tl.constexpr,
    KL: tl.constexpr,  # "none", "given", "inside": the mean log-ratio of the mismatched
    MISMATCHED: tl.constexpr, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    tensors = (logps_ptr, ref_ptr, offsets_ptr, token_weights_ptr, sums_ptr, rewards_ptr)
    numbers = (beta, target, smoothing, debias, log_keep, log_flip, rate)
    weights = (weight_0, weight_1, weight_2, weight_3)
    origin = tl.load(offsets_ptr)
    kl, spoilt, nll_slope = 0.0, 0.0, 0.0
    if MISMATCHED:
        kl, spoilt = _read_mismatched(tensors, N, examples, TOKEN_WEIGHTS, SEQUENCES, TOKENS, TILES)
    if KL == "given":
        kl = tl.load(kl_ptr)
    if KL != "none":
        kl = tl.where(kl < 0.0, 0.0, kl)  # NaN stays, which a maximum would drop
    if SFT:
        if nll_tokens < 0.0:
            nll_tokens = (tl.load(offsets_ptr + examples) - origin).to(tl.float32)
        nll_slope = over(-nll_weight, nll_tokens)
    losses, metrics, counts, last = _examples(
        tensors, gradient_ptr, example_weights_ptr, lengths_ptr, desirable_ptr, N, examples, kl,
        nll_slope, desirable_weight, undesirable_weight, exponent, numbers, weights,
        (LOSS_0, LOSS_1, LOSS_2, LOSS_3), (NORMALIZE_0, NORMALIZE_1, NORMALIZE_2, NORMALIZE_3),
        PAIRED, SFT, DIVERGENCE, TOKEN_WEIGHTS, EXAMPLE_WEIGHTS, LENGTHS, SEQUENCES, TOKENS, TILES,
    )  # fmt: skip
    tl.store(loss_ptr, over(tl.sum(losses + spoilt), examples))
    row = tl.arange(0, 8)
    metrics, counts = tl.sum(metrics, axis=1), tl.sum(counts, axis=1)
    if KL != "none":
        metrics, counts = tl.where(row == 6, kl, metrics), tl.where(row == 6, 1.0, counts)
    tl.store(totals_ptr + 2 * row, metrics, mask=row < 7)
    tl.store(totals_ptr + 2 * row + 1, counts, mask=row < 7)
    # tokens of no sequence, as where shapes are padded, and of the mismatched
    for first in range(0, N, SEQUENCES * TOKENS):
        token = first + tl.arange(0, SEQUENCES * TOKENS)
        outside = ((token < origin) | (token >= last)) & (token < N)
        tl.store(gradient_ptr + token, tl.zeros(token.shape, tl.float32), mask=outside)


def preference_forward(
    logps: Tensor,  # (N,) float32
    ref_logps: Tensor,  # (S,) float32, summed log-probs; unpaired (S,) or (2·S,)
    offsets: Tensor,  # (len(ref_logps) + 1,) int64, rising, from 0 or more to N or less
    *,
    terms: Sequence[Term],  # 1 to MAX_TERMS, all paired or all unpaired
    options: PreferenceOptions,
    token_weights: Tensor | None = None,  # (N,) float32
    example_weights: Tensor | None = None,  # (B,) float32, unpaired (S,)
    lengths: Tensor | None = None,  # (len(ref_logps),) float32; without it the tokens owned
    is_desirable: Tensor | None = None,  # (S,) bool, unpaired
    kl: Tensor | None = None,  # () float32, kto; without it the mean of the mismatched
    nll_tokens: float | None = None,  # sft; without it the chosen's tokens
) -> Preference:
    """A weighted sum of losses, forward and gradient at once; nothing waits for the host.

    In PyTorch, `sums = torch.segment_reduce(logps * token_weights, "sum", offsets=offsets)`, the
    losses of `preference_terms` times `example_weights`, their means and the backward. `sft` takes
    neither of the weights. A normalised term divides log-ratios (scores, with an f-divergence) by
    the tokens of their sequence, or by `lengths`; rewards stay those of whole completions. Paired
    metrics are sums over the pairs; unpaired ones over the desirable (chosen) and the others.
    Tokens that no pair or completion owns have no gradient. Wrong offsets make the loss NaN, and
    nothing outside of the tensors is read or written. Traffic: log-probs are read once, their
    gradient is written once.
    """
    terms = [term._replace(loss=ALIASES.get(term.loss, term.loss)) for term in terms]
    vectors = (token_weights, example_weights, lengths, is_desirable, kl)
    _check(logps, ref_logps, offsets, terms, options, *vectors)
    assert nll_tokens is None or nll_tokens >= 0, nll_tokens
    N, S = logps.shape[0], ref_logps.shape[0]
    launch = PREFERENCE_LAUNCH[backend()]
    examples = S // 2 if is_desirable is None else is_desirable.shape[0]
    mismatched = is_desirable is not None and examples < S
    inputs = [logps if t is None else t.detach().contiguous() for t in vectors]
    if is_desirable is not None:
        inputs[3] = inputs[3].view(torch.uint8)
    gradient, totals = logps.new_empty(N), logps.new_empty(len(METRICS), 2)
    rewards, sums, loss = logps.new_empty(S), logps.new_empty(S), logps.new_empty(())
    positional = [
        logps.contiguous(), ref_logps.contiguous(), offsets.contiguous(), *inputs,
        gradient, rewards, sums, totals, loss, N, examples,
    ]  # fmt: skip
    given = (t is not None for t in (token_weights, example_weights, lengths, kl))
    with device_of(logps):
        _preference_kernel[(1,)](
            *positional,
            **scalars(terms, options, nll_tokens),
            **_constexprs(terms, options, *given, mismatched, launch),
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        )
    return Preference(loss, rewards, sums, totals, gradient)


def _constexprs(
    terms: Sequence[Term],
    options: PreferenceOptions,
    token_weights: bool,
    example_weights: bool,
    lengths: bool,
    kl: bool,
    mismatched: bool,
    launch: PreferenceLaunch,
) -> dict[str, Any]:
    """The kernel sums sft apart from the other terms, which have a place each."""
    others = [(term.loss, term.length_normalized) for term in terms if term.loss != "sft"]
    others += [("", False)] * (MAX_TERMS - len(others))
    wants_kl = any(term.loss == "kto" for term in terms)
    return {
        **{f"LOSS_{i}": loss for i, (loss, _) in enumerate(others)},
        **{f"NORMALIZE_{i}": normalized for i, (_, normalized) in enumerate(others)},
        "PAIRED": terms[0].loss in PAIRED,
        "SFT": any(term.loss == "sft" for term in terms),
        "DIVERGENCE": options.divergence(),
        "TOKEN_WEIGHTS": token_weights,
        "EXAMPLE_WEIGHTS": example_weights,
        "LENGTHS": lengths,
        "KL": "none" if not wants_kl else "given" if kl else "inside",
        "MISMATCHED": mismatched,
        "SEQUENCES": launch.sequences,
        "TOKENS": launch.tokens,
        "TILES": launch.tiles,
    }


def _check(
    logps: Tensor,
    ref_logps: Tensor,
    offsets: Tensor,
    terms: Sequence[Term],
    options: PreferenceOptions,
    token_weights: Tensor | None,
    example_weights: Tensor | None,
    lengths: Tensor | None,
    is_desirable: Tensor | None,
    kl: Tensor | None,
) -> None:
    N, S = logps.shape[0], ref_logps.shape[0]
    assert logps.dim() == ref_logps.dim() == 1, (logps.shape, ref_logps.shape)
    assert logps.dtype == ref_logps.dtype == torch.float32, (logps.dtype, ref_logps.dtype)
    assert offsets.shape == (S + 1,), (offsets.shape, S)
    assert offsets.dtype == torch.int64, offsets.dtype
    check_terms(terms, options)
    names = {term.loss for term in terms}
    if names <= {*PAIRED}:
        assert S % 2 == 0, S
        assert is_desirable is None
        assert "sft" not in names or example_weights is None, "sft takes no example_weights"
        examples = S // 2
    else:
        assert is_desirable is not None
        examples = is_desirable.shape[0]
        assert is_desirable.shape == (examples,), is_desirable.shape
        assert is_desirable.dtype == torch.bool, is_desirable.dtype
        assert S in (examples, 2 * examples), (S, examples)
        assert kl is not None or "kto" not in names or examples < S, (S, examples)
    sizes = ((token_weights, (N,)), (example_weights, (examples,)), (lengths, (S,)), (kl, ()))
    for tensor, shape in sizes:
        assert tensor is None or tensor.shape == shape, (tensor.shape, shape)
        assert tensor is None or tensor.dtype == torch.float32, tensor.dtype


# What the tests compile: each way of the kernel once, with the most that it holds side by side.
COMPILED = ("kto", "sigmoid alpha_divergence", "sigmoid weights", "sigmoid bco_pair sft weights")


def aot_configurations(backend: str) -> list[dict[str, Any]]:
    """Configurations that `preference_forward` can launch on `backend`, as in `ema`.

    Every loss alone, sigmoid and IPO in the other normalisation too, and what else the kernel
    branches on once each: any four losses can be summed.
    """
    alone = {loss: [Term(loss, 1.0, loss == "ipo")] for loss in (*PAIRED, *UNPAIRED)}
    several = [Term("sigmoid", 0.8), Term("bco_pair", 0.2), Term("sft", 1.0)]
    cases = [(loss, terms, {}) for loss, terms in alone.items()]
    cases += [
        ("sigmoid normalized", [Term("sigmoid", 1.0, True)], {}),
        ("ipo whole", [Term("ipo")], {}),
        ("ipo lengths", alone["ipo"], {"lengths": True}),
        ("kto kl", alone["kto"], {"kl": True}),
        ("kto kl mismatched", alone["kto"], {"kl": True, "mismatched": True}),
        ("sigmoid bco_pair sft", several, {}),
        ("sigmoid alpha_divergence", alone["sigmoid"], {"f_divergence": "alpha_divergence"}),
        ("sigmoid weights", alone["sigmoid"], {"token_weights": True, "example_weights": True}),
        ("sigmoid bco_pair sft weights", several, {"token_weights": True}),
    ]
    return [_configuration(name, terms, backend, **flags) for name, terms, flags in cases]


def _configuration(
    name: str,
    terms: Sequence[Term],
    backend: str,
    f_divergence: str = "reverse_kl",
    token_weights: bool = False,
    example_weights: bool = False,
    lengths: bool = False,
    kl: bool = False,
    mismatched: bool = False,
) -> dict[str, Any]:
    N, S = 16_384, 64
    launch, unpaired = PREFERENCE_LAUNCH[backend], terms[0].loss in UNPAIRED
    options = PreferenceOptions(0.1, f_divergence=f_divergence)
    mismatched = mismatched or (terms[0].loss == "kto" and not kl)
    flags = (token_weights, example_weights, lengths, kl, mismatched)
    constexprs = _constexprs(terms, options, *flags, launch)
    pointers = dict.fromkeys(_preference_kernel.arg_names[:13], "*fp32")
    pointers |= {"offsets_ptr": "*i64", "desirable_ptr": "*u8" if unpaired else "*fp32"}
    return {
        "name": f"preference {name}",
        "fn": _preference_kernel,
        "signature": {
            **pointers,
            "N": "i32",
            "examples": "i32",
            **dict.fromkeys(scalars(terms, options, None), "fp32"),
            **dict.fromkeys(constexprs, "constexpr"),
        },
        "constexprs": constexprs,
        "attrs": {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
        "options": {"num_warps": launch.num_warps},
        "representative": name in COMPILED,
        "shape": f"N={N} S={S}",
        **traffic(N, S, constexprs),
    }


def traffic(
    N: int,
    S: int,  # that offsets tell apart, mismatched ones too
    constexprs: dict[str, Any],
) -> dict[str, int]:
    """Bytes that the kernel asks for (a few offsets twice), and that any kernel must."""
    own = S // 2 if constexprs["MISMATCHED"] else S
    examples = own // 2 if constexprs["PAIRED"] else own
    # of a token: log-prob and gradient; of a sequence: reference, sum and reward; the results
    least = 8 * N + 12 * S + (2 * len(METRICS) + 1) * 4
    least += 4 * S * constexprs["LENGTHS"]
    least += 4 * examples * constexprs["EXAMPLE_WEIGHTS"] + 4 * (constexprs["KL"] == "given")
    least += own * (not constexprs["PAIRED"])
    weights = 4 * N * constexprs["TOKEN_WEIGHTS"]  # read again for the gradient
    bounds = 16 * S + 8 + 8 * constexprs["SFT"]
    return {"moved": least + 2 * weights + bounds, "minimum": least + weights + 8 * (S + 1)}
