"""What is trained: a model, its rows, and the options that two trainers share."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tralign_fast.distributed.presets import preset
from tralign_fast.ops.losses import LOSSES


@dataclass(frozen=True)
class Workload:
    """A model and what it is trained on, in the form that both trainers can be given.

    Args:
        model: config of a transformers causal LM.
        pairs: preference pairs of a batch (KTO: rows).
        tokens: of the packed row in all. A pair is `[prompt | chosen | rejected]`, half of it
            prompt, a quarter each completion: an unshared padded batch has 1.5 times as many.
        dtype: of the weights, "bfloat16" or "float32" (then under bf16 autocast).
        lora_rank: adapters on every linear layer but the head (PEFT's "all-linear"); None: full
            fine-tuning.
        lora_dtype: of the adapters; PEFT's own default beside bf16 weights is "float32".
        base_bits: 16, or 4: the linear layers of the base are bitsandbytes' NF4.
        options: of `TRConfig`.
        gpus: that FSDP2 shards all over, each with `pairs` and `tokens` of its own.
    """

    model: Any
    pairs: int = 2
    tokens: int = 4096
    dtype: str = "bfloat16"
    lora_rank: int | None = None
    lora_dtype: str = "bfloat16"
    base_bits: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    gpus: int = 1

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.tokens < 4 * self.pairs:
            raise ValueError(
                f"tokens={self.tokens}, pairs={self.pairs}: expected at least 4 tokens a pair"
            )
        for name in ("dtype", "lora_dtype"):
            if getattr(self, name) not in ("bfloat16", "float32"):
                raise ValueError(
                    f"{name}: expected bfloat16 or float32, got {getattr(self, name)!r}"
                )
        if self.gpus < 1:
            raise ValueError(f"gpus must be at least 1, got {self.gpus}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if self.base_bits not in (4, 16):
            raise ValueError(f"base_bits: expected 16 or 4, got {self.base_bits}")
        if self.base_bits == 4 and self.lora_rank is None:
            raise ValueError("base_bits=4: a quantised base cannot be trained; set lora_rank")

    @property
    def paired(self) -> bool:
        return LOSSES[self.options.get("loss_type", "dpo")].paired

    def rows(self) -> list[dict[str, Any]]:
        """Tokenised rows of two batches of every GPU."""
        pair = self.tokens // self.pairs
        completion = pair // 4
        prompt = [0] * (pair - 2 * completion)
        ids = [0] * completion
        rows = []
        for row in range(2 * self.pairs * self.gpus):
            own = {"chosen_ids": ids, "rejected_ids": [*ids[1:], 1]}  # which may not be alike
            if not self.paired:
                # TRL's name for the completion of another prompt, which it takes ready made
                own = {"completion_ids": ids, "KL_completion_ids": ids, "label": row % 2 == 0}
            rows.append({"row": row, "prompt_ids": prompt, **own})
        return rows

    def build(self, on_gpu: bool = False) -> Any:
        """The policy with random weights, on fake tensors inside `FakeTensorMode`."""
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, self.dtype)
        with torch.device("cuda") if on_gpu else contextlib.nullcontext():
            model = AutoModelForCausalLM.from_config(
                self.model, dtype=dtype, attn_implementation=_attention(self.model)
            )
        if self.base_bits == 4:
            _quantise(model)
        return self.with_adapters(model)

    def with_adapters(self, model: Any) -> Any:
        """The model as a policy: with new adapters, if the workload trains some."""
        if self.lora_rank is None:
            return model
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.lora_rank, lora_alpha=self.lora_rank, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, self.lora_dtype))
        return model

    def arguments(self, folder: str, on_gpu: bool = False) -> dict[str, Any]:
        """Options that `TRConfig` and TRL's configs share: two steps, and nothing written."""
        return {
            "output_dir": folder,
            "max_steps": 2,
            "per_device_train_batch_size": self.pairs,
            "gradient_checkpointing": True,
            "use_cpu": not on_gpu,
            "bf16": self.dtype == "float32",
            "max_length": None,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **(preset("fsdp2") if self.gpus > 1 else {}),
            **self.options,
        }


def _attention(config: Any) -> str | None:
    """sdpa, or what transformers takes where a model, such as Gemma 2, has none."""
    from transformers import AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return "sdpa" if getattr(kind, "_supports_sdpa", True) else None


def _quantise(model: Any) -> None:
    """Linear layers but the head become bitsandbytes' NF4 with compressed statistics (4.13 bits a
    weight), without data: real quantisation needs some."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, modules

    # a plain parameter: a subclass of Tensor cannot be fake
    def plain(data: Tensor, **_: Any) -> Any:
        return nn.Parameter(data, requires_grad=False)

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is model.get_output_embeddings():
                continue
            dtype, numel = layer.weight.dtype, layer.weight.numel()
            with mock.patch.object(modules, "Params4bit", plain):
                quantised = Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=dtype,
                    quant_type="nf4",
                )  # fmt: skip
            quantised.bias = layer.bias
            statistics = QuantState(
                torch.empty(-(-numel // (64 * 256))), code=torch.empty(256), blocksize=256,
                dtype=torch.float32,
            )  # fmt: skip
            weight = plain(torch.empty(-(-numel // 2), 1, dtype=torch.uint8))
            weight.quant_state = QuantState(
                torch.empty(-(-numel // 64), dtype=torch.uint8), layer.weight.shape,
                code=torch.empty(16), blocksize=64, quant_type="nf4", dtype=dtype,
                offset=torch.empty(()), state2=statistics,
            )  # fmt: skip
            weight.compress_statistics, weight.quant_type = True, "nf4"
            quantised.weight = weight
            quantised.support_avx512bf16_for_cpu = False
            setattr(parent, name, quantised)
    model.is_loaded_in_4bit = True
