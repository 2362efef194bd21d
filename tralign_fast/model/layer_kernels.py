"""Kernels that other libraries have for a model's layers: norms, gated MLPs, rotary embeddings.

Where a library is installed its kernels run by default on a GPU, each where it was tried out on the
model's own modules first (`kernel_probe`); without one, PyTorch's own kernel for norms. What a
kernel may stand for is decided by what a module computes, not by its model's name; only single
modules are changed, no class and no module of Python. While PyTorch compiles, the modules' own
forwards run: there the compiler fuses.

Letters: H hidden, I intermediate size, T tokens, D head size.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tralign_fast.model import kernel_probe
from tralign_fast.model.kernel_probe import Unlike
from tralign_fast.model.patching import Patches, has_forward, runs_only
from tralign_fast.model.rotary import (
    FEWER_OPERATORS,
    rotary_of,
    unless_compiled,
    with_rotary,
)
from tralign_fast.ops.backend import device_kind, warn_once

LAYER_KERNELS = ("auto", "liger", "none")
KINDS = ("norm", "mlp", "rotary")
OLDEST_LIGER = "0.8.1"
# Fake tensors: a traced step is the real one. No other class: shards, quantised weights.
_PLAIN = frozenset((Tensor, nn.Parameter, FakeTensor))
_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))


def use_layer_kernels(
    model: nn.Module, choice: str | Collection[str], run: Callable[[], Any]
) -> Callable[[], None]:
    """Runs the model's norms, gated MLPs and rotary embeddings by a library's kernels; returns its
    undo.

    A kernel that is not as good as the model's own code is left out, with one warning that names
    the library and the kernel.

    Args:
        choice: one of `LAYER_KERNELS`, or the kinds of kernels that are asked for, of `KINDS`.
        run: a forward of the model on a few tokens.

    Raises:
        ValueError: an unknown choice.
    """
    patches = Patches()
    kinds = _kinds(choice)
    parameter = next(model.parameters())
    if not kinds or not _can_run(parameter, asked=choice != "auto"):
        return patches.undo
    library = _liger()
    find = {"norm": _norms, "mlp": _mlps, "rotary": functools.partial(_attentions, run=run)}
    if library is None:
        if choice != "auto" or not _has_fused_norm():
            return patches.undo
        library, kinds = f"PyTorch {torch.__version__}", ("norm",)
        find = {"norm": functools.partial(_norms, kernels=_torch_norm)}
    for kind in kinds:
        try:
            for module, forward in find[kind](model):
                patches.forward(module, f"{kind} kernel", forward)
        except Unlike as why:
            warn_once(
                f"{library}: its kernel for {_TITLES[kind]} is left out ({why}): the model's own "
                "code runs"
            )
    return patches.undo


_TITLES = {"norm": "RMSNorm", "mlp": "gated MLPs", "rotary": "rotary embeddings"}


def _kinds(choice: str | Collection[str]) -> Collection[str]:
    if isinstance(choice, str):
        if choice not in LAYER_KERNELS:
            raise ValueError(
                f"layer_kernels: expected one of {', '.join(LAYER_KERNELS)}, got {choice!r}"
            )
        return () if choice == "none" else KINDS
    for kind in choice:
        if kind not in KINDS:
            raise ValueError(f"layer_kernels: expected kinds of {', '.join(KINDS)}, got {kind!r}")
    return choice


# Liger's names of its kernels; those of the head and the loss, which are this library's own
_LIGER_NAMES = {"rms_norm": "norm", "swiglu": "mlp", "geglu": "mlp", "rope": "rotary"}
_NOT_LAYERS = ("cross_entropy", "fused_linear_cross_entropy")


def kinds_of_liger(config: dict[str, Any] | None) -> tuple[str, ...]:
    """The kinds of kernels that are left by `liger_kernel_config`, whose switches are on unless one
    is False.

    Raises:
        ValueError: a switch that is not known, or the one of Liger's head.
    """
    config = config or {}
    if config.get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config: fused_linear_cross_entropy=True would replace the LM head of "
            "tralign-fast; leave it out"
        )
    if unknown := [name for name in config if name not in (*_LIGER_NAMES, *_NOT_LAYERS)]:
        raise ValueError(
            f"liger_kernel_config: expected some of {', '.join(_LIGER_NAMES)}, got {unknown[0]!r}"
        )
    left_out = {_LIGER_NAMES.get(name) for name, wanted in config.items() if not wanted}
    return tuple(kind for kind in KINDS if kind not in left_out)


def _can_run(parameter: Tensor, asked: bool) -> bool:
    """Whether kernels can run where the model is; says so where they were asked for."""
    kind = device_kind(parameter.device)
    interpreted = kind == "cpu" and asked and os.environ.get("TRITON_INTERPRET") == "1"
    if kind == "cuda" or interpreted:
        return True
    if asked:
        warn_once(
            f"layer_kernels: Liger's kernels run on a GPU, and the model is on {kind}: its own "
            "code runs"
        )
    return False


def _liger() -> str | None:
    """The library and its version, ready to be used; None, with a warning: it cannot."""
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or importlib.util.find_spec("liger_kernel") is None:
        warn_once(
            "Liger is not installed (pip install liger-kernel), whose kernels would make the "
            "model's layers faster: PyTorch's operators run"
        )
        return None
    if Version(version) < Version(OLDEST_LIGER):
        warn_once(
            f"Liger {version} is too old for layer_kernels, which wants {OLDEST_LIGER}: "
            "PyTorch's operators run"
        )
        return None
    try:
        importlib.import_module("tralign_fast.model.liger_ops")
    except Exception as error:  # of another version of Triton or torch: no import may end a run
        warn_once(f"Liger {version} cannot be imported ({error}): PyTorch's operators run")
        return None
    return f"Liger {version}"


def _groups(modules: Iterator[nn.Module], key: Callable[[Any], Any]) -> list[list[Any]]:
    """The modules that are alike but for their numbers, in the model's order."""
    groups: dict[Any, list[Any]] = {}
    for module in modules:
        groups.setdefault((type(module), key(module)), []).append(module)
    return list(groups.values())


