"""Decoders of packed rows as CUDA graphs: the numbers of the decoder itself, and when they run.

On a CPU a stand-in for the captures runs again what it was given and fills the tensors that it
returned the first time, which is what a replay does to its addresses. A GPU captures really.
"""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from tests.conftest import DEVICE
from tests.model.test_attention import build
from tralign_fast.data.packing import PreferenceCollator
from tralign_fast.memory import Workload
from tralign_fast.memory.trainers import make_trainer
from tralign_fast.model import attention, cut_attention, graphs, scoring
from tralign_fast.model.patching import causal_lm_of, decoder_of
from tralign_fast.model.prepare import prepare_model
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.model.static_rows import StaticRow, shape_of

ON_GPU = DEVICE.type == "cuda"


class RunsAgain:
    """What `CudaBackend` does, without a GPU."""

    def __init__(self) -> None:
        self.host, self.pools, self.broken, self.room = 1.0, 0, 0.0, True

    def takes(self, device: torch.device) -> bool:
        return True

    def has_room(self, device: torch.device) -> bool:
        return self.room

    def pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def timed(self, device):
        yield SimpleNamespace(host=self.host, device=lambda: 1.0)

    @contextlib.contextmanager
    def beside(self, device):
        yield

    def capture(self, function, pool):
        result = function()

        def replay() -> None:
            with torch.enable_grad():
                again = function()
            if result is not None:
                result.data.copy_(again.data + self.broken)

        return SimpleNamespace(replay=replay), result


def varlen(q, k, v, arguments, window, options):
    """Attention of each sequence; what belongs to none holds NaN, as memory that nobody wrote."""
    ends_q, ends_k = arguments.cu_seqlens_q.tolist(), arguments.cu_seqlens_k.tolist()
    pieces = []
    for s in range(len(ends_q) - 1):
        one, keys = slice(ends_q[s], ends_q[s + 1]), slice(ends_k[s], ends_k[s + 1])
        Q, K = one.stop - one.start, keys.stop - keys.start
        assert arguments.max_seqlen_q >= Q
        assert arguments.max_seqlen_k >= K
        if Q == 0:
            continue
        mask = torch.ones(Q, K, dtype=torch.bool).tril(K - Q)
        groups = q.shape[1] // k.shape[1]
        a, b, c = (t.transpose(0, 1)[None] for t in (q[one], k[keys], v[keys]))
        b, c = (t.repeat_interleave(groups, 1) for t in (b, c))
        out = F.scaled_dot_product_attention(a, b, c, mask, scale=options.scaling)
        pieces.append(out[0].transpose(0, 1))
    out = torch.cat(pieces)
    assert len(out) == len(q)
    return out


@pytest.fixture
def captures(monkeypatch):
    """The backend in use: on a CPU the stand-in, and an attention that takes a GPU's arguments."""
    if ON_GPU:
        yield graphs.backend
        return
    stand_in = RunsAgain()
    monkeypatch.setattr(graphs, "backend", stand_in)
    monkeypatch.setattr(attention, "_varlen_function", lambda query, options: varlen)
    yield stand_in


def make(kind="llama", **options) -> Any:
    model = build(kind).to(DEVICE)
    if ON_GPU:
        model = model.bfloat16()
    if options.get("lora"):
        config = LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    if options.get("checkpoints"):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def batch_of(*lengths: tuple[int, int, int], paired=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(1, 60, (n,), generator=generator).tolist()

    if paired:
        rows = [
            {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)}
            for p, c, r in lengths
        ]
    else:
        rows = [
            {"prompt_ids": ids(p), "completion_ids": ids(c), "label": bool(r % 2)}
            for p, c, r in lengths
        ]
    (batch,) = PreferenceCollator(paired=paired, layout="shared")(rows).parts
    return batch.to(DEVICE)


def grads_of(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, batch, scale=1.0):
    logps = sequence_logps(model, batch)
    (scale * logps.sin().sum()).backward()
    return logps.detach().clone()


def assert_same(got, expected):
    if ON_GPU:  # bf16: a graph's row has another length, whose products are rounded apart
        torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
        return
    assert (got - expected).norm() <= 5e-6 * expected.norm()
    if Version(torch.__version__) >= Version("2.13"):  # 2.11 rounds a CPU's rows apart too
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def runner(model):
    """The `DecoderGraphs` of a prepared model."""
    decoder = decoder_of(causal_lm_of(model))
    patch = decoder.__dict__["_tralign_patches"]["forward CUDA graphs"]
    function = patch.layers[-1][1]
    cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
    return cells["graphs"].cell_contents


