"""The op against fp64, with PyTorch in the same dtype as the yardstick of what rounding allows."""

from __future__ import annotations

import contextlib
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tralign_fast.ops.logprobs as module
from tests.conftest import DEVICE
from tralign_fast import linear_logprobs, logprobs_from_logits
from tralign_fast.ops import from_logits, tiles
from tralign_fast.ops.backend import pick_backend, pretend_gpu, warn_once
from tralign_fast.ops.logprobs import linear_logprobs_naive

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
KEPT, RECOMPUTED = 1024, 0  # logits_budget_mb


def naive(hidden, weight, targets, **options):
    """What a user would write: logits in the dtype of the inputs, log-softmax in fp32."""
    z = F.linear(hidden, weight, options.get("bias")).float() * options.get("logit_scale", 1.0)
    if options.get("softcap"):
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    z = z / options.get("temperature", 1.0)
    return z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def make(N, H, V, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) * (2 / H**0.5)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=g)
    grad = torch.randn(N, generator=g)
    return hidden, weight, targets, grad


def run(function, inputs, targets, grad, dtype=None, **options):
    """Values and the gradients of `inputs` (hidden, weight, maybe bias) under `function`."""
    leaves = [t.detach().to(DEVICE, dtype).requires_grad_(t.requires_grad) for t in inputs]
    if len(leaves) == 3:
        options["bias"] = leaves[2]
    out = function(leaves[0], leaves[1], targets.to(DEVICE), **options)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(out, wanted, grad.to(out)) if wanted else ()
    return [t.detach().cpu() for t in (out, *grads)]


def assert_as_good_as_pytorch(ours, theirs, exact, dtype, roundings=1.0):
    """Error against fp64 at most twice PyTorch's in the same dtype, plus one rounding."""
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        scale = truth.abs().max().clamp(min=1e-30) if truth.numel() else 1.0
        error = (mine.double() - truth).abs()
        allowed = 2 * (other.double() - truth).abs().max() if truth.numel() else 0.0
        if truth.numel():
            assert error.max() <= allowed + roundings * EPS[mine.dtype] * scale, (
                error.max(), allowed, scale,
            )  # fmt: skip
        assert mine.shape == truth.shape


SHAPES = [(1, 8, 1), (1, 16, 7), (3, 33, 257), (17, 64, 1000), (130, 48, 3001)]


@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, budget):
    N, H, V = shape
    hidden, weight, targets, grad = make(N, H, V, dtype)
    inputs = (hidden, weight)
    ours = run(linear_logprobs, inputs, targets, grad, logits_budget_mb=budget)
    theirs = run(naive, inputs, targets, grad)
    exact = run(linear_logprobs_naive, inputs, targets, grad, dtype=torch.float64)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == ours[2].dtype == dtype
    assert_as_good_as_pytorch(ours, theirs, exact, dtype)


@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"logit_scale": 0.0625},
        {"temperature": 0.7},
        {"softcap": 2.0, "logit_scale": 3.0, "temperature": 1.5},
        {"bias": True},
        {"bias": True, "softcap": 5.0},
    ],
    ids=lambda o: "-".join(o),
)
def test_head_options(options, dtype, budget):
    hidden, weight, targets, grad = make(29, 32, 701, dtype)
    inputs = [hidden, weight]
    options = dict(options)
    if options.pop("bias", False):
        bias = torch.randn(701, generator=torch.Generator().manual_seed(1))
        inputs.append(bias.to(dtype).requires_grad_())
    ours = run(linear_logprobs, inputs, targets, grad, logits_budget_mb=budget, **options)
    theirs = run(naive, inputs, targets, grad, **options)
    exact = run(linear_logprobs_naive, inputs, targets, grad, dtype=torch.float64, **options)
    assert_as_good_as_pytorch(ours, theirs, exact, dtype)


