"""Log-probs of tokens → DPO, IPO or KTO loss, its gradient, rewards and accuracy, in one launch.

Letters: N scored tokens, S sequences, B pairs, β the strength of the pull towards the reference, r
the log-ratio `log π_θ(y|x) - log π_ref(y|x)` of a sequence, Δ the difference of r in a pair.

Sequence s owns the tokens [offsets[s], offsets[s + 1]). Pairs are ordered as in a packed batch:
S = 2B, first B chosen, then B rejected. The losses, each a mean over the pairs (sequences for KTO):

    dpo   -(1-ε)·log σ(β·Δ) - ε·log σ(-β·Δ)      ε: label smoothing
    ipo   (Δ - 1/(2β))²
    kto   λ - λ·σ(±β·(r - max(KL, 0)))           +, λ of the desirable; -, λ of the undesirable

One program does all of it: 64 kB for 16,384 tokens, a few microseconds, for which the launches of
the same in PyTorch (some thirty) take longer than the work. Hence no atomics and no second pass:
sums are made in one order, and the mean over the pairs is there when the last pair is.
"""

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import backend, device_of

LOSSES = ("dpo", "ipo", "kto")


class PreferenceLaunch(NamedTuple):
    sequences: int  # that the program reads side by side
    tokens: int  # of each, per iteration
    num_warps: int


# 16 chosen and 16 rejected, 128 tokens of each at a time: 8 (4) loads of 4 bytes a thread in flight
# for both, so that a batch of 32 pairs of 512 tokens waits for memory 8 times.
PREFERENCE_LAUNCH = {
    "cuda": PreferenceLaunch(sequences=16, tokens=128, num_warps=8),
    "hip": PreferenceLaunch(sequences=16, tokens=128, num_warps=8),
}


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], relative error of a few units: x/(u - 1) undoes rounding to u."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))  # exp may overflow to inf: 0


