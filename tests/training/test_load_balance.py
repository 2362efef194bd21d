"""The load-balancing loss of mixtures of experts, beside TRL 1.16's trainers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import transformers as t
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from tests.model.test_prepare import snapshot
from tests.training.test_trainer import make
from tests.training.test_trl_parity import (
    STEPS,
    history,
    kto_rows,
    options,
    pair_rows,
    run_both,
    trl_classes,
)
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.model.prepare import prepare_model
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


QUICK = {
    ("Mixtral", "dpo", "shared"), ("Mixtral", "kto", "packed"), ("Mixtral", "dpo", "padded"),
    ("Qwen3-MoE", "kto", "shared"), ("Qwen3-MoE", "kto", "padded"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "method", "layout"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.matrix)
        for case in itertools.product(["Mixtral", "Qwen3-MoE"], ["dpo", "kto"], LAYOUTS)
    ],
)
def test_losses_equal_trl_at_every_step(name, method, layout, small_tokenizer, tmp_path):
    rows = kto_rows() if method == "kto" else pair_rows()
    theirs, mine = run_both(
        method, make_moe(small_tokenizer, name), small_tokenizer, tmp_path, rows,
        ours=LAYOUTS[layout], ref_model_sync_steps=3,
    )  # fmt: skip
    assert mine.data_collator.layout == layout
    check_equal(theirs, mine)


@pytest.mark.parametrize(("name", "method"), [("Qwen2-MoE", "dpo"), ("GPT-OSS", "kto")])
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


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_accumulation_checkpoints_and_evaluation_equal_trl(method, small_tokenizer, tmp_path):
    rows = kto_rows() if method == "kto" else pair_rows()
    theirs, mine = run_both(
        method, make_moe(small_tokenizer), small_tokenizer, tmp_path, rows,
        held_out=rows.select(range(8)), per_device_train_batch_size=2, max_steps=4,
        gradient_accumulation_steps=2, gradient_checkpointing=True, ref_model_sync_steps=2,
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2,
        router_aux_loss_coef=0.2,
    )  # fmt: skip
    check_equal(theirs, mine, steps=4)
    for key in ("eval_loss", "eval_aux_loss"):
        assert logs(mine, key) == pytest.approx(logs(theirs, key), abs=1e-5), key
        assert len(logs(mine, key)) == 2


def test_a_run_shorter_than_a_log_says_it_at_its_end(small_tokenizer, tmp_path):
    theirs, mine = run_both(
        "dpo", make_moe(small_tokenizer), small_tokenizer, tmp_path, pair_rows(8), max_steps=2,
        logging_steps=10,
    )  # fmt: skip
    for trainer in (theirs, mine):
        trainer.train()
    assert logs(mine, "aux_loss") == pytest.approx(logs(theirs, "aux_loss"), abs=1e-5)
    assert len(logs(mine, "aux_loss")) == 1


@pytest.mark.parametrize(("layout", "method"), [("shared", "kto"), ("padded", "dpo")])
def test_a_token_budget_changes_no_loss(layout, method, small_tokenizer, tmp_path):
    rows = (kto_rows if method == "kto" else pair_rows)(16)
    whole, split = (
        make(
            make_moe(small_tokenizer), small_tokenizer, tmp_path / str(budget), method, rows,
            rows.select(range(8)), max_steps=3, ref_model_sync_steps=2, token_budget=budget,
            gradient_accumulation_steps=2, **LAYOUTS[layout],
        )
        for budget in (None, 100)
    )  # fmt: skip
    assert len(next(iter(split.get_train_dataloader())).parts) > 1
    for trainer in (whole, split):
        trainer.train()
        trainer.evaluate()
    for key in ("loss", "aux_loss", "grad_norm", "eval_loss", "eval_aux_loss"):
        assert len(logs(split, key)) == (1 if key.startswith("eval") else 3)
        assert logs(split, key) == pytest.approx(logs(whole, key), rel=2e-5), key


PEFT = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["gate.weight"]),
    "experts": lambda: LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"]),
    "virtual tokens": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
}


@pytest.mark.parametrize(
    ("kind", "method"), [("LoRA", "kto"), ("experts", "dpo"), ("virtual tokens", "dpo")]
)
def test_peft_equals_trl(method, kind, small_tokenizer, tmp_path):
    rows = kto_rows() if method == "kto" else pair_rows()
    config, trl_trainer = trl_classes(method)
    base = make_moe(small_tokenizer)

    def build(make_trainer, make_config, where, **extra):
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), PEFT[kind]())
        args = make_config(**options(tmp_path / where, sync_ref_model=False, **extra))
        return make_trainer(model, args=args, train_dataset=rows, processing_class=small_tokenizer)

    name = "kto" if method == "kto" else "sigmoid"
    theirs = build(trl_trainer, config, "trl", loss_type=name)
    mine = build(TRTrainer, TRConfig, "ours", loss_type=method, reference="resident")
    if kind == "virtual tokens":  # TRL's reference has none: only the first forwards are alike
        for trainer in (mine, theirs):
            trainer.train()
        assert logs(mine, "aux_loss")[0] == pytest.approx(logs(theirs, "aux_loss")[0], abs=1e-5)
        return
    check_equal(theirs, mine)


def test_the_coefficient_is_checked(tiny_llama, small_tokenizer, tmp_path):
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="router_aux_loss_coef"):
            TRConfig(str(tmp_path), router_aux_loss_coef=wrong)
    with pytest.raises(ValueError, match="LlamaForCausalLM is no mixture of experts"):
        make(tiny_llama, small_tokenizer, tmp_path, router_aux_loss_coef=0.1)
    assert not make(
        tiny_llama, small_tokenizer, tmp_path, router_aux_loss_coef=0.0
    ).aux_loss_enabled
    trainer = make(
        make_moe(small_tokenizer), small_tokenizer, tmp_path, router_aux_loss_coef=0.0, max_steps=1
    )
    assert not trainer.aux_loss_enabled
    assert history(trainer) == [pytest.approx(0.693147, abs=1e-6)]
    assert not logs(trainer, "aux_loss")


def test_only_the_policy_is_asked(small_tokenizer, tmp_path):
    """Also where the model's config asks always."""
    model = make_moe(small_tokenizer, output_router_logits=True)
    trainer = make(model, small_tokenizer, tmp_path, max_steps=2)
    found = {}

    def watch(who):
        def hook(module, args, kwargs, output):
            wanted = kwargs["prefix_layout"].every_row
            found.setdefault(who, set()).add((wanted, output.get("router_logits") is not None))

        return hook

    for who, m in (("policy", trainer.model), ("reference", trainer.reference.model)):
        m.model.register_forward_hook(watch(who), with_kwargs=True)
    trainer.train()
    assert found == {"policy": {(True, True)}, "reference": {(False, False)}}