@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height", [-200.0, 0.0, 45.0, 200.0])
def test_powers_of_logits_far_from_zero_neither_overflow_nor_vanish(height, dtype, budget):
    hidden, weight, targets, grad = make(29, 32, 701, dtype)
    bias = torch.full((701,), height)
    bias[:300] -= 60  # recomputed, tiles have 256 columns: a whole one lies far below the others
    inputs = [hidden, weight, bias.to(dtype).requires_grad_()]
    ours = run(linear_logprobs, inputs, targets, grad, logits_budget_mb=budget)
    theirs = run(naive, inputs, targets, grad)
    exact = run(linear_logprobs_naive, inputs, targets, grad, dtype=torch.float64)
    assert all(bool(torch.isfinite(t).all()) for t in ours)
    # logits and logsumexp of 200 are known to 200 · 2⁻²⁴ each: the relative error of a probability
    roundings = max(1.0, abs(height)) if dtype == torch.float32 else 1.0
    assert_as_good_as_pytorch(ours, theirs, exact, dtype, roundings)


@pytest.mark.parametrize("offset", [0, 1_000, -10_000, 100_000])
@pytest.mark.parametrize("op", ["from_logits", "kept", "recomputed"])
def test_a_common_offset_costs_no_digits(op, offset):
    """As good as `log_softmax`, which subtracts first: twice its error and half a last place."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 1501) + offset
    targets, grad = torch.randint(0, 1501, (64,)), torch.randn(64)
    theirs, exact = [], []
    for dtype, results in ((torch.float32, theirs), (torch.float64, exact)):
        leaf = logits.to(dtype).requires_grad_()
        out = leaf.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        results += [out.detach(), *torch.autograd.grad(out, leaf, grad.to(dtype))]
    leaf = logits.to(DEVICE).requires_grad_()
    if op == "from_logits":
        out = logprobs_from_logits(leaf * 1, targets.to(DEVICE))
    else:  # products with ones and zeros, of logits and of their gradient, are exact
        budget, one_hot = KEPT if op == "kept" else RECOMPUTED, torch.eye(64, device=DEVICE)
        out = linear_logprobs(one_hot, leaf.t(), targets.to(DEVICE), logits_budget_mb=budget)
    ours = [out.detach().cpu(), torch.autograd.grad(out, leaf, grad.to(DEVICE))[0].cpu()]
    assert_as_good_as_pytorch(ours, theirs, exact, torch.float32, roundings=0.5)


@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_frozen_tensors_get_no_gradient_and_cost_no_product(needs, budget, monkeypatch):
    hidden, weight, targets, grad = make(19, 24, 500, torch.float32)
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    products = {"hidden": 0, "weight": 0}

    def counting(original):
        def wrapper(out, *operands):
            products["hidden" if out.shape == hidden.shape else "weight"] += 1
            return original(out, *operands)

        return wrapper

    monkeypatch.setattr(tiles, "accumulate_", counting(tiles.accumulate_))
    monkeypatch.setattr(tiles, "product_into_", counting(tiles.product_into_))
    out, grad_given = run(linear_logprobs, (hidden, weight), targets, grad, logits_budget_mb=budget)
    assert (products["hidden"] > 0, products["weight"] > 0) == needs
    exact = run(linear_logprobs_naive, (hidden, weight), targets, grad, dtype=torch.float64)
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_given.double(), exact[1], rtol=1e-4, atol=1e-5)


def test_no_scored_token_gives_a_differentiable_zero():
    hidden, weight, targets, _ = make(0, 16, 50, torch.float32)
    out = linear_logprobs(hidden, weight, targets)
    assert out.shape == (0,)
    out.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 16)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(50, 16))


def test_tied_embeddings_sum_both_gradients():
    torch.manual_seed(0)
    ids, targets = torch.randint(0, 90, (40,)), torch.randint(0, 90, (40,))
    table = torch.randn(90, 12)
    results = []
    ours, exact = (linear_logprobs, torch.float32), (linear_logprobs_naive, torch.float64)
    for function, dtype in (ours, exact):
        leaf = table.to(dtype, copy=True).requires_grad_()
        function(torch.tanh(F.embedding(ids, leaf)), leaf, targets).sum().backward()
        assert leaf.grad is not None
        results.append(leaf.grad.double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED])
def test_strided_inputs(budget):
    torch.manual_seed(0)
    wide = torch.randn(20, 64)
    hidden = wide[:, ::2]  # column stride 2
    weight = torch.randn(32, 400).t()  # a transposed view
    targets = torch.randint(0, 400, (20,))
    grad = torch.randn(20)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    out = linear_logprobs(*leaves, targets, logits_budget_mb=budget)
    grads = torch.autograd.grad(out, leaves, grad)
    exact = run(linear_logprobs_naive, leaves, targets, grad, dtype=torch.float64)
    for mine, truth in zip([out.detach(), *grads], exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED])
def test_autocast_computes_in_bf16_and_returns_gradients_in_fp32(budget):
    hidden, weight, targets, grad = make(40, 64, 800, torch.float32)
    rounded = (hidden.bfloat16(), weight.bfloat16())
    half = run(linear_logprobs, rounded, targets, grad, logits_budget_mb=budget)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        auto = run(linear_logprobs, (hidden, weight), targets, grad, logits_budget_mb=budget)
    assert torch.equal(auto[0], half[0])
    assert auto[1].dtype == auto[2].dtype == torch.float32
    for mine, other in zip(auto[1:], half[1:], strict=True):
        torch.testing.assert_close(mine, other.float(), rtol=2**-7, atol=1e-3)


def test_kept_and_recomputed_agree():
    hidden, weight, targets, grad = make(61, 40, 1500, torch.float32)
    kept = run(linear_logprobs, (hidden, weight), targets, grad, logits_budget_mb=KEPT)
    again = run(linear_logprobs, (hidden, weight), targets, grad, logits_budget_mb=RECOMPUTED)
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fits_is_kept_and_the_rest_recomputed(dtype, monkeypatch):
    hidden, weight, targets, grad = make(61, 40, 1500, dtype)
    bias = torch.randn(1500, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = (hidden, weight, bias.requires_grad_())
    row_bytes = 61 * dtype.itemsize
    tile = {dtype.itemsize: 256 * row_bytes}
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", tile)
    monkeypatch.setattr(tiles, "SMALLEST_DEVICE_TILE_BYTES", tile[dtype.itemsize])
    monkeypatch.setattr(tiles, "FEWEST_DEVICE_COLUMNS", 256)
    recomputed = []
    monkeypatch.setattr(tiles, "project", counting_columns(tiles.project, recomputed))
    theirs = run(naive, inputs, targets, grad)
    exact = run(linear_logprobs_naive, inputs, targets, grad, dtype=torch.float64)
    for columns, keep in ((1500, 1500), (1024, 768), (300, 0)):
        if DEVICE.type == "cuda" and columns < 1500:  # in bf16 its forward needs no tile
            keep = columns // 256 * 256 if dtype == torch.bfloat16 else 0
        recomputed.clear()
        ours = run(
            linear_logprobs, inputs, targets, grad, logits_budget_mb=columns * row_bytes / 2**20
        )
        assert_as_good_as_pytorch(ours, theirs, exact, dtype)
        assert sum(recomputed) == 1500 - keep


def counting_columns(project, recomputed):
    """`project` that notes the columns of every tile that is made in the backward."""

    def wrapper(x, weight, bias, out, keep):
        if "linear_logprobs_backward_op" in [f.name for f in traceback.extract_stack()]:
            recomputed.append(weight.shape[0])
        return project(x, weight, bias, out, keep)

    return wrapper


@pytest.mark.parametrize("budget_mb", [0, 0.05, 1024])
def test_no_tensor_outgrows_the_budget(budget_mb):
    """Every live tensor is watched: logits at most the budget (or one tile of 256 columns)."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    N, H, V = 64, 16, 4096
    hidden, weight, targets, grad = make(N, H, V, torch.float32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Watch():
        out = linear_logprobs(hidden, weight, targets, logits_budget_mb=budget_mb)
        out.backward(grad)
    allowed = max(budget_mb * 2**20, N * 256 * 4, V * H * 4)
    if budget_mb == 1024:
        allowed = N * V * 4
    assert 0 < largest <= allowed


def test_a_second_backward_over_consumed_logits_raises():
    hidden, weight, targets, _ = make(5, 8, 30, torch.float32)
    loss = linear_logprobs(hidden, weight, targets).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward consumed the kept logits"):
        loss.backward()


def test_a_second_backward_over_recomputed_logits_works():
    hidden, weight, targets, _ = make(5, 8, 30, torch.float32)
    loss = linear_logprobs(hidden, weight, targets, logits_budget_mb=0).sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(loss, hidden)[0]
    assert torch.equal(first, second)


def test_log_probs_are_not_rounded_to_the_dtype_of_the_inputs():
    """A DPO margin lives in the digits that bf16 does not have."""
    hidden, weight, targets, _ = make(400, 32, 900, torch.bfloat16)
    out = linear_logprobs(hidden, weight, targets)
    assert not torch.equal(out, out.bfloat16().float())
    total = linear_logprobs_naive(hidden, weight, targets).sum()
    # logits are rounded to bf16 (2^-9 each, independent): the sum over 400 tokens is off by about
    # 400^0.5 · 2^-9 · |z|; log-probs in bf16 summed in bf16 are off by whole nats
    assert abs(out.sum() - total) < 0.5


def test_masked_vocabulary_and_nonfinite_logits():
    hidden = torch.ones(3, 4)
    weight = torch.randn(10, 4)
    bias = torch.zeros(10)
    bias[7] = float("-inf")
    out = linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]), bias=bias)
    assert torch.isfinite(out).all()
    assert linear_logprobs(hidden, weight, torch.tensor([7, 2, 3]), bias=bias)[0] == float("-inf")
    hidden[1, 0] = float("nan")
    out = linear_logprobs(hidden, weight, torch.tensor([1, 2, 3]))
    assert torch.isnan(out).tolist() == [False, True, False]


