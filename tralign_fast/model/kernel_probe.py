"""Whether a kernel is as good as the code of a model that it would stand for.

Tried on random numbers, on the model's device: outputs and gradients, in fp32, where another
equation shows, and in the model's dtype, where another rounding does. Both are compared with the
model's own code in twice the precision. In every row (the last dimension) the kernel's largest
error may be twice that of the model's code, and a few roundings of the row's largest number more;
the root of its mean square too, and an eighth of a rounding more.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# of a row's largest number, and of the root of its mean square, in units of the dtype's epsilon: a
# half-precision result is rounded once or twice; in fp32 sums of thousands have another order
_ROUNDINGS = {torch.float32: (16.0, 16.0)}
_ROUNDINGS_OF_HALVES = (2.0, 0.125)
_TWICE = {torch.float32: torch.float64}  # of halves: fp32
_ROWS = 32


class Unlike(Exception):
    """A kernel gives other numbers than the model's code, or none."""


def best_norm(norms: Sequence[Any], kernels: Sequence[Callable[..., Tensor]]) -> Callable[..., Any]:
    """The `kernel(x (..., H), weight (H,))` that is nearest to all of these norms.

    Raises:
        Unlike: none is as good as they are.
    """

    def errors(kernel: Callable[..., Tensor]) -> Iterator[_Errors]:
        for norm in norms:
            yield from _norm_errors(norm, kernel)

    return _best(kernels, errors, f"other numbers than {type(norms[0]).__name__}")


def _norm_errors(norm: Any, kernel: Callable[..., Tensor]) -> Iterator[_Errors]:
    weight = norm.weight.detach()
    scales = torch.logspace(-3, 2, _ROWS)[:, None]  # where eps counts, and where it does not
    x = _random((_ROWS, weight.shape[0]), weight.device, scales)
    # whatever it was trained to: the roundings of a weight that is all ones are not seen
    weight = weight.float() + _random(weight.shape, weight.device, 0.1)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        twin = copy.copy(norm)  # without what hooks hold
        twin.__dict__["_parameters"] = {"weight": weight}
        return type(norm).forward(twin, x)

    for dtype in _dtypes(norm.weight.dtype):
        yield _errors(kernel, plain, (x, weight), dtype)


