"""A place for the reference that somebody adds: one class, one entry in `REFERENCES`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests.reference.test_windows import WINDOWED
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history, kto_rows, pair_rows
from tralign_fast.distributed.processes import check_distribution
from tralign_fast.model.scoring import sequence_logps
from tralign_fast.ops.ema import ema_update_
from tralign_fast.reference import REFERENCES, reference_class
from tralign_fast.reference.base import ReferencePolicy


class HostCopy(ReferencePolicy):
    """A second model that waits on the host and visits the device for every batch."""

    name = "host_copy"
    needs_second_model = True
    can_be_sharded = frozenset()

    def __init__(self, policy, schedule, model):
        super().__init__(policy, schedule)
        self.model = model.requires_grad_(False).eval().to("cpu")

    @property
    def on_device(self):
        return False

    @classmethod
    def build(cls, policy, start, args):
        assert start is not None
        return cls(policy, args.trust_region, start)

    @torch.no_grad()
    def logps(self, batch):
        self.model.to(batch.input_ids.device)
        scores = sequence_logps(self.model, batch)
        self.model.to("cpu")
        return scores

    def sync(self):
        thetas = [p.to("cpu") for p in self.policy.parameters()]
        ema_update_(list(self.model.parameters()), thetas, self.schedule.alpha)

    def save_weights(self, folder):
        save_file(dict(self.model.named_parameters()), folder / "host.safetensors")

    def load_weights(self, folder):
        saved = load_file(folder / "host.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(saved[name])


@pytest.fixture
def host_copy(monkeypatch):
    monkeypatch.setitem(REFERENCES, "host_copy", f"{__name__}:HostCopy")


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_place_of_ones_own_trains_resumes_and_is_named(
    method, host_copy, tiny_llama, small_tokenizer, tmp_path
):
    held_out = kto_rows(4) if method == "kto" else pair_rows(4)
    extra = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": 3, "ref_model_sync_steps": 2,
        "eval_strategy": "steps", "eval_steps": 5, "held_out": held_out,
    }  # fmt: skip
    expected = history(make(tiny_llama, small_tokenizer, tmp_path / "resident", method, **extra))
    folder = tmp_path / "own"
    own = make(tiny_llama, small_tokenizer, folder, method, reference="host_copy", **extra)
    assert type(own.reference) is HostCopy
    assert own.reference.model is not own.model  # a copy was made for it
    assert history(own) == pytest.approx(expected, rel=1e-6)
    own.create_model_card()
    assert "(held: host_copy)" in (folder / "README.md").read_text()
    again = make(tiny_llama, small_tokenizer, folder, method, reference="host_copy", **extra)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    resumed = [log["loss"] for log in again.state.log_history if "loss" in log]
    assert resumed == pytest.approx(expected, rel=1e-6)
    other = make(tiny_llama, small_tokenizer, folder, method, **extra)
    with pytest.raises(ValueError, match=r"other options \(reference: 'host_copy' there"):
        other.train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_plan_counts_a_place_of_ones_own_and_offers_a_cheaper_one(host_copy):
    from tralign_fast.memory.changes import changes
    from tralign_fast.memory.plan_options import PlanOptions, workload

    work = workload(PlanOptions("llama-3.1-8b", reference="host_copy"))
    assert "--reference auto" in [change for change, _ in changes(work)]
    work = workload(PlanOptions("llama-3.1-8b", reference="snapshot"))
    assert "--reference auto" not in [change for change, _ in changes(work)]


def processes(*, fsdp=None, zero_stage=None, offload="none"):
    """An accelerator as `check_distribution` looks at it."""
    zero = None if zero_stage is None else SimpleNamespace(
        zero_stage=zero_stage, offload_param_device=offload
    )  # fmt: skip
    fsdp = None if fsdp is None else SimpleNamespace(fsdp_version=fsdp)
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=zero))


@pytest.mark.parametrize(
    ("place", "refused"),
    [
        ("resident", {"nvme"}),
        ("snapshot", set()),
        ("offloaded", {"zero3", "nvme"}),
        ("adapter", set()),
        ("precomputed", set()),
        ("host_copy", {"fsdp2", "zero3", "nvme"}),
    ],
)
def test_where_each_place_can_be_sharded(place, refused, host_copy):
    kinds = {
        "ddp": processes(), "fsdp2": processes(fsdp=2), "zero2": processes(zero_stage=2),
        "zero3": processes(zero_stage=3), "nvme": processes(zero_stage=3, offload="nvme"),
    }  # fmt: skip
    for kind, accelerator in kinds.items():
        if kind not in refused:
            check_distribution(accelerator, reference_class(place))  # pyright: ignore
            continue
        with pytest.raises(ValueError, match=f'reference="{place}" cannot (hold|move) weights'):
            check_distribution(accelerator, reference_class(place))  # pyright: ignore
    with pytest.raises(ValueError, match="FSDP version 1"):
        check_distribution(processes(fsdp=1), reference_class(place))  # pyright: ignore


def test_a_place_is_called_what_its_entry_is_called():
    assert {place: reference_class(place).name for place in REFERENCES} == {
        place: place for place in REFERENCES
    }


@pytest.mark.parametrize("place", [*WINDOWED, "resident"])
def test_only_a_windowed_place_asks_for_windows(place, tiny_llama, small_tokenizer, tmp_path):
    extra = {"max_steps": 2, "reference": place, **WINDOWED.get(place, {})}
    trainer = make(tiny_llama, small_tokenizer, tmp_path, **extra)
    asked = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            asked.append(
                trainer.reference.must_score(state.global_step)
            )  # batches are fetched before

    trainer.add_callback(Watch())
    assert trainer.reference.must_score(0) == (place in WINDOWED)
    trainer.train()
    assert asked == [False, False]
