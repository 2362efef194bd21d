"""One of several ranks, traced in one process: the others are made up.

`torch.distributed` has a process group for that ("fake"): its collectives return at once and write
nothing, which fake tensors, having no data, do not miss. The trainer, accelerate and FSDP2 run as
they do in a rank on a GPU, and what FSDP2 gathers, keeps for the next layer and frees is counted
when it does so. Rank 0 has the most: where rows do not divide, the last ranks have fewer of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

from tralign_fast.memory.live import HOST, LiveTensors

_FIRST = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@contextlib.contextmanager
def rank_of(ranks: int, *, fake: bool) -> Iterator[None]:
    """Inside, accelerate shards on CPUs, and this process is one of `ranks`: the first of them if
    tensors are fake; else a launcher has started all.

    Raises:
        RuntimeError: tensors are fake, and this process is a rank of others.
    """
    with sharding_on_cpus(), _first_of(ranks) if fake else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _first_of(ranks: int) -> Iterator[None]:
    if dist.is_initialized():
        raise RuntimeError("this process is one of several already")
    # registers the backend
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    with mock.patch.dict(os.environ, {**_FIRST, **sizes}), _states_of_its_own():
        dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=ranks)
        try:
            with (
                mock.patch.object(dist, "broadcast_object_list", _as_it_is),
                mock.patch.object(dist, "all_gather_object", _as_this_one),
                mock.patch.object(PartialState, "set_device", _set_device),
                mock.patch.object(FakeTensor, "data_ptr", _address, create=True),
            ):
                yield
        finally:
            dist.destroy_process_group()


def _as_it_is(objects: list[Any], *args: Any, **kwargs: Any) -> None:
    """What the first process has is what this one has."""


def _as_this_one(objects: list[Any], own: Any, *args: Any, **kwargs: Any) -> None:
    objects[:] = [own] * len(objects)


def _set_device(state: Any) -> None:
    """Fake tensors are on "cpu", which to them is not accelerate's "cpu:0"."""
    state.device = torch.device("cpu")


def _address(tensor: Tensor) -> int:
    """One that no other weight has: by it accelerate finds the shard of an optimizer's weight."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset()


@contextlib.contextmanager
def _states_of_its_own() -> Iterator[None]:
    """Inside, accelerate knows nothing of what this process was before, nor afterwards of this."""
    kept = [(kind, kind._shared_state.copy()) for kind in (PartialState, AcceleratorState)]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        yield
    finally:
        GradientState._reset_state()
        for kind, state in kept:
            kind._shared_state.clear()
            kind._shared_state.update(state)


@contextlib.contextmanager
def sharding_on_cpus() -> Iterator[None]:
    """Inside, accelerate shards models on CPUs, too, which it has closed. All that comes after is
    what runs on GPUs."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    with (
        mock.patch.object(AcceleratorState, "__init__", init_with_fsdp),
        mock.patch.object(_fsdp_init, "init_device_mesh", _mesh_of_cpus),
    ):
        yield


def _mesh_of_cpus(kind: str, *args: Any, **kwargs: Any) -> Any:
    """FSDP2's own choice is a GPU where there is one. A mesh looks for this process in a tensor of
    all ranks, which must have data."""
    with _disable_current_modes():
        return init_device_mesh("cpu", *args, **kwargs)


@contextlib.contextmanager
def shards_counted(live: LiveTensors) -> Iterator[None]:
    """Inside, what FSDP2 gathers, and what it reduces gradients in, is counted as "gathered"; a
    whole weight that it cuts up is on the host."""
    from tralign_fast.training.sharded_release import ShardedRelease

    def allocating(tag: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with live.tagging(tag):
                return function(*args, **kwargs)

        return call

    def taking(index: int, tag: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            live.tag(args[index], tag)
            return function(*args, **kwargs)

        return call

    def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with live.paused():
                return function(*args, **kwargs)

        return call

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        found = own_resize(storage, size)
        live.resized(storage)
        return found

    own_resize = torch.UntypedStorage.resize_
    parameter, reduce = fsdp.FSDPParam, fsdp.foreach_reduce
    meta = "_propagate_tensor_meta_non_cached"  # DTensor tries operators out on whole shapes
    replacements = [
        (fsdp, "foreach_all_gather", allocating("gathered", fsdp.foreach_all_gather)),
        (fsdp, "foreach_all_gather_copy_out",
         allocating("gathered", fsdp.foreach_all_gather_copy_out)),
        (fsdp, "foreach_reduce", taking(1, "gathered", allocating("gathered", reduce))),
        (parameter, "to_sharded_dtensor", taking(1, "gradients", parameter.to_sharded_dtensor)),
        (parameter, "_init_sharded_param", taking(1, HOST, parameter._init_sharded_param)),
        (ShardedRelease, "_step_group", allocating("optimizer", ShardedRelease._step_group)),
        (ShardingPropagator, meta, unseen(getattr(ShardingPropagator, meta))),
        (torch.UntypedStorage, "resize_", resize),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
