"""The callback and the fast head inside the real trainers of TRL."""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import types
import weakref

import pytest
import torch
from transformers import TrainerCallback

from tests.integrations.conftest import logs, same_logs
from tralign_fast.integrations.trl import TrustRegionCallback, use_fast_logprobs

METHODS = ["dpo", "kto", "grpo"]


def start_equal(*trainers):
    """GRPO samples: the same completions in each."""
    for trainer in trainers:
        torch.manual_seed(0)
        yield logs(trainer), trainer


# --- the callback ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_callback_does_what_trls_does(method, build):
    theirs = build(method, sync_ref_model=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=2)
    ours = build(method)
    callback = TrustRegionCallback(0.6, 2, trainer=ours)
    ours.add_callback(callback)
    start = [p.clone() for p in ours.ref_model.parameters()]
    (expected, _), (losses, _) = start_equal(theirs, ours)
    same_logs(losses, expected)
    assert callback.syncs == 3
    pairs = zip(ours.ref_model.parameters(), theirs.ref_model.parameters(), start, strict=True)
    for a, b, first in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert not torch.equal(a, first) or a.numel() < 64


def test_a_bf16_reference_arrives_where_it_should(build, tiny_llama):
    trainer = build("dpo")
    trainer.ref_model.to(torch.bfloat16)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.02)  # each update moves a weight by 2e-4 of itself: bf16 keeps 4e-3
    share = {}
    for rounding in ("stochastic", "nearest"):
        ref = copy.deepcopy(trainer.ref_model)
        callback = TrustRegionCallback(0.01, 1, ref_model=ref, rounding=rounding)
        for _ in range(20):
            callback._reference.move(trainer.model)
        moved = torch.cat([(p.float() - q).flatten() * q.sign().flatten() for p, q in zip(
            ref.parameters(), tiny_llama.parameters(), strict=True)])  # fmt: skip
        full = torch.cat([q.abs().flatten() * 0.02 for q in tiny_llama.parameters()])
        share[rounding] = float(moved.sum() / full.sum()) / (1 - 0.99**20)
    assert share["stochastic"] == pytest.approx(1, abs=0.05)
    assert share["nearest"] < 0.5


# --- PEFT -----------------------------------------------------------------------------------------


def lora(**extra):
    from peft import LoraConfig

    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], **extra}
    return LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **options)


class _MixMerged(TrainerCallback):
    """What a moving reference of a PEFT policy is: full weights, mixed with the merged policy's."""

    def __init__(self, trainer, alpha, every):
        self.trainer, self.alpha, self.every = trainer, alpha, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        merged = copy.deepcopy(model).merge_and_unload()
        pairs = zip(self.trainer.ref_model.parameters(), merged.parameters(), strict=True)
        for ref, theta in pairs:
            ref.data.lerp_(theta.data, self.alpha)


