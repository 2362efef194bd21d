"""Past adapters beside a GPU: what a move copies and what it holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference.test_adapter import lora, shake
from tralign_fast import TrustRegion
from tralign_fast.ops.backend import pretend_gpu
from tralign_fast.reference import room
from tralign_fast.reference.adapter import AdapterReference
from tralign_fast.reference.deltas import LayerDelta


class Copies(TorchDispatchMode):
    """Counts what copies: between tensors, to a device, along a rank."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in ("copy_", "_to_copy", "clone", "cat"):
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


@pytest.fixture
def made(monkeypatch):
    """As beside a GPU: pieces of host memory are pinned, of which there is a list."""
    pieces = []

    def allocate(size, pinned):
        assert pinned
        pieces.append(torch.full((size,), 0xFF, dtype=torch.uint8))  # NaN of every dtype
        return pieces[-1]

    monkeypatch.setattr(room, "_allocate", allocate)
    monkeypatch.setattr(LayerDelta, "is_apart", True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    return pieces


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_moves_of_a_policy_on_a_gpu_use_their_memory_again(alpha, tiny_llama, made, monkeypatch):
    """As beside a GPU, whose factors come to the host: a copy each, and the same bits."""
    policies = [lora(tiny_llama, r=1) for _ in range(2)]
    staged = AdapterReference(policies[1], TrustRegion(alpha, 2), tolerance=1e-2)
    with monkeypatch.context() as patch:
        patch.setattr(LayerDelta, "is_apart", False)
        patch.setattr(room, "_allocate", lambda size, _: torch.empty(size, dtype=torch.uint8))
        plain = AdapterReference(policies[0], TrustRegion(alpha, 2), tolerance=1e-2)
        for step in range(3):
            shake(policies[0], step, 0.3)
            plain.sync()
    factors = sum(len(delta.factors) for delta in staged._deltas.values())
    count = []
    for step in range(10):
        if step >= 3:
            shake(policies[0], step, 0.3)
            plain.sync()
        shake(policies[1], step, 0.3)
        taken = {t.data_ptr() for d in staged._deltas.values() for t in d.held()}
        with Copies() as copies:
            staged.sync()
        if any(delta._matrix is None for delta in staged._deltas.values()):
            assert copies.names.count("copy_") == factors
        held = [t.data_ptr() for d in staged._deltas.values() for t in d.held()]
        assert len(set(held)) == len(held)  # nobody's memory is another's
        assert alpha < 1 or taken == {*held}
        count.append(len(made))
        if step >= 2:
            for name, delta in plain._deltas.items():
                ours, theirs = staged._deltas[name].state(), delta.state()
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[part], theirs[part]) for part in theirs)
    assert count[-1] == count[-3] > 0  # once the number of past adapters stands still
    assert alpha < 1 or count[-1] == 1


def test_memory_of_the_next_move_is_made_beside_the_steps(tiny_llama, made):
    """A soft move finds it pinned: it makes none itself, but for the thread's."""
    policy = lora(tiny_llama, r=1)
    reference = AdapterReference(policy, TrustRegion(0.6, 2))
    for step in range(3):
        reference._room._maker.join()
        before, ready = len(made), len(reference._room._ready)
        assert ready == 1
        shake(policy, step)
        for delta in reference._deltas.values():
            delta.fetch(step + 2)
            delta.move([1.0 / (step + 2)] * (step + 2))
        assert len(made) == before
        reference._weights = [1.0 / (step + 2)] * (step + 2)
        reference._make_room()


