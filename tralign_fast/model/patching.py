"""How forwards and settings of a model are changed and taken back, and what lies inside a wrapper.

Every change is written into a book in the `__dict__` of the module that it was made on. There a
deep copy of the model finds what it needs to run its own weights, and changes that several callers
made to one thing stand in a stack: the newest holds, and each can be taken back at any time.
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

_BOOK = "_tralign_patches"  # dict[str, _Forward | _Attribute]; there as long as it has entries
_owners = itertools.count()


class Patches:
    """What one caller changes on a model: all of it is taken back by `undo`.

    Modules are held weakly: neither this nor its `undo` keeps a model alive.
    """

    def __init__(self) -> None:
        self._owner = next(_owners)  # a number: deep copies of a book have it too
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def forward(self, module: nn.Module, kind: str, function: Callable[..., Any]) -> None:
        """Makes `function(own_forward, module, …)` the forward of this one module.

        Of one kind the newest runs, and `own_forward` never is another of the same kind. Kinds lie
        over each other, the one that came first innermost.
        """
        self._write(module, f"forward {kind}", function, lambda: _Forward(module, kind))

    def attribute(self, module: nn.Module, path: str, value: Any) -> None:
        """Sets an attribute of the module, or of an object in it (`config.name`)."""
        *names, name = path.split(".")
        target = functools.reduce(getattr, names, module)
        self._write(module, path, value, lambda: _Attribute(target, name))

    def _write(self, module: nn.Module, key: str, value: Any, new: Callable[[], Any]) -> None:
        self._modules.add(module)
        book = module.__dict__.setdefault(_BOOK, {})
        if key not in book:
            book[key] = new()
        book[key].push(self._owner, value)

    def undo(self) -> None:
        """Takes everything back; a second time does nothing."""
        for module in list(self._modules):
            _take_back(module, self._owner)
        self._modules.clear()


def has_forward(module: nn.Module, kind: str) -> bool:
    """Whether the module's forward was changed by somebody for that purpose."""
    return f"forward {kind}" in module.__dict__.get(_BOOK, ())


def runs_only(module: nn.Module, *kinds: str) -> bool:
    """Whether a call of the module runs its class's forward and these changes of it, no others."""
    forward = module.__dict__.get("forward")
    book = module.__dict__.get(_BOOK, {})
    patches = [book.get(f"forward {kind}") for kind in kinds]
    return forward is None or any(
        patch is not None and patch.before is None and forward == patch.bound for patch in patches
    )


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and changes by `Patches`, no others."""
    forward = module.__dict__.get("forward")
    patches = [p for p in module.__dict__.get(_BOOK, {}).values() if isinstance(p, _Forward)]
    while forward is not None:
        patch = next((p for p in patches if p.bound == forward), None)
        if patch is None:
            return False
        forward = patch.before
    return True


def _take_back(module: nn.Module, owner: int) -> None:
    book = module.__dict__.get(_BOOK, {})
    for key, patch in list(book.items()):
        patch.layers = [layer for layer in patch.layers if layer[0] != owner]
        if patch.restore(book):
            del book[key]
    if not book:
        module.__dict__.pop(_BOOK, None)


class _Change:
    """An entry of a book."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        # functions within functions, which no pickle can name
        raise TypeError(
            "a prepared model cannot be pickled, as torch.save(model) does: take the changes back "
            "first (PreparedModel.undo(), TRTrainer.release_model()), or save its weights "
            "(save_pretrained, state_dict)"
        )


class _Attribute(_Change):
    """The values that callers gave to one attribute, the newest last, and what it was before."""

    def __init__(self, target: Any, name: str) -> None:
        self.target, self.name = target, name
        self.layers: list[tuple[int, Any]] = []
        self.before = (target.__dict__[name],) if name in target.__dict__ else ()

    def push(self, owner: int, value: Any) -> None:
        self.layers.append((owner, value))
        self.value = value
        setattr(self.target, self.name, value)

    def restore(self, book: dict[str, Any]) -> bool:
        """Sets what the layers left over say; whether there are none."""
        if getattr(self.target, self.name, None) is self.value:  # else somebody has set it since
            if self.layers:
                self.value = self.layers[-1][1]
                setattr(self.target, self.name, self.value)
            elif self.before:
                setattr(self.target, self.name, self.before[0])
            else:
                delattr(self.target, self.name)
        return not self.layers


class _Forward(_Change):
    """The functions that callers put before a module's forward for one purpose, the newest last.

    What is set on the module looks itself up in the module's book at every call: a wrapper that
    somebody has put over it runs the own forward once the layers are gone.
    """

    def __init__(self, module: nn.Module, kind: str) -> None:
        self.layers: list[tuple[int, Callable[..., Any]]] = []
        self.before = module.__dict__.get("forward")  # of whoever wrapped this instance, or None
        key = f"forward {kind}"

        # the original's signature stays: `generate` checks its arguments against it
        @functools.wraps(type(module).forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            patch = self.__dict__[_BOOK][key]
            if not patch.layers:
                return patch.own_forward(self, *args, **kwargs)
            return patch.layers[-1][1](patch.own_forward, self, *args, **kwargs)

        self.module = module
        self.bound = types.MethodType(forward, module)
        module.forward = self.bound

    def own_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.before is None:
            return type(module).forward(module, *args, **kwargs)
        return self.before(*args, **kwargs)  # bound to the module; a copy's to the copy

    def push(self, owner: int, function: Callable[..., Any]) -> None:
        self.layers.append((owner, function))

    def restore(self, book: dict[str, Any]) -> bool:
        """Takes an empty patch off the module; False: it is in use, or under a foreign wrapper."""
        if self.layers:
            return False
        if self.module.__dict__.get("forward") == self.bound:
            del self.module.forward
            if self.before is not None:
                self.module.forward = self.before
            return True
        for other in book.values():
            if isinstance(other, _Forward) and other.before == self.bound:
                other.before = self.before
                return True
        return False


def unwrapped(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model)


def causal_lm_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(causal_lm: Any) -> Any:
    """The model under the head: `base_model`, where the prefix names one (Llama 4: does not)."""
    base = causal_lm.base_model
    return causal_lm.model if base is causal_lm and hasattr(causal_lm, "model") else base


def lm_head_of(causal_lm: Any) -> Any:
    """The output embedding in use: PEFT keeps the one of `modules_to_save` beside the original, and
    under a layer of its own the one whose tokens it trains (`head_tokens_of`)."""
    head = causal_lm.get_output_embeddings()
    tokens = _tokens_layer(head)
    if tokens is not None:
        return tokens.base_layer
    if not hasattr(head, "modules_to_save"):
        return head
    active = [] if head.disable_adapters else head.active_adapters
    return head.modules_to_save[active[0]] if active else head.original_module


def head_tokens_of(causal_lm: Any) -> Any:
    """PEFT's layer whose `get_merged_weights` is the head's weight with its trained tokens, where
    it trains some of a head that is tied to the embedding; or None."""
    tokens = _tokens_layer(causal_lm.get_output_embeddings())
    if tokens is None or tokens.disable_adapters or tokens.merged or not tokens.active_adapters:
        return None
    return tokens


def _tokens_layer(head: Any) -> Any:
    layer = getattr(head, "token_adapter", head)
    return layer if hasattr(layer, "trainable_tokens_delta") else None