def best_product(
    mlps: Sequence[tuple[Any, Callable[[Tensor], Tensor]]],
    products: Sequence[Callable[[Tensor, Tensor], Tensor]],
    forward_with: Callable[[Any], Callable[..., Tensor]],
    dtype: torch.dtype,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The `product(gate (..., I), up (..., I))` that is `act(gate) * up` of all these MLPs.

    Args:
        mlps: (MLP, its activation).
        forward_with: product -> the MLP's forward with it, `forward(own_forward, mlp, x)`.
        dtype: of the model's activations.

    Raises:
        Unlike: none is as good as they are.
    """
    mlp, act = mlps[0]
    x = _random((1, 16, mlp.gate_proj.in_features), mlp.gate_proj.weight.device).to(dtype)
    with torch.no_grad():
        size = mlp.gate_proj(x).shape[-1]
    inputs = [_random((_ROWS, size), x.device, 3.0) for _ in range(2)]

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    def errors(product: Callable[[Tensor, Tensor], Tensor]) -> Iterator[_Errors]:
        return (_errors(product, plain, inputs, one) for one in _dtypes(dtype))

    product = _best(products, errors, f"other numbers than {type(act).__name__}")
    forward = forward_with(product)
    for mlp, _ in mlps:
        own = type(mlp).forward
        _check_whole(
            functools.partial(forward, own, mlp), functools.partial(own, mlp), x, type(mlp)
        )
    return product


def check_rotary(
    attention: Any,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    rotary: Callable[..., tuple[Tensor, Tensor]],
    forward_with: Callable[[Any], Callable[..., Any]],
    original: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Tries a rotary embedding in one attention layer.

    Args:
        call: the layer's arguments in a forward of the model, to be tried with.
        rotary: the kernel, `rotary(q, k, cos, sin)`.
        forward_with: rotary -> the layer's forward with it.
        original: what the layer calls.

    Raises:
        Unlike: it is not as good as `original`, or is called with more than those four.
    """
    seen: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    args, kwargs = call
    with torch.no_grad():
        forward_with(record)(attention, *args, **kwargs)
    name = type(attention).__name__
    if not seen or len(seen[0][0]) != 4 or seen[0][1]:
        raise Unlike(f"{name} calls it with other arguments")
    q, k, cos, sin = seen[0][0]
    inputs = [_random((t.shape[0], t.shape[2], t.shape[1], t.shape[3]), q.device) for t in (q, k)]

    def turn(function: Any) -> Callable[..., Any]:
        def turned(q: Tensor, k: Tensor) -> Any:
            # what it may overwrite
            views = (t.clone().transpose(1, 2) for t in (q, k))
            return function(*views, cos.to(q.dtype), sin.to(q.dtype))

        return turned

    def errors(kernel: Any) -> Iterator[_Errors]:
        return (_errors(turn(kernel), turn(original), inputs, d) for d in _dtypes(q.dtype))

    _best([rotary], errors, f"other numbers than that of {name}")
    hidden, call_with = _hidden_of(args, kwargs)
    x = _random(hidden.shape, hidden.device).to(hidden.dtype)
    fast, plain = (
        lambda x, f=f: call_with(functools.partial(f, attention), x)[0]
        for f in (forward_with(rotary), type(attention).forward)
    )
    _check_whole(fast, plain, x, type(attention))


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The layer's input, and how it is called with another."""
    if args:
        return args[0], lambda forward, x: forward(x, *args[1:], **kwargs)
    return kwargs["hidden_states"], lambda forward, x: forward(**{**kwargs, "hidden_states": x})


# --- comparing ------------------------------------------------------------------------------------


class _Errors(NamedTuple):
    of_allowed: float  # the largest error in units of what is allowed; infinite: no number
    distance: float  # from the model's own code, which is no error of either


def _best(
    kernels: Sequence[Any], errors: Callable[[Any], Iterator[_Errors]], otherwise: str
) -> Any:
    """The kernel nearest to the model's own code, of those that are as good."""
    good: list[tuple[float, Any]] = []
    try:
        for kernel in kernels:
            found = []
            for one in errors(kernel):
                found.append(one)
                if not one.of_allowed <= 1:
                    break
            else:
                good.append((max(one.distance for one in found), kernel))
    except Exception as error:  # of a compiler, a driver, a version: no such error may end a run
        raise Unlike(f"it fails: {_first_line(error)}") from error
    if not good:
        raise Unlike(otherwise)
    return min(good, key=lambda pair: pair[0])[1]


def _errors(
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> _Errors:
    """Of output and gradients."""
    inputs = [tensor.to(dtype) for tensor in inputs]
    truth = _outcome(plain, [t.to(_TWICE.get(dtype, torch.float32)) for t in inputs])
    floors = [
        count * torch.finfo(dtype).eps for count in _ROUNDINGS.get(dtype, _ROUNDINGS_OF_HALVES)
    ]
    worst, distance = 0.0, 0.0
    for ours, theirs, exact in zip(
        _outcome(kernel, inputs), _outcome(plain, inputs), truth, strict=True
    ):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return _Errors(float("inf"), float("inf"))
        error, own = (t.to(exact.dtype) - exact for t in (ours, theirs))
        for floor, size in zip(floors, (_largest, _mean_square), strict=True):
            allowed = 2 * size(own) + floor * size(exact) + torch.finfo(dtype).tiny
            ratio = (size(error) / allowed).nan_to_num(float("inf"), float("inf"))
            worst = max(worst, float(ratio.amax()))
        distance = max(distance, float((error - own).norm() / exact.norm()))
    return _Errors(worst, distance)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(-1)


def _mean_square(rows: Tensor) -> Tensor:
    return rows.square().mean(-1).sqrt()


def _check_whole(fast: Any, plain: Any, x: Tensor, kind: type) -> None:
    """A module with its kernel, in the model's dtype: that nothing else is missing in it, and that
    nobody else reads what the kernel overwrites."""
    try:
        found = [_outcome(function, [x]) for function in (fast, plain)]
    except Exception as error:
        raise Unlike(f"{kind.__name__} fails with it: {_first_line(error)}") from error
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    share = 1e-5 if exact else 4 * torch.finfo(torch.bfloat16).eps
    for ours, theirs in zip(*found, strict=True):
        difference = (ours.float() - theirs.float()).norm()
        if ours.dtype != theirs.dtype or not difference <= share * theirs.float().norm():
            raise Unlike(f"{kind.__name__} gives other numbers with it")


def _outcome(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of the function and its gradients with respect to the inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        out = function(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    results = [tensor.detach().clone() for tensor in outputs]
    grads = [_random(t.shape, t.device, seed=1).to(t.dtype) for t in outputs]
    return [*results, *(g.detach() for g in torch.autograd.grad(outputs, leaves, grads))]


def _random(shape: Any, device: torch.device, scale: Any = 1.0, seed: int = 0) -> Tensor:
    """fp32 numbers that no generator of the run is asked for."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float32) * scale).to(device)


def _dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if dtype == torch.float32 else (torch.float32, dtype)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
