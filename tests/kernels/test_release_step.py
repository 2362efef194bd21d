"""Training with gradient release on kernels: the losses, states and skips of the PyTorch path."""

import copy
import math

import pytest
import torch
from torch import nn

import tralign_kernels
from tests.kernels.conftest import INTERPRETED
from tests.training.test_finite import Spoil, _Reads, same_bits
from tests.training.test_trainer import make
from tests.training.test_trl_parity import history
from tralign_fast.ops.backend import warn_once
from tralign_fast.training import optimizer_kernels
from tralign_fast.training.gradient_release import BlockAdafactor, GradientRelease

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="test_interpreter.py runs it interpreted")
RELEASE = {"gradient_release": True, "max_grad_norm": 0.0}
OPTIMS = ["adafactor", "adamw_torch", "adamw_torch_fused"]


@pytest.fixture
def on_kernels(monkeypatch):
    """Kernels step from here on; the list of what was launched for which shape."""
    calls = []

    def counted(name):
        launch = getattr(tralign_kernels, name)
        if not name.endswith("step_"):
            return launch
        return lambda *args, **kwargs: (
            calls.append((name, args[0].shape)),
            launch(*args, **kwargs),
        )

    monkeypatch.setattr(optimizer_kernels, "pick_backend", lambda backend, device: "triton")
    monkeypatch.setattr(optimizer_kernels, "kernel", counted)
    warn_once.cache_clear()
    return calls


def one_layer(model):
    """With one layer and the last norm to train: every row takes the interpreter milliseconds."""
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    model.model.norm.requires_grad_(True)
    return model


def pytorch_path(monkeypatch):
    monkeypatch.setattr(optimizer_kernels, "pick_backend", lambda backend, device: "torch")


@pytest.mark.parametrize("optim", OPTIMS)
def test_the_trainer_steps_in_kernels(
    optim, tiny_llama, small_tokenizer, tmp_path, on_kernels, monkeypatch
):
    """The losses of PyTorch's path; a checkpoint of each path goes on in the other."""
    extra = {
        "optim": optim, "weight_decay": 0.1, "max_steps": 3, "save_strategy": "steps",
        "save_steps": 2, "lr_scheduler_type": "cosine", **RELEASE,
    }  # fmt: skip
    tiny_llama = one_layer(tiny_llama)
    ours = make(tiny_llama, small_tokenizer, tmp_path / "triton", **extra)
    found = history(ours)
    parameters = sum(p.requires_grad for p in ours.model.parameters())
    assert len(on_kernels) == 3 * parameters
    with monkeypatch.context() as patch:
        pytorch_path(patch)
        theirs = make(tiny_llama, small_tokenizer, tmp_path / "torch", **extra)
        expected = history(theirs)
    assert len(on_kernels) == 3 * parameters
    assert found == pytest.approx(expected, rel=2e-6)
    assert max(found) - min(found) > 1e-3
    states = [t.optimizer.state_dict()["state"] for t in (ours, theirs)]
    assert layout(states[0]) == layout(states[1])
    for path in ("torch", "triton"):
        with monkeypatch.context() as patch:
            if path == "torch":
                pytorch_path(patch)
            other = "triton" if path == "torch" else "torch"
            again = make(tiny_llama, small_tokenizer, tmp_path / other, **extra)
            again.train(resume_from_checkpoint=str(tmp_path / other / "checkpoint-2"))
        resumed = [log["loss"] for log in again.state.log_history if "loss" in log]
        assert resumed == pytest.approx(expected, rel=2e-6)