@triton.jit
def _log_ratio(
    logps_ptr, ref_ptr, offsets_ptr, sequence, inside,
    NORMALIZE: tl.constexpr, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """(first token, length, what r counts for, r) of the sequences, (SEQUENCES,) each."""
    begin = tl.load(offsets_ptr + sequence, mask=inside, other=0)
    length = tl.load(offsets_ptr + sequence + 1, mask=inside, other=0) - begin
    sums = tl.zeros((SEQUENCES, TOKENS), tl.float32)
    for first in range(0, tl.max(length), TOKENS):  # pyright: ignore[reportArgumentType]
        token = first + tl.arange(0, TOKENS)
        own = token[None, :] < length[:, None]
        sums += tl.load(logps_ptr + begin[:, None] + token[None, :], mask=own, other=0.0)
    ratio = tl.sum(sums, axis=1) - tl.load(ref_ptr + sequence, mask=inside, other=0.0)
    share = tl.full((SEQUENCES,), 1.0, tl.float32)
    if NORMALIZE:
        share = 1.0 / length.to(tl.float32)  # no token: 0/0, NaN as in PyTorch
    return begin, length, share, ratio


@triton.jit
def _store_gradient(
    gradient_ptr, begin, length, value, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr
):
    for first in range(0, tl.max(length), TOKENS):  # pyright: ignore[reportArgumentType]
        token = first + tl.arange(0, TOKENS)
        own = token[None, :] < length[:, None]
        spread = tl.broadcast_to(value[:, None], (SEQUENCES, TOKENS))
        tl.store(gradient_ptr + begin[:, None] + token[None, :], spread, mask=own)


@triton.jit(do_not_specialize=["N", "examples"])
def _preference_kernel(
    logps_ptr,  # (N,) fp32
    ref_ptr,  # (S,) fp32
    offsets_ptr,  # (S + 1,) int64
    desirable_ptr,  # (S,) bool, KTO
    kl_ptr,  # () fp32, KTO
    gradient_ptr,  # (N,) fp32
    rewards_ptr,  # (S,) fp32
    losses_ptr,  # (2,) fp32: loss, accuracy
    N,
    examples,  # B, or S for KTO
    beta,
    smoothing,  # ε
    desirable_weight,
    undesirable_weight,
    LOSS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    losses = tl.zeros((SEQUENCES,), tl.float32)
    right = tl.zeros((SEQUENCES,), tl.float32)
    last = tl.load(offsets_ptr)
    for first in range(0, examples, SEQUENCES):
        example = first + tl.arange(0, SEQUENCES)
        inside = example < examples
        begin, length, share, ratio = _log_ratio(
            logps_ptr, ref_ptr, offsets_ptr, example, inside, NORMALIZE, SEQUENCES, TOKENS
        )
        reward = beta * ratio  # of whole completions, whatever the loss divides by
        ratio *= share
        tl.store(rewards_ptr + example, reward, mask=inside)
        if LOSS == "kto":
            desirable = tl.load(desirable_ptr + example, mask=inside, other=0) != 0
            sign = tl.where(desirable, 1.0, -1.0)
            weight = tl.where(desirable, desirable_weight, undesirable_weight)
            u = beta * sign * (ratio - tl.maximum(tl.load(kl_ptr), 0.0))
            loss = weight * _sigmoid(-u)
            slope = -weight * beta * sign * _sigmoid(u) * _sigmoid(-u)
            correct = sign * reward > 0.0
        else:
            other = examples + example
            other_begin, other_length, other_share, other_ratio = _log_ratio(
                logps_ptr, ref_ptr, offsets_ptr, other, inside, NORMALIZE, SEQUENCES, TOKENS
            )
            other_reward = beta * other_ratio
            tl.store(rewards_ptr + other, other_reward, mask=inside)
            delta = ratio - other_ratio * other_share
            if LOSS == "dpo":
                u = beta * delta
                loss = -(1.0 - smoothing) * _log_sigmoid(u) - smoothing * _log_sigmoid(-u)
                slope = beta * (smoothing * _sigmoid(u) - (1.0 - smoothing) * _sigmoid(-u))
            else:
                distance = delta - 0.5 / beta
                loss = distance * distance
                slope = 2.0 * distance
            correct = reward > other_reward
            other_slope = -slope * other_share / examples
            _store_gradient(gradient_ptr, other_begin, other_length, other_slope, SEQUENCES, TOKENS)
            last = tl.maximum(last, tl.max(other_begin + other_length))
        _store_gradient(gradient_ptr, begin, length, slope * share / examples, SEQUENCES, TOKENS)
        last = tl.maximum(last, tl.max(begin + length))
        losses += tl.where(inside, loss, 0.0)
        right += tl.where(inside & correct, 1.0, 0.0)
    tl.store(losses_ptr, tl.sum(losses) / examples)
    tl.store(losses_ptr + 1, tl.sum(right) / examples)
    # tokens of no sequence, as where shapes are padded
    for first in range(0, N, TOKENS):
        token = first + tl.arange(0, TOKENS)
        outside = (token < tl.load(offsets_ptr)) | (token >= last)
        tl.store(gradient_ptr + token, tl.zeros((TOKENS,), tl.float32), mask=outside & (token < N))


class Preference(NamedTuple):
    """What `preference_forward` returns, all float32."""

    loss: Tensor  # ()
    accuracy: Tensor  # (): share of pairs whose chosen has the larger reward; for KTO, of signs
    rewards: Tensor  # (S,), β·r of whole completions
    gradient: Tensor  # (N,), d loss / d logps


def preference_forward(
    logps: Tensor,  # (N,) float32
    ref_logps: Tensor,  # (S,) float32, summed log-probs
    offsets: Tensor,  # (S + 1,) int64, rising, from 0 or more to N or less
    *,
    loss: Literal["dpo", "ipo", "kto"],
    beta: float,
    label_smoothing: float = 0.0,  # DPO
    length_normalized: bool = False,
    is_desirable: Tensor | None = None,  # (S,) bool, KTO
    kl: Tensor | None = None,  # () float32, KTO
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Preference:
    """The losses of the module, forward and gradient at once; nothing waits for the host.

    In PyTorch, `sums = torch.segment_reduce(logps, "sum", offsets=offsets)`, a function of
    `tralign_fast.ops.losses` and its backward. `length_normalized` divides log-ratios by the tokens
    of their sequence (rewards stay those of whole completions). Tokens that no sequence owns have
    no gradient. Traffic: log-probs are read once, their gradient is written once.
    """
    N, S = logps.shape[0], ref_logps.shape[0]
    _check(logps, ref_logps, offsets, loss, is_desirable, kl)
    assert 0.0 <= label_smoothing < 0.5, label_smoothing
    assert beta > 0.0, beta
    gradient, rewards = logps.new_empty(N), logps.new_empty(S)
    losses = logps.new_empty(2)
    launch = PREFERENCE_LAUNCH[backend()]
    with device_of(logps):
        _preference_kernel[(1,)](
            logps.contiguous(),
            ref_logps.contiguous(),
            offsets.contiguous(),
            offsets if is_desirable is None else is_desirable.contiguous().view(torch.uint8),
            logps if kl is None else kl,
            gradient,
            rewards,
            losses,
            N,
            S if loss == "kto" else S // 2,
            float(beta),
            float(label_smoothing),
            float(desirable_weight),
            float(undesirable_weight),
            LOSS=loss,
            NORMALIZE=length_normalized,
            SEQUENCES=launch.sequences,
            TOKENS=launch.tokens,
            num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        )
    return Preference(losses[0], losses[1], rewards, gradient)


def _check(
    logps: Tensor,
    ref_logps: Tensor,
    offsets: Tensor,
    loss: str,
    is_desirable: Tensor | None,
    kl: Tensor | None,
) -> None:
    S = ref_logps.shape[0]
    assert loss in LOSSES, loss
    assert logps.dim() == ref_logps.dim() == 1, (logps.shape, ref_logps.shape)
    assert logps.dtype == ref_logps.dtype == torch.float32, (logps.dtype, ref_logps.dtype)
    assert offsets.shape == (S + 1,), (offsets.shape, S)
    assert offsets.dtype == torch.int64, offsets.dtype
    if loss == "kto":
        assert is_desirable is not None
        assert is_desirable.shape == (S,), is_desirable.shape
        assert is_desirable.dtype == torch.bool, is_desirable.dtype
        assert kl is not None
        assert kl.numel() == 1, kl.shape
        assert kl.dtype == torch.float32, kl.dtype
    else:
        assert S % 2 == 0, S


def aot_configurations(backend: str) -> list[dict[str, Any]]:
    """Every configuration that `preference_forward` can launch on `backend`, as in `ema`."""
    launch = PREFERENCE_LAUNCH[backend]
    N, S = 16_384, 64
    configurations = []
    for loss in LOSSES:
        for normalized in (False, True):
            constexprs = {
                "LOSS": loss,
                "NORMALIZE": normalized,
                "SEQUENCES": launch.sequences,
                "TOKENS": launch.tokens,
            }
            configurations.append(
                {
                    "name": f"preference {loss}" + " normalized" * normalized,
                    "fn": _preference_kernel,
                    "signature": {
                        "logps_ptr": "*fp32",
                        "ref_ptr": "*fp32",
                        "offsets_ptr": "*i64",
                        "desirable_ptr": "*u8" if loss == "kto" else "*i64",
                        "kl_ptr": "*fp32",
                        "gradient_ptr": "*fp32",
                        "rewards_ptr": "*fp32",
                        "losses_ptr": "*fp32",
                        "N": "i32",
                        "examples": "i32",
                        "beta": "fp32",
                        "smoothing": "fp32",
                        "desirable_weight": "fp32",
                        "undesirable_weight": "fp32",
                        **dict.fromkeys(constexprs, "constexpr"),
                    },
                    "constexprs": constexprs,
                    "attrs": {(i,): [["tt.divisibility", 16]] for i in range(8)},
                    "options": {"num_warps": launch.num_warps},
                    "representative": loss == "dpo" and normalized,
                    "shape": f"N={N} S={S}",
                    **traffic(N, S, loss == "kto", launch),
                }
            )
    return configurations


def traffic(N: int, S: int, kto: bool, launch: PreferenceLaunch) -> dict[str, int]:
    """Bytes that the kernel asks for (a few offsets twice), and that any kernel must."""
    # of a token: log-prob and gradient; of a sequence: reference, reward, and KTO's label
    vectors = 8 * N + (4 + 4 + kto) * S + 2 * 4
    bounds = 16 * S + 8 + 8 * triton.cdiv(N, launch.tokens)
    kl = 4 * triton.cdiv(S, launch.sequences) if kto else 0
    return {"moved": vectors + bounds + kl, "minimum": vectors + 8 * (S + 1) + 4 * kto}


def preference_naive(
    logps: Tensor,
    ref_logps: Tensor,
    offsets: Tensor,
    *,
    loss: str,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    is_desirable: Tensor | None = None,
    kl: Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Preference:
    """The equations of the module in `dtype`, the gradient by autograd."""
    x = logps.detach().to(dtype).requires_grad_()
    bounds = offsets.tolist()
    sums = torch.stack([x[a:b].sum() for a, b in pairwise(bounds)])
    whole = sums - ref_logps.to(dtype)
    ratio = whole / offsets.diff() if length_normalized else whole
    log_sigmoid = torch.nn.functional.logsigmoid
    if loss == "kto":
        assert is_desirable is not None
        assert kl is not None
        sign = torch.where(is_desirable, 1.0, -1.0).to(dtype)
        weight = torch.where(is_desirable, desirable_weight, undesirable_weight).to(dtype)
        losses = weight - weight * torch.sigmoid(beta * sign * (ratio - kl.to(dtype).clamp(min=0)))
        right = sign * whole > 0
    else:
        chosen, rejected = ratio.chunk(2)
        delta = chosen - rejected
        if loss == "dpo":
            losses = -(1 - label_smoothing) * log_sigmoid(beta * delta)
            losses = losses - label_smoothing * log_sigmoid(-beta * delta)
        else:
            losses = (delta - 1 / (2 * beta)) ** 2
        right = whole.chunk(2)[0] > whole.chunk(2)[1]
    (gradient,) = torch.autograd.grad(losses.mean(), x)
    rewards = beta * whole.detach()
    return Preference(losses.mean().detach(), right.to(dtype).mean(), rewards, gradient)
