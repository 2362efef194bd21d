import copy

import pytest
import torch

from tests.model.test_attention import build, collate
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import (
    enable_logprobs,
    hidden_kl,
    sequence_logps,
)
from tralign_fast.ops.transform import LogitTransform
from tralign_fast.ops.vocab_filter import last_vocab_filter


def test_kto_terms_without_gradient_cost_no_backward_of_their_logits():
    rows = [
        {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "label": True},
        {"prompt_ids": [6], "completion_ids": [7], "label": False},
    ]
    model = build("llama")
    prepare_model(model)
    (batch,) = PreferenceCollator(paired=False)(rows).parts
    logps = sequence_logps(model, batch)
    logps[:2].sum().backward()
    own = model.lm_head.weight.grad.clone()
    assert own.any()
    model.zero_grad()
    sequence_logps(model, batch).sum().backward()  # the mismatched ones add nothing
    torch.testing.assert_close(model.lm_head.weight.grad, own)
    (padded,) = PreferenceCollator(paired=False, layout="padded")(rows).parts
    torch.testing.assert_close(sequence_logps(model, padded), logps, rtol=1e-5, atol=2e-5)


def test_undo_gives_the_own_forward_back():
    model = build("llama")
    own = type(model).forward
    first = enable_logprobs(model)
    second = enable_logprobs(model, logits_budget_mb=1)
    for undo in (first, first, second):  # in any order, and once more
        assert model.forward.__func__ is not own
        undo()
    assert model.forward.__func__ is own
    assert "forward" not in vars(model.lm_head)


def test_vocab_filter_reaches_the_head():
    model = build("llama")
    prepare_model(model, vocab_filter=1e-30)
    sequence_logps(model, collate()).sum().backward()
    report = last_vocab_filter()
    assert report is not None
    assert report.columns == report.vocab == model.config.vocab_size


def test_copies_run_their_own_weights():
    model = build("llama")
    prepare_model(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(model(ids).logits, other(ids).logits)
    batch = collate()
    assert not torch.equal(sequence_logps(model, batch), sequence_logps(other, batch))


def test_head_options_of_the_architectures():
    assert LogitTransform.of_config(build("llama").config) == LogitTransform()
    assert LogitTransform.of_config(build("gemma2").config) == LogitTransform(softcap=8.0)
    assert LogitTransform.of_config(build("cohere").config).scale == 0.0625
    assert LogitTransform.of_config(build("granite").config).scale == pytest.approx(1 / 3)


def test_a_head_with_an_unknown_scale_is_refused():
    model = build("llama")
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: 3 * original(x)
    with pytest.raises(ValueError, match="LlamaForCausalLM: its logits are not softcap"):
        prepare_model(model)


def test_a_head_that_is_not_linear_is_refused():
    model = build("llama")
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match="expected a linear output embedding"):
        enable_logprobs(model)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_kl_between_two_models(name):
    p, q = build(name), build(name)
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for model in (p, q):
        prepare_model(model)
        model.eval()
    batch, padded = collate(), collate("padded")
    inputs = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
    with torch.no_grad():
        log_p, log_q = (
            m(**inputs).logits.flatten(0, 1)[padded.score_index].log_softmax(-1) for m in (p, q)
        )
    expected = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(hidden_kl(p, q, batch), expected, rtol=1e-4, atol=1e-4)
    assert hidden_kl(p, p, batch).abs() < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_gradients_are_those_of_the_untouched_model(tied):
    plain = build("llama")
    if tied:
        plain.lm_head.weight = plain.model.embed_tokens.weight
    prepared, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    prepare_model(prepared)
    embedding = prepared.model.embed_tokens
    weight, seen = embedding.weight, []
    embedding.register_forward_hook(lambda module, _, out: seen.append(module.sparse))
    batch, padded = collate(), collate(layout="padded")
    for _ in range(2):  # the second one accumulates
        sequence_logps(prepared, batch).sum().backward()
        for model in (plain, exact):
            logits = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
            logps = logits.flatten(0, 1)[padded.score_index].log_softmax(-1)
            logps.gather(1, padded.targets[:, None]).sum().backward()
    assert seen == [tied] * 2
    assert embedding.weight is weight
    assert not embedding.sparse
    models = prepared.parameters(), plain.parameters(), exact.named_parameters()
    for ours, theirs, (name, truth) in zip(*models, strict=True):
        assert not ours.grad.is_sparse, name
        # as near to fp64 as the untouched model in fp32
        allowed = 2 * (theirs.grad - truth.grad).norm() + 2**-23 * truth.grad.norm()
        assert (ours.grad - truth.grad).norm() <= allowed, name
