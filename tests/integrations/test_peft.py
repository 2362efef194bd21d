"""QLoRA from end to end: a 4-bit base, a moving reference, an adapter that opens elsewhere."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.integrations.conftest import logs
from tests.reference.test_adapter import lora, quantised
from tests.training.test_trainer import make
from tralign_fast.integrations.trl import TrustRegionCallback, use_fast_logprobs

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
IDS = torch.arange(3, 40)[None]


def logps(model, moved=False):
    """Log-probs of a sequence's tokens under the policy or, moved, under its reference."""
    which = model.disable_adapter() if moved else contextlib.nullcontext()
    model.train()  # in eval mode bitsandbytes may repack the base; no dropout here
    with torch.no_grad(), which:
        logits = model(IDS).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, IDS[0, 1:, None])


def opened(folder, adapter):
    """What somebody else loads: the same base in 4 bits, and the saved adapter."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return peft.PeftModel.from_pretrained(base, str(adapter))


def test_trl_trains_qlora_with_the_callback(build, small_tokenizer, tmp_path):
    four_bit, plain = quantised(small_tokenizer, tmp_path / "model")
    losses = []
    for base in (plain, four_bit):
        model = lora(base)
        for parameter in model.parameters():  # what TRL does to the adapter of a quantised base
            parameter.data = parameter.data.bfloat16() if parameter.requires_grad else parameter
        trainer = build("dpo", model=model, ref=False, learning_rate=2e-2)
        undo = use_fast_logprobs(trainer)
        trainer.add_callback(TrustRegionCallback(0.6, 2, trainer=trainer))
        losses.append([log["loss"] for log in logs(trainer)])
        undo()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len({round(loss, 4) for loss in losses[1]}) > 3
    policy, moved = logps(trainer.model), logps(trainer.model, moved=True)
    trainer.callback_handler.callbacks[-1].detach()
    start = logps(trainer.model, moved=True)
    assert (moved - start).abs().max() > 1e-3
    assert (moved - policy).abs().max() < (start - policy).abs().max()
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = opened(tmp_path / "model", tmp_path / "adapter")
    for name, parameter in fresh.named_parameters():  # PEFT opens bf16 factors in fp32
        parameter.data = parameter.data.bfloat16() if "lora" in name else parameter.data
    torch.testing.assert_close(logps(fresh), policy, rtol=1e-5, atol=1e-5)


def test_trtrainers_qlora_opens_elsewhere(small_tokenizer, tmp_path):
    four_bit, _ = quantised(small_tokenizer, tmp_path / "model")
    schedule = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
    trainer = make(
        lora(four_bit), small_tokenizer, tmp_path / "run", reference="adapter", max_steps=4,
        learning_rate=2e-2, **schedule,
    )  # fmt: skip
    start = copy.deepcopy([p for p in trainer.model.parameters() if p.requires_grad])
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(start, trained, strict=True))
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = opened(tmp_path / "model", tmp_path / "adapter")
    torch.testing.assert_close(logps(fresh), logps(trainer.model), rtol=1e-5, atol=1e-5)
