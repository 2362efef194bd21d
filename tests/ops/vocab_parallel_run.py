"""What each of several processes runs for `tests/ops/test_vocab_parallel.py`.

    torchrun --nproc_per_node 2 -m tests.ops.vocab_parallel_run FILE

Writes FILE: what every collective of one forward and backward sent.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tralign_fast import linear_logprobs
from tralign_fast.ops.logprobs import linear_logprobs_and_statistics, linear_logprobs_naive
from tralign_fast.ops.statistics import STATISTICS
from tralign_fast.ops.transform import LogitTransform

N, H = 7, 16
CAPPED = {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}
# V, options of the op, dtype, factor of the weight
CASES = {
    "even": (64, {}, torch.float32, 1.0),
    "uneven": (61, {}, torch.float32, 1.0),
    "a process without columns": (5, {}, torch.float32, 1.0),
    "recomputed": (600, {"logits_budget_mb": 0}, torch.float32, 1.0),
    "capped": (61, CAPPED, torch.float32, 1.0),
    "large logits": (61, {}, torch.float32, 300.0),
    "bf16": (61, {}, torch.bfloat16, 1.0),
}


@contextmanager
def counted():
    """What the collectives of `torch.distributed` were given, in order: (name, bytes sent)."""
    seen, own = [], {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def all_reduce(tensor, **options):
        seen.append(("all_reduce", tensor.nbytes))
        return own["all_reduce"](tensor, **options)

    def all_gather(parts, tensor, **options):
        seen.append(("all_gather", tensor.nbytes))
        return own["all_gather"](parts, tensor, **options)

    with pytest.MonkeyPatch.context() as patch, CommDebugMode() as others:
        patch.setattr(dist, "all_reduce", all_reduce)
        patch.setattr(dist, "all_gather", all_gather)
        yield seen
    kinds = {str(kind) for kind in others.get_comm_counts()}
    assert not [k for k in kinds if "c10d_functional" in k], kinds  # DTensor's own


def inputs(vocab, dtype, factor):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=g).to(dtype)
    weight = (torch.randn(vocab, H, generator=g) * factor).to(dtype)
    bias = torch.randn(vocab, generator=g).to(dtype)
    targets = torch.randint(0, vocab, (N,), generator=g)
    targets[:2] = torch.tensor([0, vocab - 1])
    return hidden, weight, bias, targets, torch.randn(N, generator=g)


def cut(tensor, mesh):
    return distribute_tensor(tensor, mesh, [Shard(0)]).detach().requires_grad_()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_case(mesh, vocab, options, dtype, factor) -> None:
    hidden, weight, bias, targets, grad = inputs(vocab, dtype, factor)
    one = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    many = [hidden.clone().requires_grad_(), cut(weight, mesh), cut(bias, mesh)]
    exact = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    numbers = {k: v for k, v in options.items() if k != "logits_budget_mb"}
    found = []
    for leaves, function, given in (
        (one, linear_logprobs, options),
        (many, linear_logprobs, options),
        (exact, linear_logprobs_naive, numbers),
    ):
        logps = function(leaves[0], leaves[1], targets, bias=leaves[2], **given)
        gradients = torch.autograd.grad(logps, leaves, grad.to(logps))
        found.append([logps.detach(), *map(whole, gradients)])
    for ours, alone, truth in zip(found[1], found[0], found[2], strict=True):
        assert ours.dtype == alone.dtype
        assert ours.shape == truth.shape
        # no further from the exact numbers than one process is, and a rounding of the largest
        allowed = 2 * (alone.double() - truth).abs().max()
        allowed += torch.finfo(ours.dtype).eps * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= allowed
    held = [torch.empty_like(found[1][0]) for _ in range(dist.get_world_size())]
    dist.all_gather(held, found[1][0])
    assert all(torch.equal(held[0], other) for other in held)  # the same bits everywhere


def check_statistics(mesh) -> None:
    for vocab, options in ((61, {}), (5, {}), (61, CAPPED)):
        for count in (N, 3 * H):  # beyond H the mean of the logits is a product with weight sums
            hidden, weight, bias, targets, _ = inputs(vocab, torch.float32, 1.0)
            hidden = hidden.repeat(-(-count // N), 1)[:count]
            targets = targets.repeat(-(-count // N))[:count]
            weight[vocab - 1] = weight[0]  # a draw between the first process and the last
            bias[vocab - 1] = bias[0]
            names = {"logit_scale": "scale"}
            transform = LogitTransform(**{names.get(k, k): v for k, v in options.items()})
            given = {"transform": transform}
            alone = linear_logprobs_and_statistics(
                hidden, weight, targets, STATISTICS, bias=bias, **given
            )
            logps, ours = linear_logprobs_and_statistics(
                hidden, cut(weight, mesh), targets, STATISTICS, bias=cut(bias, mesh), **given
            )
            torch.testing.assert_close(logps.detach(), alone[0], rtol=1e-6, atol=1e-6)
            for name in STATISTICS:
                torch.testing.assert_close(ours[name], alone[1][name], rtol=1e-5, atol=1e-5)


def check_parts(mesh) -> None:
    """Each input alone with a gradient, no token at all, and what is refused."""
    hidden, weight, bias, targets, grad = inputs(61, torch.float32, 1.0)
    cut_weight = cut(weight, mesh)
    logps = linear_logprobs(hidden, cut_weight, targets)
    (d_weight,) = torch.autograd.grad(logps, [cut_weight], grad)
    whole_weight = weight.clone().requires_grad_()
    linear_logprobs(hidden, whole_weight, targets).backward(grad)
    torch.testing.assert_close(whole(d_weight), whole_weight.grad, rtol=1e-5, atol=1e-6)
    frozen = cut_weight.detach()
    free = hidden.clone().requires_grad_()
    linear_logprobs(free, frozen, targets).backward(grad)
    alone = hidden.clone().requires_grad_()
    linear_logprobs(alone, weight, targets).backward(grad)
    torch.testing.assert_close(free.grad, alone.grad, rtol=1e-5, atol=1e-6)
    nothing = linear_logprobs(hidden[:0], cut_weight, targets[:0])
    (d_weight,) = torch.autograd.grad(nothing.sum(), [cut_weight])
    assert whole(d_weight).abs().max() == 0
    wrong = targets.clone()
    wrong[3] = 61
    with pytest.raises(ValueError, match=r"target 61 of row 3 is outside the vocabulary \[0, 61\)"):
        linear_logprobs(hidden, cut_weight, wrong)
    with pytest.raises(ValueError, match=r"vocab_filter=0\.1 cannot choose among columns"):
        linear_logprobs(hidden, cut_weight, targets, vocab_filter=0.1)
    with pytest.raises(ValueError, match="cut along the vocabulary"):
        linear_logprobs(hidden, distribute_tensor(weight, mesh, [Shard(1)]), targets)
    with pytest.raises(ValueError, match="a bias that is cut up as the weight is"):
        linear_logprobs(hidden, cut_weight, targets, bias=bias)
    copies = distribute_tensor(weight, mesh, [Replicate()])
    with pytest.raises(ValueError, match="cut along the vocabulary"):
        linear_logprobs(hidden, copies, targets)


def traffic(mesh):
    hidden, weight, _, targets, grad = inputs(64, torch.float32, 1.0)
    hidden.requires_grad_()
    weight = cut(weight, mesh)
    with counted() as seen:
        linear_logprobs(hidden, weight, targets).backward(grad)
    return seen


def main(file: Path) -> None:
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for case in CASES.values():
        check_case(mesh, *case)
    check_statistics(mesh)
    check_parts(mesh)
    seen = traffic(mesh)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