@pytest.mark.parametrize(
    ("alpha", "config"),
    [
        (0.6, {}),
        (0.1, {"use_rslora": True}),
        (1.0, {}),
        (1.0, {"use_dora": True}),
        (0.6, {"use_dora": True}),
        (0.5, {"modules_to_save": ["norm"]}),
    ],
)
def test_a_peft_policys_reference_moves_exactly(alpha, config, build, tiny_llama):
    from peft import get_peft_model

    extra = {"learning_rate": 5e-2}
    torch.manual_seed(1)
    theirs = build("dpo", model=get_peft_model(copy.deepcopy(tiny_llama), lora(**config)), **extra)
    theirs.add_callback(_MixMerged(theirs, alpha, 2))
    torch.manual_seed(1)
    ours = build(
        "dpo", model=get_peft_model(copy.deepcopy(tiny_llama), lora(**config)), ref=False, **extra
    )
    callback = TrustRegionCallback(alpha, 2, trainer=ours)
    ours.add_callback(callback)
    assert list(ours.model.peft_config) == ["default"]  # not TRL's second copy
    expected, losses = logs(theirs), logs(ours)
    for log in (
        *expected,
        *losses,
    ):  # right after a hard update both rewards are 0 but for rounding
        del log["rewards/accuracies"]
    same_logs(losses, expected, rel=2e-5)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), ours.model.disable_adapter():
        moved = ours.model.eval()(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(moved, theirs.ref_model(ids).logits, rtol=1e-4, atol=1e-5)
        assert (moved - tiny_llama(ids).logits).abs().max() > 1e-2  # far from where it began


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_config_that_trl_refuses_to_sync(method, build):
    with pytest.raises(NotImplementedError, match="PEFT"):
        build(method, peft_config=lora(), sync_ref_model=True, ref_model_sync_steps=2)
    trainer = build(method, peft_config=lora(), learning_rate=5e-2)
    trainer.add_callback(TrustRegionCallback(0.6, 2, trainer=trainer))
    trainer.train()
    ids = torch.arange(3, 20)[None]
    model = trainer.model.eval()
    policy = model(ids).logits
    with model.disable_adapter():
        moved = model(ids).logits
    trainer.callback_handler.callbacks[-1].detach()
    with model.disable_adapter():
        base = model(ids).logits
    assert (moved - base).abs().max() > 1e-4
    assert (moved - policy).abs().max() < (base - policy).abs().max()


def test_checkpoints_hold_the_reference_and_the_adapter_opens(build, tiny_llama):
    from peft import PeftModel

    for peft_config in (None, lora()):
        extra = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 2e-2}
        whole = build("dpo", peft_config=peft_config, **extra)
        whole.add_callback(TrustRegionCallback(0.6, 2, trainer=whole))
        expected = [log["loss"] for log in logs(whole)]
        folder = f"{whole.args.output_dir}/checkpoint-3"
        again = build("dpo", peft_config=peft_config, **extra)
        again.args.output_dir = whole.args.output_dir
        again.add_callback(TrustRegionCallback(0.6, 2, trainer=again))
        resumed = [log["loss"] for log in logs(again, resume_from_checkpoint=folder)]
        assert resumed[-3:] == pytest.approx(expected[3:], rel=1e-5)
        if peft_config is not None:
            opened = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), folder)
            assert any("lora_A" in name for name, _ in opened.named_parameters())
            assert list(opened.peft_config) == ["default"]


def test_another_runs_checkpoint_is_resumed_with_its_reference(build):
    extra = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 2e-2}
    first = build("dpo", **extra)
    first.add_callback(TrustRegionCallback(0.6, 2, trainer=first))
    expected = [log["loss"] for log in logs(first)]
    folder = f"{first.args.output_dir}/checkpoint-3"
    again = build("dpo", resume_from_checkpoint=folder, **extra)
    again.add_callback(TrustRegionCallback(0.6, 2, trainer=again))
    resumed = [log["loss"] for log in logs(again, resume_from_checkpoint=folder)]
    assert resumed[-3:] == pytest.approx(expected[3:], rel=1e-5)


def test_a_path_given_to_train_is_the_one_that_counts(build):
    """args.resume_from_checkpoint names step 2, train() step 4, of a run with other settings."""
    extra = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 2e-2}
    first = build("dpo", **extra)
    first.add_callback(TrustRegionCallback(0.6, 1, trainer=first))
    expected = [log["loss"] for log in logs(first)]
    folder = f"{first.args.output_dir}/checkpoint-"
    again = build("dpo", resume_from_checkpoint=f"{folder}2", **extra)
    again.args.output_dir = first.args.output_dir
    again.add_callback(TrustRegionCallback(0.6, 1, trainer=again))
    resumed = [log["loss"] for log in logs(again, resume_from_checkpoint=f"{folder}4")]
    assert resumed == pytest.approx(expected, rel=1e-5)
    # another run's checkpoint of the same step is not this one's
    other = build("dpo", **{**extra, "learning_rate": 1e-3})
    other.add_callback(TrustRegionCallback(0.6, 1, trainer=other))
    other.train()
    named = build("dpo", resume_from_checkpoint=f"{folder}4", **extra)
    named.args.output_dir = other.args.output_dir
    named.add_callback(TrustRegionCallback(0.6, 1, trainer=named))
    resumed = [log["loss"] for log in logs(named, resume_from_checkpoint=f"{folder}4")]
    assert resumed == pytest.approx(expected, rel=1e-5)


SAVING = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 2e-2}


def _run_of_six(build, peft_config=None):
    """The losses of a run whose reference moved, and its checkpoint of step 3."""
    first = build("dpo", peft_config=peft_config, **SAVING)
    first.add_callback(TrustRegionCallback(0.6, 2, trainer=first))
    return [log["loss"] for log in logs(first)], f"{first.args.output_dir}/checkpoint-3"