def test_compiles_whole_and_gives_the_same():
    hidden, weight, targets, grad = make(21, 16, 300, torch.float32)

    def f(hidden, weight):
        return linear_logprobs(torch.tanh(hidden), weight, targets) * 2

    out = torch.compile(f, fullgraph=True, backend="aot_eager")(hidden, weight)
    grads = torch.autograd.grad(out, (hidden, weight), grad)
    expected = f(hidden, weight)
    expected_grads = torch.autograd.grad(expected, (hidden, weight), grad)
    torch.testing.assert_close(out, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_fake_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden = torch.empty(100, 4096, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(128256, 4096, dtype=torch.bfloat16, requires_grad=True)
        out = linear_logprobs(hidden, weight, torch.zeros(100, dtype=torch.int64))
        out.sum().backward()
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
        assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("op", ["linear_logprobs", "logprobs_from_logits"])
def test_registered_with_torch_library(op):
    torch.manual_seed(0)
    targets = torch.randint(0, 20, (6,))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    if op == "linear_logprobs":
        args = (
            torch.randn(6, 4, requires_grad=True), torch.randn(20, 4, requires_grad=True), targets,
            None, [1.0, 0.0, 1.0], "torch", torch.float32, 8,
        )  # fmt: skip
        for keep in (20, 8, 0):
            torch.library.opcheck(module.linear_logprobs_op, (*args, keep, 0.0), test_utils=checks)
    else:
        args = (torch.randn(6, 20, requires_grad=True), targets, [1.0, 0.0, 1.0], "torch", True)
        torch.library.opcheck(from_logits._from_logits_op, args, test_utils=checks)


IDENTITY = (lambda tensor: tensor, lambda tensor: tensor)
COPY = (lambda tensor: tensor.clone(), lambda tensor: torch.empty_like(tensor).copy_(tensor))


@pytest.mark.parametrize(
    "hooks",
    [
        contextlib.nullcontext,
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(*IDENTITY),
        lambda: torch.autograd.graph.saved_tensors_hooks(*COPY),
    ],
    ids=["none", "save_on_cpu", "identity", "copy"],
)
@pytest.mark.parametrize("op", ["linear_logprobs", "logprobs_from_logits"])
def test_a_second_backward_is_right_or_raises(op, hooks, request):
    """Whatever hooks stand between: autograd alone does not see through them."""
    hidden, weight, targets, grad = make(5, 8, 30, torch.float32)
    copied = request.node.callspec.id.endswith("copy") or DEVICE.type != "cpu"
    with hooks():
        if op == "linear_logprobs":
            out = linear_logprobs(hidden, weight, targets)
        else:
            out = logprobs_from_logits(hidden @ weight.t(), targets)
    exact = run(linear_logprobs_naive, (hidden, weight), targets, grad, dtype=torch.float64)
    for attempt in range(2):
        if attempt == 1 and not copied:
            with pytest.raises(RuntimeError, match=r"consumed the kept logits|were overwritten"):
                torch.autograd.grad(out, (hidden, weight), grad, retain_graph=True)
            break
        grads = torch.autograd.grad(out, (hidden, weight), grad, retain_graph=True)
        for mine, truth in zip(grads, exact[1:], strict=True):
            torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-5)


def test_two_losses_of_the_same_logits_under_hooks():
    """The first backward overwrites what the second was to read."""
    leaf = torch.randn(4, 50, requires_grad=True)
    targets = torch.zeros(4, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(*IDENTITY):
        logits = leaf * 1
        out = logprobs_from_logits(logits, targets) + logprobs_from_logits(logits, targets + 1)
    with pytest.raises(RuntimeError, match="were overwritten before this backward"):
        out.sum().backward()


@pytest.mark.parametrize("options", [{}, {"logits_budget_mb": 0}, {"vocab_filter": 1e-3}])
def test_second_derivatives_are_refused(options):
    hidden, weight, targets, _ = make(5, 8, 30, torch.float32)
    outs = [linear_logprobs(hidden, weight, targets, **options)]
    outs.append(logprobs_from_logits(hidden @ weight.t(), targets, inplace=not options))
    for out in outs:
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(out.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_activation_checkpoints(use_reentrant):
    """Which run a forward in grad mode inside the backward."""
    hidden, weight, targets, grad = make(21, 16, 300, torch.float32)
    expected = run(linear_logprobs, (hidden, weight), targets, grad)
    for op in (linear_logprobs, lambda h, w, t: logprobs_from_logits(h @ w.t(), t)):
        out = checkpoint(op, hidden, weight, targets, use_reentrant=use_reentrant)
        out.backward(grad)
        for leaf, want in zip((hidden, weight), expected[1:], strict=True):
            torch.testing.assert_close(leaf.grad, want)
            leaf.grad = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"targets": torch.tensor([0, 50])},
            r"target 50 of row 1 is outside the vocabulary \[0, 50\)",
        ),
        ({"targets": torch.tensor([-100, 1])}, "target -100 of row 0 is outside"),
        ({"targets": torch.tensor([0.0, 1.0])}, "expected int64 targets"),
        ({"targets": torch.tensor([0])}, r"expected int64 targets \(2,\)"),
        ({"weight": torch.randn(50, 5)}, r"expected hidden \(N, H\) and weight \(V, H\)"),
        ({"weight": torch.randn(50, 4).bfloat16()}, "expected one dtype"),
        ({"weight": torch.zeros(50, 4, dtype=torch.int8)}, "expected floating point"),
        ({"bias": torch.randn(49)}, r"expected bias \(50,\)"),
        ({"softcap": -1.0}, "must be positive"),
        ({"temperature": 0.0}, "must be positive"),
        ({"backend": "cuda"}, "backend must be one of auto, torch, triton"),
        ({"weight": torch.randn(50, 4, device="meta")}, "several devices"),
    ],
)
def test_bad_arguments_say_what_was_expected(change, message):
    arguments = {
        "hidden": torch.randn(2, 4),
        "weight": torch.randn(50, 4),
        "targets": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{**arguments, **change})


