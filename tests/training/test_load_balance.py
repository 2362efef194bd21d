"""The load-balancing loss of mixtures of experts, beside TRL 1.16's trainers."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from tests.training.test_trl_parity import STEPS, kto_rows, pair_rows, run_both
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.model.router import asked

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "Mixtral": (t.MixtralForCausalLM, t.MixtralConfig, {}),
    "Qwen3-MoE": (t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig, {"moe_intermediate_size": 16}),
    # the first layer has no router
    "Qwen2-MoE": (
        t.Qwen2MoeForCausalLM,
        t.Qwen2MoeConfig,
        {
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [0],
        },
    ),
    # attention sinks: padded batches; its MLP returns two tensors
    "GPT-OSS": (t.GptOssForCausalLM, t.GptOssConfig, {"head_dim": 8}),
}
LAYOUTS = {"shared": {}, "packed": {"prefix_sharing": False}, "padded": {"packing": False}}


def make_moe(tokenizer, name="Mixtral", **options):
    model_class, config_class, own = MODELS[name]
    torch.manual_seed(0)
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    model = model_class(config_class(**{
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "router_aux_loss_coef": 0.05, **EXPERTS, **own,
        **{n: getattr(tokenizer, n) for n in names}, **options,
    }))  # fmt: skip
    with torch.no_grad():  # tokens go to experts unevenly, and the losses of rows differ
        for n, p in model.named_parameters():
            if n.endswith(("gate.weight", "router.weight")):
                p.mul_(20)
    return model


def logs(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


def check_equal(theirs, mine, steps=STEPS):
    assert theirs.aux_loss_enabled
    assert mine.aux_loss_enabled
    assert mine.router_aux_loss_coef == theirs.router_aux_loss_coef
    for trainer in (theirs, mine):
        trainer.train()
    for key in ("loss", "aux_loss"):
        expected = logs(theirs, key)
        assert len(expected) == steps
        assert logs(mine, key) == pytest.approx(expected, abs=1e-5), key
    # worth comparing: the experts are not used evenly, and what is logged moves
    assert max(logs(mine, "aux_loss")) > 2.05
    assert len(set(logs(mine, "aux_loss"))) > 1
    grads = zip(logs(mine, "grad_norm"), logs(theirs, "grad_norm"), strict=True)
    for a, b in grads:
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["dpo", "kto"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_losses_equal_trl_at_every_step(name, method, layout, small_tokenizer, tmp_path):
    rows = kto_rows() if method == "kto" else pair_rows()
    theirs, mine = run_both(
        method, make_moe(small_tokenizer, name), small_tokenizer, tmp_path, rows,
        ours=LAYOUTS[layout], ref_model_sync_steps=3,
    )  # fmt: skip
    assert mine.data_collator.layout == layout
    check_equal(theirs, mine)


@pytest.mark.parametrize("method", ["dpo", "kto"])
@pytest.mark.parametrize("name", ["Qwen2-MoE", "GPT-OSS"])
def test_layers_without_router_and_padded_models(name, method, small_tokenizer, tmp_path):
    rows = kto_rows() if method == "kto" else pair_rows()
    padded = LAYOUTS["padded" if name == "GPT-OSS" else "packed"]
    theirs, mine = run_both(
        method, make_moe(small_tokenizer, name), small_tokenizer, tmp_path, rows,
        ours=padded, ref_model_sync_steps=3,
    )  # fmt: skip
    check_equal(theirs, mine)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_what_fills_a_row_up_weighs_nothing(layout):
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [8, 9, 10], "rejected_ids": [11, 12]},
    ]
    plain = PreferenceCollator(paired=True, layout=layout)(rows)
    filled = PreferenceCollator(paired=True, layout=layout, pad_to_multiple_of=32)(rows)
    weights = [asked(batch).balance.weights for batch in (plain, filled)]
    assert len(weights[1]) == 32
    torch.testing.assert_close(weights[1][: len(weights[0])], weights[0])
    assert not weights[1][len(weights[0]) :].any()