@pytest.mark.parametrize(
    ("named", "peft", "as_keyword"),
    [(None, False, True), ("elsewhere/checkpoint-3", False, False), (None, True, True)],
)
def test_a_third_folder_given_to_train_alone_is_found(named, peft, as_keyword, build):
    """Neither args.output_dir nor args.resume_from_checkpoint names it."""
    peft_config = lora() if peft else None
    expected, folder = _run_of_six(build, peft_config)
    again = build("dpo", peft_config=peft_config, resume_from_checkpoint=named, **SAVING)
    callback = TrustRegionCallback(0.6, 2, trainer=again)
    again.add_callback(callback)
    if as_keyword:
        again.train(resume_from_checkpoint=folder)
    else:
        again.train(folder)
    losses = [log["loss"] for log in again.state.log_history if "loss" in log]
    assert losses == pytest.approx(expected, rel=1e-5)
    callback.detach()
    assert "train" not in vars(again)


def test_a_third_folder_that_nobody_told_the_callback_is_refused(build):
    _, folder = _run_of_six(build)
    again = build("dpo")
    again.add_callback(TrustRegionCallback(0.6, 2, ref_model=again.ref_model))
    with pytest.raises(ValueError, match=r"resumes step 3 from a checkpoint that is not .*pass tr"):
        again.train(resume_from_checkpoint=folder)
    # named, it is found; a callback that saves none looks for none
    named = build("dpo", learning_rate=2e-2, resume_from_checkpoint=folder)
    named.add_callback(TrustRegionCallback(0.6, 2, ref_model=named.ref_model))
    named.train(resume_from_checkpoint=folder)
    other = build("dpo")
    other.add_callback(TrustRegionCallback(0.6, 2, ref_model=other.ref_model, save=False))
    with pytest.warns(UserWarning, match="holds no reference"):
        other.train(resume_from_checkpoint=folder)


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_merging_where_the_adapter_is_off_is_refused(alpha, build):
    trainer = build("dpo", peft_config=lora(), learning_rate=5e-2)
    trainer.add_callback(TrustRegionCallback(alpha, 2, trainer=trainer))
    trainer.train()
    model, ids = trainer.model.eval(), torch.arange(3, 20)[None]
    with torch.no_grad(), model.disable_adapter():
        before = model(ids).logits
    refused = pytest.raises(ValueError, match="would put the policy's adapter into the base")
    with refused, model.disable_adapter(), model.disable_adapter():
        model.merge_adapter()
    model.merge_adapter()  # as TRL does before it generates
    with (
        pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"),
        model.disable_adapter(),
    ):
        pass
    model.unmerge_adapter()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_a_resume_without_a_saved_reference_warns(build):
    extra = {"save_strategy": "steps", "save_steps": 3}
    first = build("dpo", **extra)
    first.add_callback(TrustRegionCallback(0.6, 2, trainer=first, save=False))
    first.train()
    again = build("dpo", **extra)
    again.args.output_dir = first.args.output_dir
    again.add_callback(TrustRegionCallback(0.6, 2, trainer=again))
    with pytest.warns(UserWarning, match="holds no reference"):
        again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-3")


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_fast_logprobs_change_no_loss_and_no_metric(method, build, monkeypatch):
    theirs, ours = build(method), build(method)
    used = _count(monkeypatch)
    undo = use_fast_logprobs(ours)
    (expected, _), (losses, _) = start_equal(theirs, ours)
    assert used == {True: 6, False: 6} if method != "kto" else used[True]
    same_logs(losses, expected)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    undo()
    used.clear()
    ours.evaluate(ours.train_dataset) if method == "dpo" else None
    assert not used


ONLINE = {
    # old log-probs of their own, scored in chunks of the batch, the last one smaller
    "grpo_old": {
        "num_iterations": 2,
        "steps_per_generation": 3,
        "temperature": 0.7,
        "top_entropy_quantile": 0.5,
    },
    "grpo_sequence": {"importance_sampling_level": "sequence", "temperature": 1.9},
    "rloo": {"num_iterations": 2, "temperature": 0.6},
}


@pytest.mark.parametrize("case", ONLINE)
def test_online_methods_have_trls_losses_at_every_step(case, build, monkeypatch):
    """Policy with entropy, reference and old policy, with a temperature."""
    method, extra = case.split("_")[0], {"max_steps": 8, "learning_rate": 2e-2, **ONLINE[case]}
    theirs, ours = build(method, **extra), build(method, **extra)
    used = _count(monkeypatch)
    use_fast_logprobs(ours)
    (expected, _), (losses, _) = start_equal(theirs, ours)
    assert used[True] == 8
    assert used[False] >= 4  # the reference, for every generation, and the old policy
    same_logs(losses, expected)
    assert len({log["loss"] for log in losses}) > 4  # it is no constant that agrees
    assert all(log["entropy"] > 0.5 for log in losses)


