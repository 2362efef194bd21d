"""Log-probabilities of target tokens without a matrix of log-probabilities.

Letters: N scored tokens, H hidden size, V vocabulary.

The operator below is in `ops.head_operator`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from tralign_fast.ops import powers, tiles
from tralign_fast.ops.backend import pick_backend
from tralign_fast.ops.checks import check_arguments, logits_dtype, refuse_forward_mode
from tralign_fast.ops.head_operator import HeadOptions, is_fused, linear_logprobs_op
from tralign_fast.ops.logits_budget import budget_bytes
from tralign_fast.ops.statistics import STATISTICS
from tralign_fast.ops.transform import LogitTransform

_PLAIN = LogitTransform()


def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
    logits_budget_mb: float | None = None,
    vocab_filter: float | None = None,
    kept: str = "logits",
) -> Tensor:
    """Log-probabilities of `targets` under the LM head, without holding a matrix (N, V) of them.

    Equals, in fp32 whatever the dtype of the inputs:

        z = logit_scale * (hidden @ weight.T + bias)
        z = softcap * tanh(z / softcap)                    # if softcap
        log_softmax(z.float() / temperature, -1)[arange(N), targets]

    Logits are rounded to the dtype of the inputs (to that of autocast inside autocast), as a Linear
    layer does; sums, log-probs and the gradient of the logits are computed in fp32.

    Memory: at most `logits_budget_mb` of logits. What fits is kept for a gradient and overwritten
    by the backward: three matrix products in all, if that is everything. On a CPU the backward
    gives their memory back as it goes (`ops.cpu.pages`): the peak is the larger of logits and
    weight gradient, and a tile. The rest is recomputed tile by tile, a fourth product for these
    columns. Without a gradient, and where they will be recomputed, the Triton backend makes none
    of half-precision inputs: its forward is one kernel, in which they exist in registers alone. No
    fp32 buffer of (V, H); the gradient of a frozen tensor is not computed.

    `vocab_filter=ε` leaves out of the backward every column of the vocabulary that no token gives a
    probability of ε, targets apart, and puts their mass back in a correction of rank one (module
    `tralign_fast.ops.vocab_filter`): the backward's products shrink to the columns that stay. On
    SmolLM2's own samples the gradients are off by less than rounding them to bf16 at ε = 3e-5, and
    from 512 tokens on at 1e-4. After a backward, `ops.vocab_filter.last_vocab_filter()`
    tells how many columns stayed and the largest mass that a token lost; above 0.1 the backward is
    exact, with one warning. Log-probs are always exact. Choosing waits for the device once a tile.

    A weight that is a DTensor, cut along V over one dimension of its mesh (`Shard(0)`, any V), is
    used where it lies (module `tralign_fast.ops.vocab_parallel`): every process of that dimension
    calls this with the same hidden states and targets, gets the same log-probs and gradient of the
    hidden states, and the gradient of its own rows.

    Args:
        hidden: (N, H) hidden states of the scored positions, fp32, bf16 or fp16.
        weight: (V, H) of the LM head, the dtype of `hidden` (any, inside autocast).
        targets: (N,) int64 token ids in [0, V).
        bias: (V,) of the LM head.
        softcap: cap of the logits (Gemma-2: 30).
        logit_scale: factor of the logits (Cohere: logit_scale; Granite: 1 / logits_scaling).
        temperature: the scores are divided by it, after the cap.
        backend: "auto" (Triton on a GPU, else PyTorch), "torch" or "triton".
        logits_budget_mb: MiB of logits that may exist at once; 0 recomputes in the smallest tiles
            (256 columns; on a GPU 2,048 and 16 MiB). None: 1024; on a GPU, for a batch with more,
            up to 4096 and half of the memory that is free (module
            `tralign_fast.ops.logits_budget`).
        vocab_filter: ε in [0, 1), 3e-5 if in doubt; None and 0 leave no column out.
        kept: what is kept for the backward: "logits", or "powers" (Triton, bf16, no softcap, no
            vocab_filter): the forward stores exp(score), which the backward's products take as it
            is, without a pass over it (module `tralign_kernels.linear_powers`). As near to exact
            as with logits; not timed on a GPU so far.

    Returns:
        (N,) float32. N = 0 gives an empty tensor that can be differentiated.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a target lies outside the vocabulary
            (on a GPU, where looking would stall, such a target's log-prob is NaN).
        RuntimeError: a second backward through logits that the first one has overwritten, or one
            with create_graph=True.
    """
    transform = LogitTransform(logit_scale, softcap, temperature)
    return _run(
        hidden, weight, targets, bias, transform, backend, logits_budget_mb, vocab_filter, kept=kept
    )[0]  # fmt: skip


def linear_logprobs_and_statistics(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    wanted: Collection[str],
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = _PLAIN,
    backend: str = "auto",
    logits_budget_mb: float | None = None,
    vocab_filter: float | None = None,
    kept: str = "logits",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_logprobs`, and what is wanted of `STATISTICS` of the same distributions, (N,) each.

    With z the scores of the softmax (`transform` of the logits) and p = softmax(z):

        entropy            -Σ p·log p, nats
        log_sum_sq_probs   log Σ p²
        mean_logits        the mean of z over the vocabulary
        is_top1            bool, z.argmax() == target: the first of several largest scores

    fp32, without gradient, from the tiles of logits that the log-probs are made of, or with
    `kept="powers"` where the kernel has them in registers: no further product. In half precision
    `mean_logits` is of logits before they are rounded, with powers, and on the PyTorch backend
    without a softcap, where it is a product with the mean row of the weight.

    Raises:
        ValueError: a name that is none of `STATISTICS`; else as `linear_logprobs`.
    """
    if unknown := [name for name in wanted if name not in STATISTICS]:
        raise ValueError(f"statistics are {', '.join(STATISTICS)}, got {', '.join(unknown)}")
    logps, table = _run(
        hidden, weight, targets, bias, transform, backend, logits_budget_mb, vocab_filter,
        " ".join(wanted), kept,
    )  # fmt: skip
    found = dict(zip(wanted, table.unbind(0), strict=True))
    if "is_top1" in found:
        found["is_top1"] = found["is_top1"] > 0
    return logps, found


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    backend: str,
    logits_budget_mb: float | None,
    vocab_filter: float | None,
    statistics: str = "",
    kept: str = "logits",
) -> tuple[Tensor, Tensor]:
    """(log-probs (N,), statistics (number of names, N)), of arguments that may be wrong."""
    options = checked_options(
        hidden, weight, targets, bias, transform, backend, logits_budget_mb, vocab_filter,
        statistics, kept,
    )  # fmt: skip
    if is_cut(weight):
        from tralign_fast.ops.vocab_parallel import run_on_shards

        return run_on_shards(hidden, weight, targets, bias, options)
    logps, _, _, found = linear_logprobs_op(hidden, weight, targets, bias, *options)
    return logps, found


