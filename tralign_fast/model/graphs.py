"""The decoder of a packed row as CUDA graphs: its forward is one launch, and so is its backward.

With few tokens a GPU waits for Python: a step is thousands of launches, each of which takes the
host longer than the device. A graph replays them all at once, on the same addresses, so rows are
copied into one of a few fixed shapes (`model.static_rows`).

What is captured is the decoder's own forward as it is then, with all that was changed on it, and
the backward to the gradients of the parameters. The head and the loss stay as they are: how many
tokens are scored differs with every batch.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from tralign_fast.model.attention import has_varlen
from tralign_fast.model.patching import Patches, causal_lm_of, decoder_of
from tralign_fast.model.static_rows import Shape, StaticRow, shape_of
from tralign_fast.ops.backend import device_kind, is_pretending, warn_once

GRAPHS = "CUDA graphs"  # the kind of the patches
_KEPT = 32  # graphs of a decoder, those used last
# What a packed row is given to the decoder with (`model.scoring`).
_KEYWORDS = {"input_ids", "position_ids", "attention_mask", "prefix_layout", "use_cache"}
# A forward whose launches take the host at least this share of the device's time is worth a graph.
_HOST_BOUND = 0.8
_TRIED = 4  # times that a shape's forward is timed; the first compiles kernels
_paused = 0


@contextlib.contextmanager
def without_graphs() -> Iterator[None]:
    """Inside, decoders run themselves: something of theirs is not what it was at the capture."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