PAIRS = [(5, 3, 4), (7, 2, 6)]
OTHERS = [(6, 4, 3), (6, 3, 5)]
BATCHES = [PAIRS, OTHERS, [(20, 9, 3), (4, 2, 2)], [(3, 2, 2)] * 5, PAIRS]


@pytest.mark.parametrize(
    "options",
    [{}, {"lora": True}, {"checkpoints": True}, {"lora": True, "checkpoints": True}],
    ids=["full", "lora", "full-checkpoints", "lora-checkpoints"],
)
@pytest.mark.parametrize("paired", [True, False])
def test_steps_compute_what_the_decoder_does(captures, options, paired):
    model, other = make(**options), make(**options)
    other.load_state_dict(model.state_dict())
    prepare_model(model, cuda_graphs=True)
    prepare_model(other)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.05)
                  for m in (model, other)]  # fmt: skip
    for turn in range(3):
        for seed, lengths in enumerate(BATCHES):
            batch = batch_of(*lengths, paired=paired, seed=10 * turn + seed)
            with torch.no_grad():  # a reference's scores
                assert_same(sequence_logps(model, batch), sequence_logps(other, batch))
            assert_same(step(model, batch), step(other, batch))
            mine, theirs = grads_of(model), grads_of(other)
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert_same(mine[name], theirs[name])
            if seed % 2:  # two batches a step: gradients accumulate
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                # else rounding that differs by a row's length would grow from step to step
                other.load_state_dict(model.state_dict())
    made = runner(model)
    assert made.captured >= 2
    assert made.replayed > made.captured


def test_a_shape_is_captured_when_it_comes_again(captures):
    model = make()
    prepare_model(model, cuda_graphs=True)
    made = runner(model)
    for turn, captured in ((0, 0), (1, 1), (2, 1)):
        step(model, batch_of(*PAIRS, seed=turn))
        model.zero_grad()
        assert made.captured == captured
    step(model, batch_of((200, 90, 30)))  # another shape
    assert (made.captured, made.replayed) == (1, 2)


def test_rows_with_pieces_of_groups_run_themselves(captures, monkeypatch):
    """Their attention waits for other processes. Here these have what this one has."""

    def gathered(own, width, group):
        return torch.cat([own, own.new_zeros(width - len(own), *own.shape[1:])]).repeat(2, 1, 1)

    monkeypatch.setattr(cut_attention, "gather_rows", gathered)
    rows = [{"prompt_ids": [3] * 40, "chosen_ids": [4] * 9, "rejected_ids": [5] * 8}]
    batch = PreferenceCollator(paired=True, division=(0, 2), cut_over="cp")(rows).to(DEVICE)
    model = make()
    prepare_model(model, cuda_graphs=True)
    for _ in range(3):
        hidden = decoder_of(causal_lm_of(model))(**keywords(batch)).last_hidden_state
        hidden.sum().backward()
    assert runner(model).captured == 0
    step(model, batch_of(*PAIRS))
    step(model, batch_of(*PAIRS, seed=1))
    assert runner(model).captured == 1


def keywords(batch):
    inputs = {k: v for k, v in scoring._inputs(batch).items() if k != "score_index"}
    return {**inputs, "use_cache": False}


def test_a_second_forward_before_the_backward_runs_itself(captures):
    model, other = make(), make()
    prepare_model(model, cuda_graphs=True)
    prepare_model(other)
    for turn in range(2):
        step(model, batch_of(*PAIRS, seed=turn))
        model.zero_grad()
    first, second = batch_of(*PAIRS, seed=5), batch_of(*PAIRS, seed=6)
    for m in (model, other):
        (sequence_logps(m, first) - sequence_logps(m, second)).sin().sum().backward()
    assert runner(model).replayed == 2  # the capture's own, and the first of these
    for name, grad in grads_of(model).items():
        assert_same(grad, grads_of(other)[name])
    # a forward that was dropped holds nothing up
    sequence_logps(model, first)
    model.zero_grad()
    step(model, second)
    assert runner(model).replayed == 4