@pytest.mark.parametrize("method", [*METHODS, "rloo"])
def test_a_head_in_modules_to_save(method, build, monkeypatch):
    """The active adapter's copy is trained; the original one is the reference's."""
    extra = {"max_steps": 8, "learning_rate": 2e-2}
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainers = []
    for _ in range(2):
        torch.manual_seed(0)
        trainers.append(build(method, peft_config=config, **extra))
    theirs, ours = trainers
    used = _count(monkeypatch)
    use_fast_logprobs(ours)
    start = ours.model.get_base_model().lm_head.original_module.weight.clone()
    (expected, _), (losses, _) = start_equal(theirs, ours)
    assert used[True] >= 8
    assert used[False] >= 4
    same_logs(losses, expected)
    head, other = (t.model.get_base_model().lm_head for t in (ours, theirs))
    copies = (head.modules_to_save["default"].weight, other.modules_to_save["default"].weight)
    torch.testing.assert_close(*copies, rtol=1e-4, atol=1e-5)
    assert (copies[0] - start).abs().max() > 1e-2
    assert torch.equal(head.original_module.weight, start)


def test_a_head_in_modules_to_save_moves_with_the_reference(build):
    """The reference's head is then neither of the two that PEFT has."""
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = []
    for fast in (False, True):
        torch.manual_seed(0)
        trainer = build("dpo", peft_config=config, max_steps=8, learning_rate=2e-2)
        trainer.add_callback(TrustRegionCallback(0.6, 2, trainer=trainer))
        if fast:
            use_fast_logprobs(trainer)
        found.append(logs(trainer))
    same_logs(found[1], found[0])


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        ("dpo", "none"),
        ("grpo", "none"),
        # to compile takes minutes
        pytest.param("dpo", "inductor", marks=pytest.mark.matrix),
        pytest.param("grpo", "inductor", marks=pytest.mark.matrix),
        pytest.param("kto", "aot_eager", marks=pytest.mark.matrix),
    ],
)
def test_a_compiled_trainer(method, backend, build, monkeypatch):
    """ "none": wrapped as for the compiler, which is told to leave it."""
    chosen = {"torch_compile_backend": backend} if backend != "none" else {}
    stance = "force_eager" if backend == "none" else "default"
    found = []
    for fast in (False, True):
        torch._dynamo.reset()
        trainer = build(method, torch_compile=True, max_steps=8, **chosen)
        assert hasattr(trainer.ref_model, "_orig_mod")
        undo = use_fast_logprobs(trainer) if fast else None
        torch.manual_seed(0)
        used = _count(monkeypatch)
        with torch.compiler.set_stance(stance):
            found.append(logs(trainer))
        assert (used.get(True, 0) >= 8) == fast
    same_logs(found[1], found[0])
    undo()
    own = [trainer.model, trainer.ref_model._orig_mod]
    assert not any("_tralign_" in n for m in own for n in m.forward.__func__.__code__.co_names)


def _count(monkeypatch):
    """How often linear_logprobs ran, with and without gradient."""
    from tralign_fast.integrations import trl as integration

    used: dict[bool, int] = {}
    real = integration.linear_logprobs_and_statistics

    def counted(*args, **kwargs):
        used[torch.is_grad_enabled()] = used.get(torch.is_grad_enabled(), 0) + 1
        return real(*args, **kwargs)

    monkeypatch.setattr(integration, "linear_logprobs_and_statistics", counted)
    return used