def _is_own(module: nn.Module, kind: str) -> bool:
    """Whether nobody else has changed the module's forward before."""
    name = f"{kind} kernel"
    return runs_only(module, name) or has_forward(module, name)


def _runs(x: Tensor, on_gpu: bool) -> bool:
    """Whether a kernel takes this tensor, of those that it was tried on."""
    return (
        type(x) in _PLAIN
        and x.is_cuda is on_gpu
        and x.dtype in _FLOATS
        and not torch.compiler.is_compiling()
    )


# --- norms ----------------------------------------------------------------------------------------


def _liger_norms(eps: float) -> list[Callable[..., Tensor]]:
    from tralign_fast.model.liger_ops import rms_norm

    return [
        functools.partial(rms_norm, eps=eps, offset=offset, casting=casting)
        for casting, offset in (("llama", 0.0), ("gemma", 0.0), ("gemma", 1.0))
    ]


def _torch_norm(eps: float) -> list[Callable[..., Tensor]]:
    """PyTorch's own kernel, which is one operator forward and one backward."""
    # not `F.rms_norm`: autocast may give that another dtype
    return [lambda x, weight: torch._fused_rms_norm(x, weight.shape, weight, eps)[0]]  # pyright: ignore[reportAttributeAccessIssue]


def _has_fused_norm() -> bool:
    """Whether this PyTorch has a GPU's kernel for RMSNorm; elsewhere it is a composition."""
    name = "_fused_rms_norm"
    return hasattr(torch, name) and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"aten::{name}", "CUDA"
    )