def test_a_model_without_router_logits_goes_on(tiny_llama, small_tokenizer, tmp_path):
    """The options stand in the config, but no layer has a router."""
    expected = history(make(tiny_llama, small_tokenizer, tmp_path / "a", max_steps=2))
    odd = copy.deepcopy(tiny_llama)
    odd.config.output_router_logits, odd.config.router_aux_loss_coef = False, 0.1
    trainer = make(odd, small_tokenizer, tmp_path / "b", max_steps=2)
    with pytest.warns(UserWarning, match="no router logits; training without") as warned:
        assert history(trainer) == expected
    assert len([w for w in warned if "router" in str(w.message)]) == 1
    assert not trainer.aux_loss_enabled
    assert not logs(trainer, "aux_loss")


def test_reentrant_checkpoints_are_told(small_tokenizer, tmp_path):
    extra = {"gradient_checkpointing": True, "max_steps": 1}
    extra["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    trainer = make(make_moe(small_tokenizer), small_tokenizer, tmp_path, **extra)
    with pytest.warns(UserWarning, match="load-balancing loss is logged but has no grad"):
        trainer.train()


def test_the_model_is_given_back(small_tokenizer, tmp_path):
    model = make_moe(small_tokenizer)
    before = snapshot(model)
    with prepare_model(model) as prepared:
        assert prepared.packs
        assert any(m._forward_hooks for m in model.modules())
    assert snapshot(model) == before
    assert not any(m._forward_hooks for m in model.modules())