@pytest.mark.parametrize("budget", [KEPT, RECOMPUTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bias_over_training(dtype, budget):
    """Residuals of 50 training steps against fp32 full logits have a mean of zero.

    What tiles and rounding add to a gradient must point nowhere in particular, or a training adds
    it up. Every step has new data; both see the same (rounded) inputs. The mean of n independent
    numbers of mean zero is within 4·std/√n of it, but for one time in 16,000. On a GPU fp32
    log-probs were seen 3.5e-8 off in the mean, a tenth of a unit in their last place (4.8e-7); why
    (Triton's exp2, perhaps) was not looked into.
    """
    shift = 2**-23 if DEVICE.type == "cuda" and dtype == torch.float32 else 0.0
    steps, N, H, V = 50, 48, 24, 700
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=g) / H**0.5
    signs = torch.where(torch.arange(N) < N // 2, 1.0, -1.0)  # of a pair: one up, one down
    values, along, across = [], [], []
    for _ in range(steps):
        hidden = torch.randn(N, H, generator=g)
        targets = torch.randint(0, V, (N,), generator=g)
        # another factor each step, as DPO's: 1 - p rounded to bf16 is 1 for every unlikely target
        grad = signs * (0.5 + torch.rand((), generator=g))
        inputs = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        ours = run(linear_logprobs, inputs, targets, grad, logits_budget_mb=budget)
        full = run(naive, inputs, targets, grad, dtype=torch.float32)
        values.append((ours[0] - full[0]).mean())
        for mine, truth in zip(ours[1:], full[1:], strict=True):
            residual = mine.float() - truth
            # along the gradient: a step too long or too short; across: one off its way
            along.append((residual * truth).sum() / truth.square().sum())
            across.append(residual.mean() / truth.square().mean().sqrt())
        weight = weight + 0.02 * ours[2].float()
    for residuals in (values, along[::2], along[1::2], across[::2], across[1::2]):
        residuals = torch.stack(residuals)
        assert residuals.abs().max() <= 4 * EPS[dtype]
        assert residuals.mean().abs() <= 4 * residuals.std() / steps**0.5 + shift


def test_fp64_is_pytorchs():
    """The kernels compute in fp32."""
    warn_once.cache_clear()
    with pretend_gpu(), pytest.warns(UserWarning, match="fp64 has no Triton kernels"):
        assert pick_backend("auto", torch.device("cpu"), torch.float64) == "torch"
    hidden, weight = torch.randn(2, 8, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64)
    targets = torch.arange(2)
    for call in (
        lambda: linear_logprobs(hidden, weight, targets, backend="triton"),
        lambda: logprobs_from_logits(hidden @ weight.t(), targets, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r'backend="triton" takes .*, got fp64'):
            call()


def test_forward_mode_is_refused():
    """torch would return a tangent of zeros."""
    hidden, weight, targets = torch.randn(2, 8), torch.randn(9, 8), torch.arange(2)
    for call in (
        lambda hidden: linear_logprobs(hidden, weight, targets),
        lambda hidden: linear_logprobs(
            targets.new_zeros(2, 8).float(), weight, targets, bias=hidden.sum() * weight[:, 0]
        ),
        lambda hidden: logprobs_from_logits(hidden @ weight.t(), targets),
    ):
        with pytest.raises(RuntimeError, match=r"has no forward-mode derivative \(jvp\)"):
            torch.func.jvp(call, (hidden,), (hidden,))
    with torch.autograd.forward_ad.dual_level():
        assert linear_logprobs(hidden, weight, targets).shape == (2,)


@pytest.mark.parametrize("budget", [-1, float("nan"), float("inf")])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ValueError, match="logits_budget_mb must be finite and ≥ 0, got"):
        linear_logprobs(
            torch.randn(2, 8), torch.randn(9, 8), torch.arange(2), logits_budget_mb=budget
        )
