"""The callback outside TRL: transformers' Trainer, a loop by hand, and FSDP2 shards."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainerState, TrainingArguments

from tralign_fast import TrustRegion, dpo_loss, ema_update_
from tralign_fast.integrations.callback import TrustRegionCallback, matching_parameters
from tralign_fast.model.scoring import enable_logprobs

ROWS = [
    {"ids": torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(i))}
    for i in range(12)
]  # a pair each: chosen and rejected, of which the last six tokens are scored


def logps(model, ids):
    index = (torch.arange(len(ids))[:, None] * 12 + torch.arange(5, 11)).flatten()
    out = model(ids, score_index=index, score_targets=ids[:, 6:].flatten())
    return out.scores.view(len(ids), 6).sum(1)


def pair_loss(model, ref_model, ids):
    with torch.no_grad():
        ref = logps(ref_model, ids)
    return dpo_loss(*logps(model, ids).chunk(2), *ref.chunk(2), beta=0.5).loss


class PairTrainer(Trainer):
    """Somebody's own DPO in `transformers.Trainer`."""

    ref_model: torch.nn.Module

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return pair_loss(model, self.ref_model, inputs["ids"])


def by_hand(model, ref_model, steps, alpha, every):
    """What the README shows for a hand-written loop."""
    schedule = TrustRegion(alpha, every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(1, steps + 1):
        loss = pair_loss(model, ref_model, ROWS[step - 1]["ids"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule.should_sync(step):
            ema_update_([*ref_model.parameters()], [*model.parameters()], schedule.alpha)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("alpha", "every"), [(0.5, 2), (1.0, 3), (0.0, 0)])
def test_a_plain_trainer_equals_a_loop_by_hand(alpha, every, tiny_llama, tmp_path):
    enable_logprobs(tiny_llama)
    ref_model = copy.deepcopy(tiny_llama)
    losses = by_hand(copy.deepcopy(tiny_llama), ref_model, 8, alpha, every)
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", logging_steps=1,
        max_grad_norm=0.0, remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    for how in ("trainer", "ref_model"):
        trainer = PairTrainer(
            copy.deepcopy(tiny_llama), args, data_collator=lambda rows: rows[0], train_dataset=ROWS
        )
        trainer.ref_model = copy.deepcopy(tiny_llama)
        callback = TrustRegionCallback(
            alpha, every, **{how: trainer if how == "trainer" else trainer.ref_model}
        )
        trainer.add_callback(callback)
        trainer.train()
        logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert logged == pytest.approx(losses, rel=1e-5)
        assert callback.syncs == (8 // every if every else 0)
        for a, b in zip(trainer.ref_model.parameters(), ref_model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert len({round(loss, 4) for loss in losses}) > 4


def test_what_cannot_be_matched_is_named():
    a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3, bias=False)
    with pytest.raises(ValueError, match=r"only the reference has bias.: expected one architect"):
        matching_parameters(a, b)
    wrapped = torch.nn.Module()
    wrapped.module = copy.deepcopy(a)
    refs, thetas = matching_parameters(a, wrapped)
    assert [r.shape for r in refs] == [t.shape for t in thetas]
    compiled = torch.compile(a)
    assert len(matching_parameters(a, compiled)[0]) == 2  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rank", [0, 1])
def test_fsdp2_shards_move_where_they_are(rank):
    """One of two processes (torch's fake group): it moves its own rows, communicates nothing."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.manual_seed(0)
    ref = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).to(torch.bfloat16)
    theta = copy.deepcopy(ref)
    with torch.no_grad():
        for p in theta.parameters():
            p.add_(1.0)
    expected = [p.float() + 0.5 for p in ref.parameters()]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for model in (ref, theta):
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        callback = TrustRegionCallback(0.5, 1, ref_model=ref)
        with CommDebugMode() as communication:
            callback.on_step_end(None, TrainerState(global_step=1), None, model=theta)
        assert communication.get_total_counts() == 0
        rows = 0
        for p, whole in zip(ref.parameters(), expected, strict=True):
            shard, mine = p.to_local().float(), whole.chunk(2)[rank]
            assert shard.shape == mine.shape
            assert ((shard - mine).abs() <= mine.abs() * 2**-7).all()  # a bf16 neighbour
            rows += len(shard)
        assert rows == (10, 6)[rank]
    finally:
        dist.destroy_process_group()
