"""A causal language model whose forward returns log-probabilities of tokens instead of logits.

The change lives inside `forward`, so that whatever wraps the model (DDP, FSDP, DeepSpeed, PEFT,
autocast) wraps the LM head's work too. Without the keyword `score_index` the forward is unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from tralign_fast import onednn
from tralign_fast._backend import warn_once
from tralign_fast.attention import enable_prefix_attention
from tralign_fast.data.packing import PackedBatch, PreferenceCollator
from tralign_fast.logprobs import linear_logprobs


@dataclass
class ScoreOutput(ModelOutput):
    """What a model returns when it was given `score_index`."""

    scores: Tensor | None = None  # (N,) float32 log-probs, or what the given `score` returned


@contextlib.contextmanager
def _split_tied_weight(causal_lm: Any) -> Iterator[Tensor | None]:
    """The head's weight, apart from that of the input embedding it is tied to, on a CPU; or None.

    The embedding's gradient is the few rows that were looked up. Autograd would sum two dense
    tensors (V, H), or copy the head's to add a sparse one to it: new memory of that size, whose
    pages cost more than the sum. Here it is added to the head's own.
    """
    embedding, head = causal_lm.get_input_embeddings(), _lm_head(causal_lm)
    if not _is_tied_on_cpu(embedding, head) or torch.compiler.is_compiling():
        yield None
        return
    weight = embedding.weight
    before = embedding.sparse
    embedding._parameters["weight"], for_head = _Tied.apply(weight)
    embedding.sparse = True
    try:
        yield for_head
    finally:
        embedding._parameters["weight"], embedding.sparse = weight, before


def _is_tied_on_cpu(embedding: Any, head: Any) -> bool:
    """Whether the two are one whole weight on a CPU, of which a gradient is wanted."""
    if not isinstance(embedding, nn.Embedding) or embedding.weight is not head.weight:
        return False
    weight = embedding.weight
    return (
        weight.device.type == "cpu"
        and weight.shape == (embedding.num_embeddings, embedding.embedding_dim)  # ZeRO-3's is empty
        and not hasattr(weight, "device_mesh")  # nor a shard
        and weight.requires_grad
        and torch.is_grad_enabled()
    )


class _Tied(torch.autograd.Function):
    """One weight as two: for the embedding, whose gradient is sparse, and for the head."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, embedding: Tensor | None, head: Tensor | None) -> Tensor | None:
        if head is None:
            return None if embedding is None else embedding.to_dense()
        # in place: the head's was made in this backward, and nobody else has seen it
        return head if embedding is None else head.add_(embedding)


@dataclass(frozen=True)
class HeadOptions:
    """What stands between the LM head's product and the softmax, read from a model's config."""

    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def of(cls, config: Any) -> HeadOptions:
        config = config.get_text_config()
        scale = getattr(config, "logit_scale", None)  # Cohere
        scaling = getattr(config, "logits_scaling", None)  # Granite divides
        if scale is None and scaling is not None:
            scale = 1.0 / scaling
        return cls(
            softcap=getattr(config, "final_logit_softcapping", None),  # Gemma-2, Gemma-3
            logit_scale=1.0 if scale is None else float(scale),
        )