class InPlace(torch.autograd.Function):
    """The identity, whose backward writes over the gradient it is given, as Liger's norms do."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(2.0)


def test_layers_may_write_over_the_gradient_they_are_given(captures):
    model, other = make(), make()
    for m in (model, other):
        m.model.norm.register_forward_hook(lambda _, args, out: InPlace.apply(out))
        prepare_model(m, cuda_graphs=m is model)
    for turn in range(3):
        batch = batch_of(*PAIRS, seed=turn)
        assert_same(step(model, batch), step(other, batch))
    for name, grad in grads_of(model).items():
        assert_same(grad, grads_of(other)[name])
    assert runner(model).captured == 1


def test_weights_at_other_addresses_are_captured_anew(captures):
    model = make()
    prepare_model(model, cuda_graphs=True)
    for turn in range(2):
        step(model, batch_of(*PAIRS, seed=turn))
        model.zero_grad()
    weight = decoder_of(model).layers[0].mlp.up_proj.weight
    weight.data = weight.data * 2.0
    other = copy.deepcopy(make())
    other.load_state_dict(model.state_dict())
    prepare_model(other)
    for turn in range(3):
        batch = batch_of(*PAIRS, seed=20 + turn)
        assert_same(step(model, batch), step(other, batch))
        model.zero_grad()
    assert runner(model).captured == 2


def test_switched_off_adapters_have_graphs_of_their_own(captures):
    model = make(lora=True)
    prepare_model(model, cuda_graphs=True)
    batch = batch_of(*PAIRS)
    with torch.no_grad():
        for _ in range(3):
            scores = [sequence_logps(model, batch)]
            with model.disable_adapter():
                scores.append(sequence_logps(model, batch))
            assert (scores[0] - scores[1]).abs().max() > 0.1
    assert runner(model).captured == 2


def test_dropout_and_hooks_keep_the_decoder_as_it_is(captures):
    dropout = make()
    decoder_of(dropout).layers[0].self_attn.attention_dropout = 0.1
    hooked = make()
    seen = []
    hooked.model.norm.weight.register_post_accumulate_grad_hook(seen.append)
    for model in (dropout, hooked):
        prepare_model(model, cuda_graphs=True)
        for turn in range(3):
            if model is dropout and not ON_GPU:
                with torch.no_grad():
                    sequence_logps(model, batch_of(*PAIRS, seed=turn))
            else:
                step(model, batch_of(*PAIRS, seed=turn))
        assert runner(model).captured == 0
    assert len(seen) == 3


def test_hooks_that_come_after_rows_were_scored_are_called(captures):
    """As gradient release's, where an evaluation ran before the training."""
    model, seen = make(), []
    prepare_model(model, cuda_graphs=True)
    with torch.no_grad():
        sequence_logps(model, batch_of(*PAIRS))
    model.model.norm.weight.register_post_accumulate_grad_hook(seen.append)
    for turn in range(3):
        step(model, batch_of(*PAIRS, seed=turn))
    assert len(seen) == 3


@pytest.mark.skipif(ON_GPU, reason="says the same")
def test_graphs_that_were_asked_for_and_cannot_be_are_said(captures):
    model = make()
    decoder_of(model).layers[0].self_attn.attention_dropout = 0.1
    prepare_model(model, cuda_graphs=True)
    graphs.warn_once.cache_clear()
    with torch.no_grad(), pytest.warns(UserWarning, match="cuda_graphs=True has no effect"):
        sequence_logps(model, batch_of(*PAIRS))


def test_undo_and_copies(captures):
    model = make()
    own = type(decoder_of(model)).forward
    prepared = prepare_model(model, cuda_graphs=True)
    for turn in range(3):
        step(model, batch_of(*PAIRS, seed=turn))
        model.zero_grad()
    made, batch = runner(model), batch_of(*PAIRS)
    replayed = made.replayed
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(2.0)
    step(twin, batch)
    assert made.replayed == replayed
    prepared.undo()
    assert decoder_of(model).forward.__func__ is own
    assert not made._entries


