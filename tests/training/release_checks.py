"""What four processes check of gradients that are released on FSDP2's shards, without a trainer."""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tralign_fast.training import optimizer_kernels
from tralign_fast.training.block_adafactor import BlockAdafactor
from tralign_fast.training.sharded_release import ShardedRelease

ADAFACTOR = {"lr": 0.05, "weight_decay": 0.1, "relative_step": False}
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adafactor": lambda p: BlockAdafactor(p, scale_parameter=False, **ADAFACTOR),
    "Adafactor, scaled": lambda p: BlockAdafactor(p, scale_parameter=True, **ADAFACTOR),
}


class Layer(nn.Module):
    """A stack of three matrices, one for each of three "experts", then a linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, inputs, inputs) / 4)
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(torch.einsum("bi,eij->bj", x, self.experts)))


def models(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A whole model and its copy in shards: four do not divide its sizes, and of the last matrix
    the fourth process has nothing."""
    torch.manual_seed(0)
    whole = nn.Sequential(Layer(6, 10), Layer(10, 5), nn.Linear(5, 3)).to(dtype)
    cut = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in cut:
        fully_shard(layer, mesh=mesh)
    return whole, fully_shard(cut, mesh=mesh)


def check_steps() -> None:
    """The weights of a whole model, step after step; no gradient outlives its group's hooks."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, factory in OPTIMIZERS.items():
        whole, cut = models()
        plain, released = factory(whole.parameters()), ShardedRelease(factory(cut.parameters()))
        released.attach(cut)
        alive = []
        for p in cut.parameters():
            p.register_post_accumulate_grad_hook(
                lambda _, cut=cut, alive=alive: alive.append(
                    sum(q.grad is not None for q in cut.parameters())
                )
            )
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(world * 2, 6, generator=generator)
            whole(x).square().mean().backward()
            plain.step()
            plain.zero_grad()
            cut(x[2 * rank : 2 * rank + 2]).square().mean().backward()
            assert not any(p.grad is not None for p in cut.parameters()), name
            released.step()
        assert max(alive) <= 2, (name, alive)  # a layer has three: the third one's hook steps
        for expected, found in zip(whole.parameters(), cut.parameters(), strict=True):
            torch.testing.assert_close(found.full_tensor(), expected, rtol=2e-5, atol=2e-6)


def check_numbers_sent() -> None:
    """One all-reduce a group, of as few numbers as its docstring says."""
    sizes: list[int] = []
    real = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted
    try:
        for name, expected in (
            ("AdamW", [1, 1, 1]),
            # a flag; U² of the bias and of the stack; 2·C + 1 of the matrix
            ("Adafactor", [1 + 1 + 2 * 5 + 1, 1 + 2 + 2 * 10 + 1, 1 + 2 + 2 * 6 + 1]),
        ):
            _, cut = models()
            released = ShardedRelease(OPTIMIZERS[name](cut.parameters()))
            released.attach(cut)
            sizes.clear()
            cut(torch.ones(2, 6)).sum().backward()
            assert sizes == expected, (name, sizes)
            released.step()
            assert sizes == expected, (name, sizes)
    finally:
        torch.distributed.all_reduce = real


def check_bad_gradient() -> None:
    """What is infinite on one process alone leaves the step out on all, from that layer on."""
    for name, factory in OPTIMIZERS.items():
        _, cut = models()
        released = ShardedRelease(factory(cut.parameters()))
        released.attach(cut)
        before = [p.full_tensor().clone() for p in cut.parameters()]
        if torch.distributed.get_rank() == 1:

            def spoil(parameter: Any) -> None:
                parameter.grad.to_local().fill_(math.inf)

            first = cut[1].linear.weight
            hooks = first._post_accumulate_grad_hooks
            handle = first.register_post_accumulate_grad_hook(spoil)
            hooks.move_to_end(handle.id, last=False)
        cut(torch.ones(2, 6)).sum().backward()
        assert float(released.found_inf) == 1, name
        released.step()
        assert float(released.found_inf) == 0, name
        named = zip(cut.named_parameters(), before, strict=True)
        moved = {n: not torch.equal(p.full_tensor(), b) for (n, p), b in named}
        assert {n for n, m in moved.items() if m} == {"2.weight", "2.bias"}, (name, moved)
        released.state_dict()  # settles what the kernels have counted on the device
        if "Adafactor" in name:
            assert {len(s) > 0 for s in released.state.values()} == {True}
            assert len(released.state) == 2, name


def check_rounding() -> None:
    """Random bits of shards are other ones on every process, and the common generator stays so."""
    cut = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        cut.weight.fill_(1.0)
    cut = fully_shard(cut, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    options = {"lr": 2e-3, "relative_step": False, "scale_parameter": False}
    released = ShardedRelease(BlockAdafactor(cut.parameters(), **options))
    released.attach(cut)
    torch.manual_seed(0)
    cut(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
    released.step()
    weight = cut.weight.full_tensor()
    parts = weight.view(torch.distributed.get_world_size(), -1)
    assert len(parts.unique(dim=0)) == len(parts), parts
    assert 0.99 < float(weight.float().mean()) < 1.0
    drawn = torch.rand(1)
    gathered = [torch.empty_like(drawn) for _ in parts]
    torch.distributed.all_gather(gathered, drawn)
    assert len({float(g) for g in gathered}) == 1


def check_refused() -> None:
    whole, cut = models()
    released = ShardedRelease(torch.optim.AdamW([*cut.parameters()]))
    with pytest.raises(ValueError, match=r"has not sharded 0\.experts"):
        released.attach(whole)
    with pytest.raises(ValueError, match="no step on FSDP2's shards"):
        ShardedRelease(torch.optim.Adafactor([*cut.parameters()]))


CHECKS = (check_steps, check_numbers_sent, check_bad_gradient, check_rounding, check_refused)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":  # all that has kernels steps in them
        optimizer_kernels.pick_backend = lambda backend, device: "triton"
    for check in CHECKS:
        check()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    main()
    torch.distributed.destroy_process_group()