@pytest.mark.parametrize("outputs", [("log_probs",), None], ids=["log_probs", "all"])
def test_every_output_of_trls_head_is_there(outputs, tiny_llama):
    """Softcap, scale, temperature, a bias, padding, and the gradient."""
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS
    from trl.trainer.utils import add_fused_lm_head

    outputs = outputs or ("log_probs", *OPTIONAL_OUTPUTS)
    tiny_llama.config.final_logit_softcapping = 2.0
    tiny_llama.config.logit_scale = 1.7
    vocab, hidden = tiny_llama.lm_head.weight.shape
    tiny_llama.lm_head = torch.nn.Linear(hidden, vocab)
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(8)
    ids = torch.randint(0, vocab, (3, 11), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(11) < 4, -100)
    results = []
    for fast in (False, True):
        model = copy.deepcopy(tiny_llama)
        add_fused_lm_head(model, temperature=0.7, outputs=outputs)
        if fast:
            use_fast_logprobs(model)
        result = model(ids, labels=labels, fused_lm_head=True)
        (result.log_probs * torch.linspace(0.5, 2, 10)).sum().backward()
        grads = [p.grad for p in model.parameters()]
        results.append((result, grads))
    (a, grads), (b, expected) = results
    assert a.keys() == b.keys()
    assert {*outputs} <= {*a.keys()}
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5)
    for x, y in zip(grads, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_the_head_runs_inside_accelerates_autocast_too(build, monkeypatch):
    """With mixed precision the reference's forward is wrapped before anybody can patch it."""
    trainer = build("dpo", bf16=True)
    assert hasattr(trainer.ref_model, "_original_forward")
    used = _count(monkeypatch)
    use_fast_logprobs(trainer)
    losses = [log["loss"] for log in logs(trainer)]
    assert used == {True: 6, False: 6}
    expected = [log["loss"] for log in logs(build("dpo", bf16=True))]
    assert losses == pytest.approx(expected, rel=2e-2)


def ours_in_trl():
    import trl.trainer.utils as utils

    return {name for name in vars(utils) if name.startswith("_tralign_")}


def test_only_the_model_that_was_asked_for_is_patched_and_undo_leaves_nothing(build):
    first, second = build("dpo"), build("dpo")
    before = ours_in_trl()
    codes = [t.model.forward.__func__.__code__ for t in (first, second)]
    undo = use_fast_logprobs(first)
    assert len(ours_in_trl() - before) == 4  # two names for the policy, two for the reference
    assert first.model.forward.__func__.__code__ is not codes[0]
    assert second.model.forward.__func__.__code__ is codes[1]
    with pytest.raises(ValueError, match="in use already; undo it first"):
        use_fast_logprobs(first)
    undo()
    undo()  # once is enough, twice does no harm
    assert first.model.forward.__func__.__code__ is codes[0]
    assert not ours_in_trl() - before  # what other tests left behind may go meanwhile
    use_fast_logprobs(first)()


def test_a_trainer_dropped_without_undo_leaves_nothing(build):
    kept, trainer = build("dpo"), build("dpo")
    use_fast_logprobs(kept)
    before = ours_in_trl()
    undo = use_fast_logprobs(trainer)
    trainer.train()
    added, model = ours_in_trl() - before, weakref.ref(trainer.model)
    assert len(added) == 4
    del trainer
    gc.collect()
    assert model() is None  # neither the names nor the undo keep it alive
    assert not added & ours_in_trl()
    undo()
    kept.train()  # another trainer's names are its own


def test_a_loss_of_the_entropy_hears_that_it_has_no_gradient(build):
    trainer = build("grpo", entropy_coef=0.1)
    use_fast_logprobs(trainer)
    with pytest.raises(ValueError, match="entropy_coef"):
        trainer.train()


def test_a_new_trl_is_refused_and_nothing_is_changed(build, monkeypatch):
    import trl.trainer.utils as utils

    trainer, before = build("dpo"), set(vars(utils))
    code = trainer.model.forward.__func__.__code__

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            return hidden

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Changed)
    with pytest.raises(RuntimeError, match=r"knows the fused LM head of TRL 1.16.*nothing was"):
        use_fast_logprobs(trainer)
    monkeypatch.undo()
    # the policy is as it should be, the reference is not: neither is patched
    other = trainer.ref_model.forward.__func__
    monkeypatch.setattr(other, "__code__", other.__code__.replace(co_names=("mask",)))
    with pytest.raises(RuntimeError, match=r"trl~=1\.16\.0"):
        use_fast_logprobs(trainer)
    assert trainer.model.forward.__func__.__code__ is code
    assert set(vars(utils)) <= before


def test_the_axolotl_plugin_builds_the_callback(build, monkeypatch):
    """axolotl itself is not installed here (docs/axolotl.md says how it was tried)."""
    base = types.SimpleNamespace(BasePlugin=object)
    monkeypatch.setitem(sys.modules, "axolotl", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "axolotl.integrations", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    plugin = importlib.import_module("tralign_fast.integrations.axolotl")
    monkeypatch.delitem(sys.modules, plugin.__name__)
    module, name = plugin.TrustRegionPlugin().get_input_args().rsplit(".", 1)
    assert module == plugin.__name__
    cfg = getattr(plugin, name)(trust_region_every=7)
    (callback,) = plugin.TrustRegionPlugin().add_callbacks_post_trainer(cfg, build("dpo"))
    assert (callback.schedule.alpha, callback.schedule.every) == (0.6, 7)