@pytest.mark.skipif(ON_GPU, reason="a graph of a GPU cannot be made to lie")
def test_a_replay_that_differs_is_given_up_with_one_warning(captures):
    model, other = make(), make()
    prepare_model(model, cuda_graphs=True)
    prepare_model(other)
    captures.broken = 0.5
    step(model, batch_of(*PAIRS))
    graphs.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="LlamaModel cannot be captured as a CUDA graph"):
        step(model, batch_of(*PAIRS, seed=1))
    step(other, batch_of(*PAIRS))
    step(other, batch_of(*PAIRS, seed=1))
    for name, grad in grads_of(model).items():
        assert_same(grad, grads_of(other)[name])
    step(model, batch_of(*PAIRS, seed=2))
    assert runner(model).captured == 0


@pytest.mark.skipif(ON_GPU, reason="what a GPU takes is what it takes")
@pytest.mark.parametrize(
    ("host", "room", "captured"), [(0.5, True, 0), (0.9, True, 1), (0.9, False, 0)]
)
def test_left_to_itself_it_captures_where_that_pays(captures, host, room, captured):
    """Where the host holds the device up, and a tenth of memory is left."""
    captures.host, captures.room = host, room
    model = make()
    prepare_model(model, cuda_graphs=None)
    for turn in range(6):
        step(model, batch_of(*PAIRS, seed=turn))
        model.zero_grad()
    assert runner(model).captured == captured


def test_a_static_row_holds_every_index_that_attention_reads():
    batch = batch_of((5, 3, 4), (1, 2, 6), (9, 1, 1))
    layout: Any = batch.layout
    shape = shape_of(layout)
    row = StaticRow(shape, torch.device("cpu"))
    for _ in range(2):  # a second time over what the first left
        row.fill(batch.input_ids.cpu(), batch.position_ids.cpu(), layout)
    T, t = shape.tokens, batch.num_tokens
    own, given = row.layout.varlen(torch.device("cpu")), layout.varlen(torch.device("cpu"))
    keys = int(given.cu_seqlens_k[-1])
    assert own.key_index[:keys].equal(given.key_index)
    assert own.key_index[keys : keys + T - t].equal(torch.arange(t, T))
    assert own.first[:t].equal(given.first)
    assert (own.key_index[own.first[:T]] == torch.arange(T)).all()
    (tokens, places), (given_tokens, given_places) = own.again[0], given.again[0]
    real = tokens < T
    assert tokens[real].equal(given_tokens)
    assert places[real].equal(given_places)
    scored = row.layout.scored_rows(torch.device("cpu"))
    assert len(set(scored.tolist())) == len(scored) == shape.scored
    assert set(layout.scored_rows(torch.device("cpu")).tolist()) <= set(scored.tolist())
    assert own.cu_seqlens_q[-1] == T
    assert own.cu_seqlens_k[-1] == keys + T - t <= shape.keys


@pytest.mark.parametrize(
    "kind", ["full", "resident", "lora", pytest.param("first layer", marks=pytest.mark.matrix)]
)
def test_a_run_has_the_losses_that_it_has_without_graphs(captures, kind, tmp_path):
    """Windows, moves of the reference, accumulation and an optimizer, by the trainer itself."""
    losses = {}
    for on in (True, False):
        options = {
            "ref_model_sync_steps": 3, "max_steps": 9, "logging_strategy": "steps",
            "logging_steps": 1, "cuda_graphs": on, "bf16": False, "learning_rate": 1e-2,
            "gradient_accumulation_steps": 2, "use_cpu": not ON_GPU,
        }  # fmt: skip
        options |= {"ref_model_mixup_alpha": 1.0} if kind == "full" else {}
        options |= {"reference": "resident"} if kind == "resident" else {}
        options |= {"gradient_checkpointing_layers": 1} if kind == "first layer" else {}
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        dtype = "bfloat16" if ON_GPU else "float32"
        work = Workload(
            config, pairs=2, tokens=64, dtype=dtype, lora_dtype=dtype, options=options,
            lora_rank=4 if kind == "lora" else None,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = make_trainer(work, str(tmp_path / f"{kind}-{on}"), on_gpu=ON_GPU)
        trainer.train()
        losses[on] = torch.tensor([log["loss"] for log in trainer.state.log_history[:9]])
        if on:
            assert runner(trainer.model).captured > 0
            assert runner(trainer.model).replayed > 6
    assert losses[False].std() > 1e-3
    assert_same(losses[True], losses[False])