def enable_logprobs(
    model: PreTrainedModel,
    *,
    logits_budget_mb: float = 1024,
    vocab_filter: float | None = None,
    backend: str = "auto",
) -> Callable[[], None]:
    """Lets `model(**batch_inputs)` return a `ScoreOutput`; returns the function that undoes it.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        logits_budget_mb, vocab_filter, backend: as in `linear_logprobs`.

    Raises:
        ValueError: the model has no linear output embedding.
    """
    causal_lm = _causal_lm(model)
    head = _lm_head(causal_lm)
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"{type(causal_lm).__name__}: lm_head carries a PEFT adapter, but its log-probs are "
            "computed from one weight; leave lm_head out of target_modules, or train it whole with "
            'modules_to_save=["lm_head"]'
        )
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(causal_lm).__name__}: expected a linear output embedding (lm_head), got "
            f"{type(head).__name__}"
        )
    disable_logprobs(causal_lm)
    options = {
        **asdict(HeadOptions.of(causal_lm.config)),
        "logits_budget_mb": logits_budget_mb,
        "vocab_filter": vocab_filter,
        "backend": backend,
    }

    def forward(
        own_forward, self, *args,
        score_index=None, score_targets=None, grad_tokens=None, score=None, **kwargs,
    ):  # fmt: skip
        if score_index is None:
            return own_forward(self, *args, **kwargs)
        with _split_tied_weight(self) as weight:
            hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])[score_index]
        score = score or functools.partial(
            _token_logps, targets=score_targets, grad_tokens=grad_tokens, options=options
        )
        return ScoreOutput(scores=_lm_head(self)(hidden, score=score, weight=weight))

    def head_forward(own_forward, self, hidden, score=None, weight=None):
        if score is None:
            return own_forward(self, hidden)
        # within a call of the module the weight is there: hooks of FSDP and ZeRO-3 have gathered it
        return score(hidden, self.weight if weight is None else weight, self.bias)

    _replace_forward(causal_lm, forward)
    _replace_forward(head, head_forward)
    return lambda: disable_logprobs(causal_lm)