def checked_options(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    backend: str,
    logits_budget_mb: float | None,
    vocab_filter: float | None,
    statistics: str = "",
    kept: str = "logits",
) -> HeadOptions:
    """How the head's products are cut, for arguments that may be wrong."""
    check_arguments(hidden, weight, targets, bias, vocab_filter, logits_budget_mb)
    refuse_forward_mode("linear_logprobs", hidden, weight, bias)
    device, compute_dtype = hidden.device, logits_dtype(hidden, weight)
    backend = pick_backend(backend, device, compute_dtype)
    rows = hidden.shape[0]
    vocab = len(weight.to_local() if is_cut(weight) else weight)  # pyright: ignore[reportAttributeAccessIssue]
    wants = wants_grad(hidden, weight, bias)
    wanted = rows * vocab * compute_dtype.itemsize if wants else 0
    others = {"vocab_filter": vocab_filter, "a head cut up": is_cut(weight)}
    keeps_powers = powers.keeps_powers(
        kept, wants, backend, compute_dtype, weight, transform, others
    )
    tile, keep = tiles.plan(
        rows, vocab, compute_dtype, device, budget_bytes(logits_budget_mb, wanted, hidden),
        wants_grad=wants, wants_all_or_none=bool(vocab_filter),
        is_fused=is_fused(backend, compute_dtype, statistics, keeps_powers),
    )  # fmt: skip
    return HeadOptions(
        transform.numbers(), backend, compute_dtype, tile, keep, float(vocab_filter or 0.0),
        statistics, keeps_powers,
    )  # fmt: skip


def is_cut(weight: Tensor) -> bool:
    """Whether it is a DTensor, of which this process holds a part."""
    return hasattr(weight, "device_mesh")


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear_logprobs_naive(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The equation, with full logits in `dtype`, for tests and benchmarks."""
    z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