def _norms(
    model: nn.Module, kernels: Callable[[float], list[Callable[..., Tensor]]] = _liger_norms
) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """(module, forward) of every RMSNorm.

    Args:
        kernels: eps -> `kernel(x (..., H), weight (H,))`, of which the nearest is taken.

    Raises:
        Unlike: of a kind that no kernel computes.
    """
    found: Any = (m for m in model.modules() if _is_norm(m))
    changed = []
    for group in _groups(found, lambda m: (m.weight.shape, m.weight.dtype, _eps(m))):
        kernel = kernel_probe.best_norm((group[0], group[-1]), kernels(_eps(group[0])))
        changed += [(module, _norm_forward(kernel, module.weight.is_cuda)) for module in group]
    yield from changed


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and weight.dtype in _FLOATS
        and isinstance(_eps(module), float)
        and _is_own(module, "norm")
    )


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _norm_forward(kernel: Callable[..., Tensor], on_gpu: bool) -> Callable[..., Tensor]:
    def forward(own_forward: Any, norm: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = norm.weight
        if (
            x.dtype is weight.dtype  # else both decide which one the result has
            and type(weight) in _PLAIN
            and _runs(x, on_gpu)
            and not args
            and not kwargs
        ):
            return kernel(x, weight)
        return own_forward(norm, x, *args, **kwargs)

    return forward


# --- gated MLPs -----------------------------------------------------------------------------------

_MLP = frozenset(("gate_proj", "up_proj", "down_proj"))


def _mlps(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """(module, forward) of every MLP that is `down(act(gate(x)) * up(x))` and no more.

    Raises:
        Unlike: with an activation that no kernel computes.
    """
    from tralign_fast.model.liger_ops import gelu_product, silu_product

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    found = (m for m in model.modules() if dtype in _FLOATS and _activation_name(m) is not None)
    changed = []
    for group in _groups(found, lambda m: type(getattr(m, _activation_name(m) or ""))):
        name = _activation_name(group[0]) or ""
        forward_with = functools.partial(
            _mlp_forward, name=name, on_gpu=group[0].gate_proj.weight.is_cuda
        )
        kernel = kernel_probe.best_product(
            [(m, getattr(m, name)) for m in (group[0], group[-1])],
            (silu_product, gelu_product), forward_with, dtype,
        )  # fmt: skip
        changed += [(module, forward_with(kernel)) for module in group]
    yield from changed


def _activation_name(module: nn.Module) -> str | None:
    """The attribute that is the activation of a gated MLP; None: the module is nothing else."""
    forward = type(module).forward
    if not (isinstance(forward, types.FunctionType) and module._modules.keys() >= _MLP):
        return None
    code = forward.__code__
    others = [name for name in code.co_names if name not in _MLP]
    # nothing else is looked up, no number multiplied with: no dropout, clamp or scale
    plain = len(others) == 1 and code.co_argcount == 2 and not code.co_freevars
    numbers = any(isinstance(constant, int | float) for constant in code.co_consts)
    if not plain or numbers or not callable(getattr(module, others[0], None)):
        return None
    return others[0] if _is_own(module, "mlp") else None


def _mlp_forward(
    product: Callable[[Tensor, Tensor], Tensor], name: str, on_gpu: bool
) -> Callable[..., Tensor]:
    def forward(own_forward: Any, mlp: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _runs(x, on_gpu):
            return own_forward(mlp, x, *args, **kwargs)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        if type(gate) in _PLAIN and type(up) in _PLAIN and gate.dtype is up.dtype:
            return mlp.down_proj(product(gate, up))
        return mlp.down_proj(getattr(mlp, name)(gate) * up)

    return forward


# --- rotary embeddings ----------------------------------------------------------------------------


def _attentions(
    model: nn.Module, run: Callable[[], Any]
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """(module, forward) of every attention that turns its queries and keys as Llama's does.

    Raises:
        Unlike: one turns them in another way.
    """
    found = (
        m for m in model.modules()
        if rotary_of(type(m).forward) is not None
        and (_is_own(m, "rotary") or runs_only(m, FEWER_OPERATORS))
    )  # fmt: skip
    groups = _groups(found, lambda m: None)
    calls = _record([end for group in groups for end in (group[0], group[-1])], run)
    changed = []
    for group in groups:
        if group[0] not in calls or group[-1] not in calls:
            continue  # of another part of the model, which preference data does not reach
        own = type(group[0]).forward
        original = rotary_of(own)
        assert original is not None
        kernel = _rotary_in_place_of(original, next(group[0].parameters()).is_cuda)
        forward_with = functools.partial(with_rotary, own)
        for module in (group[0], group[-1]):
            kernel_probe.check_rotary(module, calls[module], kernel, forward_with, original)
        changed += [(module, unless_compiled(forward_with(kernel))) for module in group]
    yield from changed


def _record(modules: Collection[nn.Module], run: Callable[[], Any]) -> dict[nn.Module, Any]:
    """The arguments that the modules are called with."""
    calls: dict[nn.Module, Any] = {}

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] = (args, kwargs)

    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in {*modules}]
    try:
        with torch.no_grad():
            run() if modules else None
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _rotary_in_place_of(original: Callable[..., Any], on_gpu: bool) -> Callable[..., Any]:
    from tralign_fast.model.liger_ops import rotary

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = q.dtype  # where it is not that of cos, the two decide which one the result has
        if (
            dtype is cos.dtype
            and dtype is k.dtype
            and type(k) in _PLAIN
            and _runs(q, on_gpu)
            and not args
            and not kwargs
        ):
            return rotary(q, k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    return turn