def disable_logprobs(model: Any) -> None:
    """Gives a model its own forward back; does nothing to a model that has it."""
    causal_lm = _causal_lm(model)
    for module in (causal_lm, _lm_head(causal_lm)):
        bound = module.__dict__.get("forward")
        if not hasattr(bound, "tralign_before"):
            continue
        del module.forward
        if bound.tralign_before is not None:
            module.forward = bound.tralign_before


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Sets `forward(own_forward, self, …)` on one instance; copies of it run their own weights."""
    before = module.__dict__.get("forward")  # set by whoever wrapped this instance, or None

    def as_it_is(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # bound by accelerate's hooks
        assert before is not None
        return before(*args, **kwargs)

    own_forward = getattr(module.forward, "__func__", as_it_is)

    # the original's signature stays: `generate` checks its arguments against it
    @functools.wraps(type(module).forward)
    def bound(self, *args, **kwargs):
        return forward(own_forward, self, *args, **kwargs)

    bound.tralign_before = before  # pyright: ignore[reportAttributeAccessIssue]
    module.forward = types.MethodType(bound, module)


def _token_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,
    bias: Tensor | None,
    *,
    targets: Any,  # (N,) Tensor
    grad_tokens: int | None,
    options: dict[str, Any],
) -> Tensor:
    """(N,) log-probs of the targets; a gradient for the first `grad_tokens` (None: all)."""
    grad = len(targets) if grad_tokens is None else grad_tokens
    logps = linear_logprobs(hidden[:grad], weight, targets[:grad], bias=bias, **options)
    if grad == len(targets):
        return logps
    with torch.no_grad():  # KTO's KL term: no gradient, so no backward of its logits either
        rest = linear_logprobs(hidden[grad:], weight, targets[grad:], bias=bias, **options)
    return torch.cat([logps, rest])


def sequence_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """(S,) float32 summed log-probabilities of the batch's sequences, under a model that went
    through `enable_logprobs` (and, for packed batches, `enable_prefix_attention`), wrapped or not.
    """
    output = model(**_inputs(batch), score_targets=batch.targets, grad_tokens=batch.grad_tokens)
    return batch.sum_per_sequence(output.scores)


@torch.no_grad()
def hidden_kl(model: nn.Module, other: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Scalar: the KL from one model to the other, summed over the batch's own scored tokens.

    `KL(π_model(·|x, y<t) || π_other(·|x, y<t))`, exact over the vocabulary, at the contexts of the
    batch; in blocks of 64 MB of logits. Both models went through `prepare_model`.
    """
    index = batch.score_index[: batch.grad_tokens]
    inputs = {**_inputs(batch), "score_index": index}

    def keep(hidden: Tensor, *head: Any) -> Tensor:
        others.append((hidden, *head))
        return hidden

    def compare(hidden: Tensor, *head: Any) -> Tensor:
        (other_hidden, *other_head), total = others[0], hidden.new_zeros((), dtype=torch.float32)
        step = max(1, (64 << 20) // (4 * head[0].shape[0]))
        for start in range(0, len(hidden), step):
            p = log_softmax(hidden[start : start + step], *head)
            q = log_softmax(other_hidden[start : start + step], *other_head)
            total += (p.exp() * (p - q)).sum()
        return total

    def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = nn.functional.linear(hidden, weight, bias).float() * options.logit_scale
        if options.softcap is not None:
            z = options.softcap * torch.tanh(z / options.softcap)
        return z.log_softmax(-1)

    others: list[tuple[Any, ...]] = []
    options = HeadOptions.of(_causal_lm(_unwrapped(model)).config)
    other(**inputs, score=keep)
    return model(**inputs, score=compare).scores


def _inputs(batch: PackedBatch) -> dict[str, Any]:
    """The keywords of the model's forward, but for what is scored how."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if batch.layout is None:
        inputs["attention_mask"] = batch.attention_mask
    else:
        # transformers passes a 4-D mask on as it is: none of (T, T) is built, and ours is not read
        inputs["attention_mask"] = batch.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
        inputs["prefix_layout"] = batch.layout
    inputs["score_index"] = batch.score_index
    return inputs


def prepare_model(
    model: PreTrainedModel,
    *,
    packing: bool = True,
    logits_budget_mb: float = 1024,
    vocab_filter: float | None = None,
    backend: str = "auto",
    probe: bool = True,
) -> bool:
    """Makes `sequence_logps` work on `model`; returns whether it can run packed rows.

    Both are tried on twelve tokens: the log-probs must equal those of the model's own logits, and
    the hidden states of a packed row those of separate sequences. An attention that cannot do
    packed rows (a recurrent layer, sinks, position biases, …) is left alone with one warning, and
    the caller uses padded batches. Without `probe` nothing is tried, and `packing` is the answer.

    Raises:
        ValueError: the model's head is not `softcap(scale · (W h + b))`, or its 4-bit weights were
            repacked for inference.
    """
    _keep_4bit_differentiable(model)
    enable_logprobs(
        model, logits_budget_mb=logits_budget_mb, vocab_filter=vocab_filter, backend=backend
    )
    _leave_prompts_out_of_last_mlp(model)
    _speed_up_linears(model)
    if not probe or next(model.parameters()).device.type == "meta":
        if packing:
            enable_prefix_attention(_causal_lm(model))
        return packing
    was_training = model.training
    model.eval()
    try:
        _check_head(model)
        return packing and _enable_packing(model)
    finally:
        model.train(was_training)


def compile_layers(model: PreTrainedModel, **options: Any) -> None:
    """Compiles the decoder layers in place, with `torch.compile(**options)`.

    Raises:
        ValueError: no layers were found.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        name = type(_causal_lm(model)).__name__
        raise ValueError(f"torch_compile: found no decoder layers in {name}; leave it out")
    for layer in layers:
        layer.compile(**options)


def _leave_prompts_out_of_last_mlp(model: PreTrainedModel) -> None:
    """Runs the last layer's MLP on the rows of a packed batch that are scored.

    What it would add to a prompt's other rows nobody reads: keys and values come before it. Those
    rows keep what the layer's attention left in them.
    """
    layers = getattr(_causal_lm(model).base_model, "layers", None)
    attention, mlp = (
        None if layers is None else getattr(layers[-1], name, None) for name in ("self_attn", "mlp")
    )
    if attention is None or mlp is None or hasattr(mlp, "handover"):
        return
    # the attention is told the layout, and runs before the MLP, also where a checkpoint runs both
    # again; a copy of the model copies what the two share
    attention.handover = mlp.handover = {}

    @torch.compiler.disable
    def attention_forward(own_forward, self, *args, **kwargs):
        self.handover["layout"] = kwargs.get("prefix_layout")
        return own_forward(self, *args, **kwargs)

    @torch.compiler.disable
    def mlp_forward(own_forward, self, hidden):
        layout = self.handover.pop("layout", None)
        if layout is None:
            return own_forward(self, hidden)
        rows = layout.scored_rows(hidden.device)
        added = own_forward(self, hidden.index_select(1, rows))
        if not isinstance(added, Tensor):  # with router logits, of every row
            return own_forward(self, hidden)
        return added.new_zeros(hidden.shape).index_copy(1, rows, added)

    _replace_forward(attention, attention_forward)
    _replace_forward(mlp, mlp_forward)


def _speed_up_linears(model: nn.Module) -> None:
    """Runs a CPU's fp32 products through the faster of the libraries that PyTorch has for them.

    LoRA's factors are left out: products with so few columns gain nothing, and the adapter
    reference runs past adapters by `F.linear`, to the same bits.
    """

    def forward(own_forward, self, input):
        return onednn.linear(input, self.weight, self.bias)

    if not onednn.is_faster():
        return
    for name, module in model.named_modules():
        is_own = type(module) is nn.Linear and "forward" not in module.__dict__
        if is_own and ".lora_" not in name:
            _replace_forward(module, forward)


def _keep_4bit_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in the first evaluation on a CPU: its packed
    product has no backward, and whatever lies before it would silently be left untrained."""
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            state = module.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"{name}: bitsandbytes has repacked its 4-bit weight for inference, which has "
                    "no backward; load the model again and train it before anything is evaluated"
                )
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


# Two prompts with two completions each: a sharing error shows as an error of order one.
_PROBE = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
    {"prompt_ids": [3, 1], "chosen_ids": [9], "rejected_ids": [2, 5]},
]


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    batch = _probe(model, "padded")
    ours = sequence_logps(model, batch)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    own = logits.flatten(0, 1)[batch.score_index].float().log_softmax(-1)
    theirs = batch.sum_per_sequence(own.gather(1, batch.targets[:, None])[:, 0])
    if not _close(ours, theirs, model.dtype):
        raise ValueError(
            f"{type(_causal_lm(model)).__name__}: its logits are not softcap(scale · (W h + b)) as "
            f"far as its config tells (log-probs {theirs.tolist()}, expected {ours.tolist()})"
        )


@torch.no_grad()
def _enable_packing(model: PreTrainedModel) -> bool:
    # first: the attention that padded batches then run through is also the one compared with
    undo = enable_prefix_attention(_causal_lm(model))
    separate = sequence_logps(model, _probe(model, "padded"))
    try:
        shared = sequence_logps(model, _probe(model, "shared"))
        reason = (
            None if _close(shared, separate, model.dtype) else "packed rows give other log-probs"
        )
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
    if reason is None:
        return True
    undo()
    warn_once(
        f"{type(_causal_lm(model)).__name__} cannot share prompts in a packed row ({reason}): "
        "tralign-fast uses padded batches"
    )
    return False


def _probe(model: PreTrainedModel, layout: str) -> PackedBatch:
    device = next(model.parameters()).device
    (batch,) = PreferenceCollator(paired=True, layout=layout)(_PROBE).parts
    return batch.to(device)


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    # SmolLM2: rounding is off by 3e-7 in fp32; a rejected completion that sees the chosen one by
    # 1.2e-2 in fp32 and 3e-2 in bf16. TF32 products round to about the digits of bf16.
    full = dtype in (torch.float32, torch.float64)
    exact = full and torch.get_float32_matmul_precision() == "highest"
    tolerance = 1e-4 if exact else 1e-2
    return bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


def _unwrapped(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model)


def _causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _lm_head(causal_lm: Any) -> Any:
    """The output embedding in use: PEFT keeps the one of `modules_to_save` beside the original."""
    head = causal_lm.get_output_embeddings()
    if not hasattr(head, "modules_to_save"):
        return head
    active = [] if head.disable_adapters else head.active_adapters
    return head.modules_to_save[active[0]] if active else head.original_module
