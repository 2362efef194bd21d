"""What the trainer tries out on a model, tried once for all traced models that are alike.

On fake tensors a probe compares no numbers: it answers by types, shapes and dtypes alone, which a
model with more layers has, too. A plan traces a dozen models of one kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import nn

from tralign_fast.model import kernel_probe, prepare
from tralign_fast.model.kernel_probe import Unlike
from tralign_fast.ops.backend import is_pretending

_answers: dict[Any, Any] = {}  # an answer, or the exception that was one


@contextmanager
def probed_once() -> Iterator[None]:
    """Inside, models on fake tensors are tried out where none of their kind was before."""
    with ExitStack() as stack:
        for owner, name, once in (
            (kernel_probe, "best_norm", _best_norm),
            (kernel_probe, "best_product", _best_product),
            (kernel_probe, "check_rotary", _check_rotary),
            (prepare, "_check_head", _of_model),
            (prepare, "_why_not_packed", _of_model),
        ):
            replacement = functools.partial(once, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _best_norm(original: Any, norms: Sequence[nn.Module], kernels: Sequence[Any]) -> Any:
    key = (*map(_kind, norms), len(kernels))
    return kernels[_answer(original, key, lambda: kernels.index(original(norms, kernels)))]


def _best_product(original: Any, mlps: Any, products: Any, forward_with: Any, dtype: Any) -> Any:
    key = (*((_kind(mlp), type(act)) for mlp, act in mlps), len(products), dtype)

    def found() -> int:
        return products.index(original(mlps, products, forward_with, dtype))

    return products[_answer(original, key, found)]


def _check_rotary(original: Any, attention: nn.Module, *rest: Any) -> None:
    _answer(original, _kind(attention), lambda: original(attention, *rest))


def _of_model(original: Any, model: Any) -> Any:
    options = {k: v for k, v in model.config.to_dict().items() if k != "num_hidden_layers"}
    options["layer_types"] = {*(options.get("layer_types") or ())}
    parts = frozenset(_kind(module, inside=False) for module in model.modules())
    return _answer(original, (parts, repr(options)), lambda: original(model))


def _answer(original: Any, key: Any, ask: Callable[[], Any]) -> Any:
    key = (original.__qualname__, is_pretending(), key)
    if key not in _answers:
        try:
            _answers[key] = ask()
        except (Unlike, ValueError) as refusal:
            _answers[key] = refusal
    answer = _answers[key]
    if isinstance(answer, Exception):
        raise answer.with_traceback(None)
    return answer


def _kind(module: nn.Module, inside: bool = True) -> Any:
    """Types of a module and of those in it, and shapes and dtypes of their parameters."""
    return tuple(
        (type(m), *((n, p.shape, p.dtype) for n, p in m._parameters.items() if p is not None))
        for m in (module.modules() if inside else [module])
    )
