"""One of several ranks, traced in one process: the others are made up.

`torch.distributed` has a process group for that ("fake"): its collectives return at once and write
nothing, which fake tensors, having no data, do not miss. accelerate and FSDP2 run as they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
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

_RANK = {"RANK": "0", "LOCAL_RANK": "0"}


def cannot_be_traced() -> str | None:
    """Why no rank of several can be traced in this process, or None."""
    if not dist.is_available():
        return "this PyTorch was built without torch.distributed"
    if dist.is_initialized():
        return "this process is one of several already"
    return None


@contextlib.contextmanager
def first_of(ranks: int) -> Iterator[None]:
    """Inside, this process is the first of so many, on fake tensors."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  registers "fake"

    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    with mock.patch.dict(os.environ, {**_RANK, **sizes, **address}), _own_states():
        dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=ranks)
        try:
            with (
                mock.patch.object(dist, "broadcast_object_list", _as_it_is),
                mock.patch.object(dist, "all_gather_object", _as_this_one),
                mock.patch.object(PartialState, "set_device", _set_device),
                mock.patch.object(FakeTensor, "data_ptr", _storage_of, create=True),
            ):
                yield
        finally:
            dist.destroy_process_group()


def _set_device(state: Any) -> None:
    """Fake tensors are on "cpu", which to them is not accelerate's "cpu:0"."""
    state.device = torch.device("cpu")


def _storage_of(tensor: Tensor) -> int:
    """An address that no other weight has: by it accelerate finds the shard of a weight."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset()


def _as_it_is(objects: list[Any], *args: Any, **kwargs: Any) -> None:
    """What the first process has is what this one has."""


def _as_this_one(objects: list[Any], own: Any, *args: Any, **kwargs: Any) -> None:
    objects[:] = [own] * len(objects)


@contextlib.contextmanager
def _own_states() -> Iterator[None]:
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
    """A mesh finds this process in a tensor of all ranks, which must have data."""
    with _disable_current_modes():
        return init_device_mesh("cpu", *args, **kwargs)


@contextlib.contextmanager
def gathered_counted(live: LiveTensors) -> Iterator[None]:
    """Inside, what FSDP2 makes of shards and of gradients on their way counts as gathered."""
    from tralign_fast.training.sharded_release import ShardedRelease

    def tagged(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with live.tagging("gathered"):
                return function(*args, **kwargs)

        return call

    reduce = fsdp.foreach_reduce

    def reduced(parameters: Any, whole: Any, *args: Any, **kwargs: Any) -> Any:
        live.tag(list(whole), "gathered")
        with live.tagging("gathered"):
            return reduce(parameters, whole, *args, **kwargs)

    def shard(parameter: Any, tensor: Any) -> Any:
        live.tag(tensor, "gradients")
        return as_shard(parameter, tensor)

    def cut(parameter: Any, whole: Any, *args: Any, **kwargs: Any) -> None:
        live.tag(whole, HOST)
        cut_up(parameter, whole, *args, **kwargs)

    def released(*args: Any) -> None:
        with live.tagging("optimizer"):
            release(*args)

    def resized(storage: Any, size: int) -> Any:
        found = resize(storage, size)
        live.resized(storage)
        return found

    def unseen(*args: Any, **kwargs: Any) -> Any:
        with live.paused():
            return shapes(*args, **kwargs)

    resize = torch.UntypedStorage.resize_
    as_shard, release = fsdp.FSDPParam.to_sharded_dtensor, ShardedRelease._step_group
    cut_up = fsdp.FSDPParam._init_sharded_param
    shapes = ShardingPropagator._propagate_tensor_meta_non_cached
    with (
        mock.patch.object(fsdp, "foreach_all_gather", tagged(fsdp.foreach_all_gather)),
        mock.patch.object(fsdp, "foreach_all_gather_copy_out", tagged(fsdp.foreach_all_gather_copy_out)),
        mock.patch.object(fsdp, "foreach_reduce", reduced),
        mock.patch.object(fsdp.FSDPParam, "to_sharded_dtensor", shard),
        mock.patch.object(fsdp.FSDPParam, "_init_sharded_param", cut),
        mock.patch.object(ShardedRelease, "_step_group", released),
        mock.patch.object(torch.UntypedStorage, "resize_", resized, create=True),
        mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen),
    ):
        yield
