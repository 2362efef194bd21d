"""What an arm trains: a case as rows, a model and a trainer."""

from __future__ import annotations

import contextlib
import copy
import random
from dataclasses import replace
from typing import Any

from benchmarks.gpu.cases import WINDOW, Case, Shape

SEED = 0
WARM_UP = 1  # windows
MOST = 5  # timed windows


def shape_of(case: Case, tiny: bool) -> Shape:
    """The case's, or with --tiny a 64th of its tokens."""
    return replace(case.shape, tokens=case.shape.tokens // 64) if tiny else case.shape


def make_work(case: Case, tiny: bool, traced: bool = False) -> Any:
    """The case as a `Workload` of distinct rows and seeded weights; for a trace without values."""
    from tralign_fast.memory import Workload
    from tralign_fast.memory.plan_options import load_config

    class Work(Workload):
        def rows(self) -> list[dict[str, Any]]:
            return make_rows(shape, self.model.vocab_size, self.options["max_steps"])

        def build(self, on_gpu: bool = False) -> Any:
            import torch

            torch.manual_seed(SEED)  # the reference of TRL is a second model, with equal weights
            quantises = self.base_bits == 4 and not traced
            model = _quantised(self, on_gpu) if quantises else super().build(on_gpu)
            if case.arm == "trl_liger":
                from transformers.integrations.liger import apply_liger_kernel

                apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
            return model

    shape = shape_of(case, tiny)
    config = _tiny_config() if tiny else load_config(case.model.preset)
    return Work(
        config,
        pairs=shape.pairs,
        tokens=shape.tokens,
        dtype="float32" if tiny else "bfloat16",
        lora_rank=case.model.lora_rank,
        lora_dtype="float32" if tiny else "bfloat16",
        base_bits=case.model.base_bits,
        options=options_of(case),
    )


def _tiny_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip


def make_rows(shape: Shape, vocab: int, steps: int) -> list[dict[str, Any]]:
    """Random tokens, other ones in every row, so that a sweep has all rows of a window to score."""
    draw = random.Random(SEED)

    def ids(count: int) -> list[int]:
        return draw.choices(range(1, vocab), k=count)  # 0 is padding

    return [
        {
            "row": row,
            "prompt_ids": ids(shape.prompt),
            "chosen_ids": ids(shape.completion),
            "rejected_ids": ids(shape.completion),
        }
        for row in range(steps * shape.pairs)
    ]


def options_of(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_steps": (WARM_UP + MOST + 1) * WINDOW,
        "ref_model_sync_steps": WINDOW,
        "ref_model_mixup_alpha": case.model.alpha,
        "gradient_checkpointing": case.checkpointing,
        "bf16": False,  # the weights are
        "logging_strategy": "steps",
        "logging_steps": WINDOW,
    }
    if case.model.released:
        options |= {"optim": "adafactor", "max_grad_norm": 0.0}
        options |= {} if case.is_trl else {"gradient_release": True}
    if case.arm == "ours_plain":
        options |= {"layer_kernels": "none", "cuda_graphs": False}
    if case.arm == "ours_powers":
        options |= {"kept": "powers"}
    if case.arm == "ours_half":
        options |= {"gradient_checkpointing_layers": 0.5}
    if case.arm == "ours_frozen":
        options |= {"precompute_ref_log_probs": True, "sync_ref_model": False}
    return options


def _quantised(work: Any, on_gpu: bool) -> Any:
    """NF4 layers of random weights with adapters. One layer at a time is there in 16 bits."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import nn
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, work.dtype)
    device = torch.device("cuda" if on_gpu else "cpu")

    def quantise(layer: nn.Module) -> nn.Module:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    options: Any = {"quant_type": "nf4", "compress_statistics": True}
                    weight = Params4bit(child.weight.data, requires_grad=False, **options)
                    with torch.device("meta"):
                        small = Linear4bit(
                            child.in_features, child.out_features, bias=False,
                            compute_dtype=dtype, quant_type="nf4",
                        )  # fmt: skip
                    small.weight = weight
                    setattr(parent, name, small.to(device))
        return layer

    config = copy.deepcopy(work.model)
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    with device:
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    kind = type(model.model.layers[0])
    quantise(model.model.layers)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            for index in range(1, layers):
                model.model.layers.append(quantise(kind(model.config, index)))
    finally:
        torch.set_default_dtype(default)
    model.config.num_hidden_layers = layers
    model.is_loaded_in_4bit = True
    return work.with_adapters(model)


def make_trainer(case: Case, work: Any, folder: str, on_gpu: bool) -> Any:
    from tralign_fast.memory import trainers

    make = trainers.make_trl_trainer if case.is_trl else trainers.make_trainer
    trainer = make(work, folder, on_gpu=on_gpu)
    if case.arm == "trl_liger_loss":
        _use_liger_loss(trainer)
    return trainer


def _use_liger_loss(trainer: Any) -> None:
    """Liger's head and loss as one, in place of TRL's head and loss: TRL 1.16 has no option for it.
    TRL's metrics of tokens are left out."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=trainer.beta, compiled=torch.cuda.is_available())
    policy = trainer.model
    is_peft = hasattr(policy, "peft_config")
    causal = policy.get_base_model() if is_peft else policy
    reference = trainer.ref_model or causal

    def adapter() -> Any:
        if not is_peft:
            return contextlib.nullcontext()
        from trl.trainer.dpo_trainer import use_adapter

        return use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)

    def hidden(model: Any, inputs: Any) -> Any:
        out = model.base_model(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        return out.last_hidden_state[:, :-1]

    def compute(model: Any, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
        rows = hidden(causal, inputs)
        with torch.no_grad(), adapter():
            ref_rows = hidden(reference, inputs)
        value, metrics = loss(
            causal.lm_head.weight, rows, labels, None, ref_rows, reference.lm_head.weight, None
        )
        names = ("logps/chosen", "logps/rejected")
        for name, found in zip(names, metrics, strict=False):
            trainer._metrics["train"][name].append(found.detach().mean().item())
        return value

    trainer.compute_loss = compute