def graph_decoder(model: nn.Module, always: bool = False) -> Callable[[], None]:
    """Runs the model's decoder as CUDA graphs where packed rows of a shape come again; returns its
    undo.

    A shape's first rows run as ever. Its graph is then captured, compared with the decoder's own
    forward and backward, and replayed from there on. What a graph cannot do runs as ever: a CPU,
    dropout, other keywords, an attention without a variable-length kernel, a second forward before
    the first one's backward, parameters at other addresses. Gradients are written to `.grad`
    without autograd's hooks on parameters: a model with such hooks runs as ever.

    Args:
        always: also where the device is busy anyway; else where the host's launches hold it up.
    """
    decoder = decoder_of(causal_lm_of(model))
    patches = Patches()
    graphs = DecoderGraphs(decoder, always)

    def forward(own_forward: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT's: None
        if module is not graphs.decoder or args or not graphs.can_run(given):  # or a deep copy
            return own_forward(module, *args, **kwargs)
        return graphs.run(functools.partial(own_forward, module), given)

    patches.forward(decoder, GRAPHS, forward)

    def undo() -> None:
        patches.undo()
        graphs.clear()

    return undo


class _Key(NamedTuple):
    """What a graph was captured for, beside the addresses of its parameters."""

    shape: Shape
    grad: bool
    training: bool
    autocast: torch.dtype | None
    adapters: tuple[Any, ...]


class _Seen:
    """A key without a graph: how often it came, and whether the host held the device up."""

    times = 0
    host_bound = False


class DecoderGraphs:
    """The graphs of one decoder.

    Attributes:
        decoder: the module, while it lives.
        captured, replayed: counts, for tests.
    """

    def __init__(self, decoder: nn.Module, always: bool) -> None:
        self._decoder = weakref.ref(decoder)
        self._always = always
        self._entries: OrderedDict[_Key, _Seen | _Graph] = OrderedDict()
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._shared: dict[str, Tensor] = {}
        # graphs of one pool share its memory: one with a backward and one without lie apart, since
        # a reference may be scored between a forward and its backward
        self._pools: dict[bool, Any] = {}
        self._pending: Callable[[], Any] = lambda: None
        self._failed = False
        self._parameters: list[nn.Parameter] = []
        self._adapters: list[dict[str, Any]] = []
        self.captured = self.replayed = 0

    @property
    def decoder(self) -> nn.Module | None:
        return self._decoder()

    def clear(self) -> None:
        """Frees the graphs; gradients that lie in their buffers stay."""
        self._entries.clear()
        self._buffers.clear()
        self._shared.clear()
        self._pools.clear()

    def can_run(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call with these keywords may be replayed."""
        if self._failed or _paused or kwargs.keys() != _KEYWORDS:
            return False
        ids, positions = kwargs["input_ids"], kwargs["position_ids"]
        if (
            not backend.takes(ids.device)
            or kwargs["prefix_layout"].cut is not None  # processes tell each other keys inside
            or torch.compiler.is_compiling()
            or ids.shape != positions.shape
        ):
            return False
        if not self._parameters:
            self._failed = not self._look()
            if self._failed and self._always:
                warn_once(
                    f"cuda_graphs=True has no effect on {type(self.decoder).__name__}: it has "
                    "dropout, or an attention without a variable-length kernel"
                )
        return not self._failed

    def _look(self) -> bool:
        """What is asked of the decoder once: its tensors and adapters, and whether it can be
        captured."""
        decoder = self.decoder
        assert decoder is not None
        self._parameters = list(decoder.parameters())
        modules = list(decoder.modules())
        self._adapters = [vars(m) for m in modules if "_active_adapter" in vars(m)]
        dropouts = any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules)
        dropouts |= any(getattr(m, "attention_dropout", 0.0) > 0 for m in modules)
        return not dropouts and has_varlen(decoder)

    def _is_hooked(self) -> bool:
        """Asked at every step: gradient release hooks on when a training begins, which may be after
        rows were scored."""
        return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._parameters)

    def run(self, own_forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The decoder's output, by a graph where there is one or can be."""
        key = self._key(kwargs)
        if key.grad and self._is_hooked():
            return own_forward(**kwargs)
        entry = self._entries.setdefault(key, _Seen())
        self._entries.move_to_end(key)
        if isinstance(entry, _Graph) and not entry.still_holds(self._parameters):
            entry = self._entries[key] = _Seen()  # parameters lie elsewhere now
        in_use = key.grad and self._pending() is not None  # the activations of another forward
        if isinstance(entry, _Seen):
            pays = self._always or (
                entry.host_bound and backend.has_room(kwargs["input_ids"].device)
            )
            if in_use or not (entry.times and pays):
                return self._run_itself(own_forward, kwargs, key, entry)
            if self._accumulates(key):
                return self._run_itself(own_forward, kwargs, key, entry)
            entry = self._capture(own_forward, kwargs, key)
        if in_use or entry is None:
            return self._run_itself(own_forward, kwargs, key, None)
        self.replayed += 1
        entry.row.fill(kwargs["input_ids"], kwargs["position_ids"], kwargs["prefix_layout"])
        return BaseModelOutputWithPast(last_hidden_state=self._replay(entry, key))

    def _key(self, kwargs: dict[str, Any]) -> _Key:
        decoder = self.decoder
        assert decoder is not None
        grad = torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters)
        kind = kwargs["input_ids"].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        adapters = tuple(
            (str(d["_active_adapter"]), d.get("_disable_adapters"), *d.get("merged_adapters", ()))
            for d in self._adapters
        )
        return _Key(shape_of(kwargs["prefix_layout"]), grad, decoder.training, autocast, adapters)

    def _accumulates(self, key: _Key) -> bool:
        """Whether the buffers hold gradients that a capture's trial would change."""
        return key.grad and any(p.grad is b for p, b in self._buffers.items())

    def _run_itself(
        self, own_forward: Any, kwargs: dict[str, Any], key: _Key, entry: _Seen | None
    ) -> Any:
        """The decoder's own forward, on the row that a graph would have: products of other shapes
        are rounded otherwise, and a resumed run begins without graphs."""
        if key.grad:
            self._take_buffers()  # two sets of gradients would be more memory than one
        ids = kwargs["input_ids"]
        row = StaticRow(key.shape, ids.device)
        row.fill(ids, kwargs["position_ids"], kwargs["prefix_layout"])
        kwargs = row.keywords(kwargs)
        if entry is None or entry.times >= _TRIED:
            return own_forward(**kwargs)
        with backend.timed(ids.device) as times:
            output = own_forward(**kwargs)
        if entry.times:
            entry.host_bound |= times.host >= _HOST_BOUND * times.device()
        entry.times += 1
        return output

    def _capture(self, own_forward: Any, kwargs: dict[str, Any], key: _Key) -> _Graph | None:
        try:
            with _own_checkpoints(self.decoder), _uncached_casts(key, kwargs):
                entry = _Graph(self, own_forward, kwargs, key)
        except (RuntimeError, _Differs) as error:
            # a model that looks at values, allocates anew, or lacks the memory
            self._failed = True
            self.clear()
            warn_once(
                f"{type(self.decoder).__name__} cannot be captured as a CUDA graph "
                f"({str(error).splitlines()[0]}): its layers are launched one by one"
            )
            return None
        self._entries[key] = entry
        self.captured += 1
        held = [k for k, e in self._entries.items() if isinstance(e, _Graph)]
        for old in held[: len(held) - _KEPT]:
            del self._entries[old]
        return entry

    def pool(self, grad: bool) -> Any:
        """The memory that graphs of a kind share."""
        if grad not in self._pools:
            self._pools[grad] = backend.pool()
        return self._pools[grad]

    def buffer(self, parameter: nn.Parameter) -> Tensor:
        """Where the graphs write that parameter's gradient."""
        if parameter not in self._buffers:
            self._buffers[parameter] = torch.zeros_like(parameter)
        return self._buffers[parameter]

    def shared(self, name: str, like: Tensor) -> Tensor:
        """A tensor of that shape in memory that all graphs use in turn: but one is in use."""
        held = self._shared.get(name)
        if held is None or held.numel() < like.numel() or held.dtype != like.dtype:
            # graphs that have been captured keep the one before
            held = self._shared[name] = like.new_empty(like.numel())
        return held[: like.numel()].view(like.shape)

    def _take_buffers(self) -> None:
        """Makes the buffers the gradients, with the values that these had."""
        fresh = []
        for parameter, buffer in self._buffers.items():
            if parameter.grad is None:
                fresh.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if fresh:
            torch._foreach_zero_(fresh)

    def _replay(self, entry: _Graph, key: _Key) -> Tensor:
        if not key.grad:
            entry.forward.replay()
            return entry.hidden.clone()  # the next replay writes over it
        token = _Token()
        self._pending = weakref.ref(token)
        anchor = entry.hidden.new_empty((), requires_grad=True)
        return _Replay.apply(anchor, self, entry, token)


class _Token:
    """Lives from a forward to its backward, or to the end of what the forward returned."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graphs: Any, entry: _Graph, token: _Token) -> Tensor:
        ctx.graphs, ctx.entry, ctx.token = graphs, entry, token
        entry.forward.replay()
        return entry.hidden.view_as(entry.hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.graphs._take_buffers()
        ctx.entry.grad.copy_(grad)
        ctx.entry.backward.replay()
        ctx.token = None
        return None, None, None, None


class _Differs(Exception):
    """A replay computed other values than what was captured."""


class _Graph:
    """A shape's row, and the graphs that compute on it."""

    def __init__(self, graphs: DecoderGraphs, own_forward: Any, kwargs: Any, key: _Key) -> None:
        ids = kwargs["input_ids"]
        self.row = StaticRow(key.shape, ids.device)
        self.row.fill(ids, kwargs["position_ids"], kwargs["prefix_layout"])
        self._addresses = _addresses(graphs._parameters)
        self._inputs = inputs = self.row.keywords(kwargs)  # which the graph reads

        def run() -> Tensor:
            with torch.set_grad_enabled(key.grad):
                return own_forward(**inputs).last_hidden_state

        with backend.beside(ids.device):
            self.forward: Any = None
            self.backward: Any = None
            trial = run()  # compiles kernels, and is what the graph is compared with
            if key.grad:
                self._capture_both(graphs, run, trial, graphs.pool(True))
                return
            hidden = graphs.shared("scored", trial)
            self.forward, self.hidden = backend.capture(
                lambda: hidden.copy_(run()), graphs.pool(False)
            )
            self.forward.replay()
            _check_same(self.hidden, trial)

    def _capture_both(self, graphs: Any, run: Any, trial: Tensor, pool: Any) -> None:
        hidden, self.grad = (graphs.shared(name, trial.detach()) for name in ("hidden", "grad"))
        numbers = torch.arange(trial.numel(), device=trial.device)  # none drawn: runs stay the same
        self.grad.copy_((numbers.cos() / trial.shape[1]).view_as(trial))
        trained = list(_leaves(trial))
        buffers = [graphs.buffer(p) for p in trained]
        held = [p.grad for p in trained]
        for parameter, buffer in zip(trained, buffers, strict=True):
            parameter.grad = buffer
        try:
            torch._foreach_zero_(buffers)
            trial.backward(self.grad.clone())  # kernels may compute in place
            tried = [buffers[0].clone(), buffers[-1].clone()]
            expected = trial.detach().clone()
            del trial
            output: list[Tensor] = []

            def forward() -> Tensor:
                output[:] = [run()]
                return hidden.copy_(output[0].detach())

            def backward() -> None:
                output.pop().backward(self.grad.clone())

            self.forward, self.hidden = backend.capture(forward, pool)
            self.backward, _ = backend.capture(backward, pool)
            torch._foreach_zero_(buffers)
            self.forward.replay()
            self.backward.replay()
            _check_same(self.hidden, expected)
            for buffer, before in zip((buffers[0], buffers[-1]), tried, strict=True):
                _check_same(buffer, before)
        finally:
            for parameter, grad in zip(trained, held, strict=True):
                parameter.grad = grad

    def still_holds(self, parameters: list[nn.Parameter]) -> bool:
        return self._addresses == _addresses(parameters)


def _addresses(parameters: list[nn.Parameter]) -> list[tuple[int, bool]]:
    return [(p.data_ptr(), p.requires_grad) for p in parameters]


def _leaves(output: Tensor) -> Iterator[nn.Parameter]:
    """The parameters that a backward of `output` gives gradients."""
    found, stack = set(), [output.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [following for following, _ in node.next_functions]


def _check_same(got: Tensor, expected: Tensor) -> None:
    """Raises where a replay is off by more than sums in another order are."""
    error = (got - expected).float().norm() / expected.float().norm().clamp(min=1e-30)
    bound = 1e-4 if got.dtype in (torch.float32, torch.float64) else 2e-2
    if not error <= bound:  # NaN neither
        raise _Differs(f"its replay differs by {float(error):.1g}")


@contextlib.contextmanager
def _own_checkpoints(decoder: nn.Module | None) -> Iterator[None]:
    """Gradient checkpointing without the state of random numbers, which a capture cannot read and
    a decoder without dropout does not need."""
    patches = Patches()
    function = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    assert decoder is not None
    for module in decoder.modules():
        if getattr(module, "_gradient_checkpointing_func", None) is not None:
            patches.attribute(module, "_gradient_checkpointing_func", function)
    try:
        yield
    finally:
        patches.undo()


def _uncached_casts(key: _Key, kwargs: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Autocast that casts weights in the graph: a cached cast would be that of this step."""
    if key.autocast is None:
        return contextlib.nullcontext()
    kind = kwargs["input_ids"].device.type
    return torch.autocast(kind, key.autocast, cache_enabled=False)


class Times:
    """What a forward took: `host`, seconds to launch it; `device()`, seconds there."""

    host = 0.0

    def __init__(self, begin: Any, end: Any) -> None:
        self._begin, self._end = begin, end

    def device(self) -> float:
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3


class CudaBackend:
    """How graphs are captured and replayed. Tests put another in its place, which runs again."""

    def takes(self, device: torch.device) -> bool:
        return (
            device_kind(device) == "cuda"
            and not is_pretending()
            and not torch.cuda.is_current_stream_capturing()
        )

    def has_room(self, device: torch.device) -> bool:
        """Whether a tenth more than what was held so far fits the card: graphs keep memory."""
        total = torch.cuda.mem_get_info(device)[1]
        return 1.1 * torch.cuda.max_memory_allocated(device) <= total

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def timed(self, device: torch.device) -> Iterator[Times]:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            times, start = Times(begin, end), time.perf_counter()
            begin.record()
            yield times
            end.record()
            times.host = time.perf_counter() - start

    @contextlib.contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        """A stream that nothing else runs on, as captures want it."""
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                yield
            torch.cuda.current_stream().wait_stream(stream)

    def capture(self, function: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
        """A graph of what `function` launches, and what it returned, which a replay fills."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # other threads may pin memory meanwhile
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            result = function()
        return graph, result


backend: Any = CudaBackend()