@pytest.mark.parametrize("moves", [0, 2])
def test_a_sweep_brings_the_factors_in_few_copies(moves, tiny_llama, made):
    """To a device without memory: the policy's size at once, and more of it by groups."""
    policy = lora(tiny_llama, r=1)
    reference = AdapterReference(policy, TrustRegion(0.6, 2))
    for step in range(moves):
        shake(policy, step)
        reference.sync()
    deltas = list(reference._deltas.values())
    own = sum(p.nbytes for d in deltas for p in d.factors)
    held = sum(t.nbytes for d in deltas for t in d.held())
    stage = room.Stage(own if moves == 0 else own // 2)
    for delta in deltas:
        stage.add(delta, delta.held())
    device = torch.device("meta")
    with Copies() as copies:
        for _ in range(2):  # forwards of one sweep
            for delta in deltas:
                down, up = stage.get(delta, device, LayerDelta._join)
                state = delta.state()
                assert (down.device, down.shape, up.shape) == (
                    device, state["down"].shape, state["up"].shape,
                )  # fmt: skip
    sent = copies.names.count("_to_copy")
    if moves == 0:
        assert held == own
        assert sent == 1
    else:
        groups = len(stage._groups)
        assert held == 3 * own
        assert 6 <= groups < len(deltas)
        assert sent <= 2 * groups * (moves + 2)  # each set's part, once more where a piece ends


def test_a_trace_brings_the_factors_in_as_a_gpu_does(tiny_llama):
    """Its one device is both: what is on the host is copied, by groups."""
    reference = AdapterReference(lora(tiny_llama, r=1), TrustRegion(0.6, 2))
    deltas = list(reference._deltas.values())
    own = sum(p.nbytes for d in deltas for p in d.factors)
    with pretend_gpu():
        stage = reference._stage()
        there = stage.get(deltas[0], torch.device("cpu"), LayerDelta._join)
    assert len(stage._groups) == 1
    for kept, moved in zip(deltas[0].held(), there, strict=True):
        assert torch.equal(kept, moved)
        assert kept.untyped_storage().data_ptr() != moved.untyped_storage().data_ptr()
    reference.sync()
    with pretend_gpu():
        groups = reference._stage()._groups
    sizes = [sum(t.nbytes for held in group.values() for t in held) for group in groups]
    assert len(groups) > 8
    assert all(s <= own // 8 or len(g) == 1 for s, g in zip(sizes, groups, strict=True))
    assert len(reference._stage()._groups) == 1  # on a CPU


def test_tensors_side_by_side_are_one_piece_of_bytes():
    own = room.Room(4096)
    tensors = [own.take(s, d, False) for s, d in (((3, 5), torch.float32), ((7,), torch.bfloat16))]
    apart = torch.ones(4)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape))
    assert room._runs([tensors[1], apart, tensors[0]]) in ([[2, 0], [1]], [[1], [2, 0]])
    flat = room._bytes_from(*tensors)
    assert torch.equal(flat[:60].view(torch.float32).view(3, 5), tensors[0])
    assert torch.equal(flat[256:].view(torch.bfloat16), tensors[1])
    own.give(tensors)
    again = own.take((7,), torch.bfloat16, False)
    assert again.data_ptr() == tensors[1].data_ptr()


@pytest.mark.parametrize("tolerance", [1e-6, 1e-2])
def test_past_adapters_are_cut_at_the_tolerance(tolerance, tiny_llama):
    policy = lora(tiny_llama, r=1, target_modules=["up_proj"])
    schedule = TrustRegion(0.6, 1)
    reference = AdapterReference(policy, schedule, tolerance=tolerance)
    (delta,) = [d for name, d in reference._deltas.items() if ".0." in name]
    down, up = delta.factors
    truth, largest = (up.double() @ down.double()).detach(), 0.0
    for step in range(30):
        shake(policy, step, 0.3)
        reference.sync()
        product = (up.double() @ down.double()).detach()
        truth, largest = truth.lerp(product, 0.6), max(largest, float(product.norm()))
    assert sum(reference._weights) == pytest.approx(1)
    terms = math.ceil(math.log(tolerance) / math.log(1 - 0.6))
    assert len(reference._weights) == terms
    state = delta.state()
    assert state["down"].shape == (terms, 32)
    held = state["up"].double() * torch.tensor(reference._weights) @ state["down"].double()
    error = float((held - truth).norm())
    assert error < 2 * tolerance * largest + 1e-6
    assert error > 0.01 * tolerance * largest  # the cut is there, and no finer than stated


def test_a_layer_holds_no_more_than_its_weight(tiny_llama):
    policy = lora(tiny_llama, r=4, target_modules=["q_proj"])
    reference = AdapterReference(policy, TrustRegion(0.01, 1))
    for step in range(10):
        shake(policy, step)
        reference.sync()
        for delta in reference._deltas.values():
            assert sum(t.numel() for t in delta.state().values()) <= 32 * 32
            assert delta.state().keys() == ({"down", "up"} if step < 3 else {"up"})
    assert len(reference._weights) == 11  # all of them count: none is cut
