"""What the statistics of a softmax are summed up from, column by column and part by part.

Of scores z and a number that none of them exceeds, the pivot:

    mass     Σ exp(z - pivot)
    energy   Σ exp(z - pivot) · (z - pivot)
    squares  Σ exp(z - pivot)²

With the largest score as pivot, the entropy is log(mass) - energy / mass, two numbers that are not
negative, and Σ p² is squares / mass². The names of the running statistics are in `logprob`.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .launch import exp


@triton.jit
def distance_of(z, pivot):
    """Of scores from the pivot, finite: a masked column has no power, and 0 times infinity is NaN.

    A maximum, which has no predicate to keep, where `tl.where` has one of every column. It passes
    over a NaN, which the score's power keeps.
    """
    return tl.maximum(z - pivot, -3e38)


@triton.jit
def moved_energy(energy, mass, peak, pivot):
    """Energy about a pivot that is no lower, of that about `peak`, with its mass."""
    shift = tl.where(peak == -float("inf"), 0.0, peak - pivot)
    return (energy + mass * shift) * exp(peak - pivot)


@triton.jit
def fold_statistics(
    statistics_ptr,  # (5, N) fp32, running, at the row: see `logprob_forward_`
    stride,
    before,  # share of the mass of the columns so far
    new,  # share of those of the tile
    mass,  # of the tile: Σ exp(score - peak)
    energy,  # Σ exp(score - peak) · (score - peak)
    squares,  # Σ exp(score - peak)²
    peak,  # largest score of the tile
    is_top1,  # whether that is the target's
    total,  # sum of scores of the tile
    mask=None,
):
    # of a mixture of two distributions that share no column: each part's own entropy, and that of
    # the choice between them
    mass = tl.where(mass == 0.0, 1.0, mass)
    entropy = tl.log(mass) - energy / mass
    old = tl.load(statistics_ptr, mask=mask)
    old = before * (old - tl.log(tl.where(before == 0.0, 1.0, before)))
    own = new * (entropy - tl.log(tl.where(new == 0.0, 1.0, new)))
    tl.store(statistics_ptr, old + own, mask=mask)
    statistics_ptr += stride
    old = before * before * tl.load(statistics_ptr, mask=mask)
    tl.store(statistics_ptr, old + new * new * (squares / (mass * mass)), mask=mask)
    statistics_ptr += stride
    old_peak = tl.load(statistics_ptr, mask=mask)
    tl.store(statistics_ptr, tl.maximum(old_peak, peak), mask=mask)
    statistics_ptr += stride
    old = tl.load(statistics_ptr, mask=mask)
    tl.store(statistics_ptr, tl.where(peak > old_peak, tl.where(is_top1, 1.0, 0.0), old), mask=mask)
    statistics_ptr += stride
    old = tl.load(statistics_ptr, mask=mask)
    tl.store(statistics_ptr, old + total, mask=mask)