def layout(states):
    return {
        index: {
            name: (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)
            for name, value in state.items()
        }
        for index, state in states.items()
    }


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch"])
def test_a_spoilt_step_changes_nothing(optim, tiny_llama, small_tokenizer, tmp_path, on_kernels):
    extra = {"optim": optim, "max_steps": 3, **RELEASE}
    trainer = make(one_layer(tiny_llama), small_tokenizer, tmp_path, **extra)
    spoil = Spoil(trainer, 2, math.nan)
    with pytest.warns(UserWarning, match="step 2: the gradient was NaN or infinite"):
        losses = history(trainer)
    assert same_bits(spoil.before, spoil.after)
    assert all(map(math.isfinite, losses))
    assert trainer._finite.skipped == 1
    state = trainer.optimizer.state_dict()["state"]
    assert {float(own["step"]) for own in state.values()} == {2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factory", [BlockAdafactor, torch.optim.AdamW])
def test_no_step_reads_the_device(factory, dtype, on_kernels, monkeypatch):
    """But for the seed, a number of the host's generator, which is drawn for halves once a step."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    options = {"relative_step": False, "scale_parameter": True} if "Block" in str(factory) else {}
    release = GradientRelease(factory(model.parameters(), lr=0.05, **options))
    reads = []
    for value in (1.0, math.inf, 1.0):
        with _Reads() as mode:
            (model(torch.ones(2, 5, dtype=dtype)).sum() * value).backward()
            release.step()
        reads.append(mode.count)
    assert reads == [0 if dtype == torch.float32 else 1] * 3
    assert {float(s["step"]) for s in release.state_dict()["state"].values()} == {2.0}
    assert all(p.grad is None for p in model.parameters())


def test_a_first_step_that_is_left_out_leaves_no_state(on_kernels):
    weight = nn.Parameter(torch.ones(4, 3))
    options = {"lr": 0.1, "relative_step": False, "scale_parameter": True}
    release = GradientRelease(BlockAdafactor([weight], **options))
    (weight * math.nan).sum().backward()
    release.step()
    assert (weight == 1).all()
    assert release.state_dict()["state"] == {}
    weight.sum().backward()
    release.step()
    assert release.remove().state[weight]["step"] == 1


def test_seeds_follow_the_generator(on_kernels):
    """The same state of it gives the same bits; two steps, and two parameters, other ones."""

    def train(seed):
        weights = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
        release = GradientRelease(torch.optim.AdamW(weights, lr=1e-3))
        torch.manual_seed(seed)
        after = []
        for _ in range(2):
            sum(w.sum() for w in weights).backward()
            release.step()
            after += [w.detach().clone() for w in weights]
        return after

    first, again, other = train(0), train(0), train(1)
    assert same_bits(first, again)
    assert not same_bits(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("make_optimizer", "why"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=True"),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)), "tensor as lr"),
        (lambda p: BlockAdafactor(p), "relative_step=True"),
    ],
)
def test_what_kernels_lack_is_said_once_and_runs_in_pytorch(make_optimizer, why, on_kernels):
    weight = nn.Parameter(torch.ones(4, 3))
    release = GradientRelease(make_optimizer([weight]))
    with pytest.warns(UserWarning, match=f"kernel takes no {why}"):
        weight.sum().backward()
    release.step()
    assert (weight != 1).all()
    assert not on_kernels


def test_fp64_and_strided_weights_run_in_pytorch(on_kernels):
    for weight in (torch.ones(4, 3).double(), torch.ones(3, 4).t()):
        parameter = nn.Parameter(weight)
        release = GradientRelease(torch.optim.AdamW([parameter]))
        with pytest.warns(UserWarning, match="kernel takes no (weights in float64|strided)"):
            parameter.sum().backward()
        release.step()
    assert not on_kernels


def test_other_optimizers_step_as_they_did(on_kernels, recwarn):
    weight = nn.Parameter(torch.ones(4, 3))
    release = GradientRelease(torch.optim.SGD([weight], lr=0.1))
    weight.sum().backward()
    release.step()
    assert (weight == 0.9).all()
    assert not on_kernels
    assert not [w for w in recwarn if "gradient_release" in str(w.message)]


def test_a_graph_that_still_needs_the_weight_is_told(on_kernels):
    """As PyTorch's own writes do, a step raises the version that autograd compares."""
    weight = nn.Parameter(torch.ones(4, 3))
    other = nn.Parameter(torch.ones(3))
    product = weight.detach() * other  # saves the weight, of which the step knows nothing
    release = GradientRelease(torch.optim.AdamW([weight]))
    weight.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    release.remove()


@pytest.mark.parametrize("scale_parameter", [False, True])
@pytest.mark.parametrize("shape", [(7,), (40, 12), (3, 16, 8)])
def test_states_go_on_in_pytorchs_path_and_back(shape, scale_parameter, on_kernels, monkeypatch):
    """Kernels, PyTorch and kernels again, beside PyTorch throughout."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    gradients = torch.randn(6, *shape)
    options = {"lr": 0.1, "relative_step": False, "scale_parameter": scale_parameter}

    def train(paths):
        weight, state = nn.Parameter(start.clone()), None
        for path, grads in zip(paths, gradients.split(2), strict=True):
            with monkeypatch.context() as patch:
                if path == "torch":
                    pytorch_path(patch)
                release = GradientRelease(BlockAdafactor([weight], **options))
                if state is not None:
                    release.load_state_dict(state)
                for grad in grads:
                    (weight * grad).sum().backward()
                    release.step()
                state = copy.deepcopy(release.state_dict())
                release.remove()
        return weight, state["state"][0]

    expected, states = train(["torch"] * 3)
    found, own = train(["triton", "torch", "triton"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert own["step"] == states["step"] == 6
    for name, value in states.items():
        torch.testing.assert_close(own[name], value, rtol=1e-5, atol=0)
