import inspect

import pytest
import torch

from tralign_fast import TRConfig, ema_update_, linear_logprobs, logprobs_from_logits
from tralign_fast.integrations.callback import TrustRegionCallback
from tralign_fast.ops import ema
from tralign_fast.ops.checks import FLOATS
from tralign_fast.ops.ema import ema_naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
SHAPES = [(3, 5), (1,), (0,), (257, 129), ()]


def make(ref_dtype, dtype, seed=0, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    refs = [torch.randn(s, generator=g).to(ref_dtype) for s in shapes]
    thetas = [(r.float() + 0.01 * torch.randn(r.shape, generator=g)).to(dtype) for r in refs]
    return refs, thetas


@pytest.mark.parametrize("alpha", [0.001, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ref_dtype", DTYPES)
def test_nearest_is_the_equation_rounded_once(ref_dtype, dtype, alpha):
    refs, thetas = make(ref_dtype, dtype)
    expected = [ema_naive(r, t, alpha) for r, t in zip(refs, thetas, strict=True)]
    ema_update_(refs, thetas, alpha, rounding="nearest")
    for ref, exact in zip(refs, expected, strict=True):
        assert ref.dtype == ref_dtype
        # half a unit in the last place of the result's dtype, and fp32 arithmetic before it
        bound = (torch.finfo(ref_dtype).eps / 2 + 3 * 2**-24) * exact.abs() + 2**-25
        assert ((ref.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_one_copies_bits_and_alpha_zero_does_nothing(dtype, rounding):
    refs, thetas = make(dtype, dtype)
    before = [r.clone() for r in refs]
    ema_update_(refs, thetas, 0.0, rounding=rounding)
    assert all(torch.equal(a, b) for a, b in zip(refs, before, strict=True))
    ema_update_(refs, thetas, 1.0, rounding=rounding)
    assert all(torch.equal(a, b) for a, b in zip(refs, thetas, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.6, 0.01, 0.001])
def test_stochastic_rounding_is_unbiased(dtype, alpha):
    """Mean residual to the exact update within five standard errors; TRL's way is far outside."""
    n = 400_000
    g = torch.Generator().manual_seed(0)
    ref = (torch.randn(n, generator=g) + 3).to(dtype)
    theta = (ref.float() * (1 + 2e-3 * torch.randn(n, generator=g))).to(dtype)
    exact = ema_naive(ref, theta, alpha)
    moved = ref.clone()
    ema_update_([moved], [theta], alpha, rounding="stochastic", generator=g)
    residual = moved.double() - exact
    assert abs(residual.mean()) < 5 * residual.std() / n**0.5
    # each element lands on one of the two neighbours of the exact value
    spacing = torch.finfo(dtype).eps * 2 ** exact.abs().log2().floor()
    assert (residual.abs() <= spacing * 1.001).all()


def test_random_bits_of_different_chunks_are_uncorrelated(monkeypatch):
    """Elements alike but for their place: the sum over all has the variance of independent ones."""
    monkeypatch.setattr(ema, "_CHUNK", 1 << 10)
    monkeypatch.setattr(ema._Noise, "_DRAWN", 1 << 7)
    n, repeats = 1 << 13, 200
    g = torch.Generator().manual_seed(0)
    sums = []
    for _ in range(repeats):
        ref, theta = torch.ones(n).bfloat16(), torch.full((n,), 1 + 2**-7).bfloat16()
        ema_update_([ref], [theta], 0.25, rounding="stochastic", generator=g)
        sums.append((ref.double() - 1).sum() * 2**7)  # how many were rounded up
    sums = torch.stack(sums)
    variance = n * 0.25 * 0.75
    assert abs(sums.mean() - n / 4) < 5 * (variance / repeats) ** 0.5
    assert sums.var() == pytest.approx(variance, rel=5 * (2 / repeats) ** 0.5)


def test_subnormal_halves_are_rounded_without_bias():
    n = 200_000
    theta = torch.full((n,), 3 * 2**-24).half()  # three steps of the smallest size
    ref = torch.zeros(n).half()
    ema_update_([ref], [theta], 0.1, rounding="stochastic", generator=torch.Generator())
    steps = ref.double() * 2**24
    assert set(steps.unique().tolist()) == {0.0, 1.0}
    assert abs(steps.mean() - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5


def test_stochastic_movement_in_bf16_is_whole_where_nearest_stalls():
    """α = 0.01 from a reference one step of a typical fine-tune away."""
    g = torch.Generator().manual_seed(0)
    ref = (0.02 * torch.randn(200_000, generator=g)).bfloat16()
    theta = (ref.float() + 1e-4 * torch.randn(200_000, generator=g)).bfloat16()
    way = (theta.double() - ref.double()).abs().sum() * 0.01
    progress = {}
    for rounding in ("nearest", "stochastic"):
        moved = ref.clone()
        ema_update_([moved], [theta], 0.01, rounding=rounding, generator=g)
        direction = torch.sign(theta.double() - ref.double())
        progress[rounding] = float(((moved.double() - ref.double()) * direction).sum() / way)
    assert progress["stochastic"] == pytest.approx(1.0, abs=0.05)
    assert progress["nearest"] < 0.5


def test_stochastic_is_reproducible_from_the_generator():
    results = []
    for seed in (1, 1, 2):
        refs, thetas = make(torch.bfloat16, torch.bfloat16)
        g = torch.Generator().manual_seed(seed)
        ema_update_(refs, thetas, 0.1, rounding="stochastic", generator=g)
        results.append(refs)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


def test_fp32_reference_of_a_bf16_policy_is_left_unrounded():
    refs, thetas = make(torch.float32, torch.bfloat16)
    expected = [torch.lerp(r, t.float(), 0.1) for r, t in zip(refs, thetas, strict=True)]
    ema_update_(refs, thetas, 0.1, rounding="stochastic")
    assert all(torch.equal(a, b) for a, b in zip(refs, expected, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_strided_references(rounding):
    ref, theta = torch.randn(6, 4).bfloat16().t(), torch.randn(4, 6).bfloat16()
    expected = ema_naive(ref, theta, 0.5)
    ema_update_([ref], [theta], 0.5, rounding=rounding)
    assert ((ref.double() - expected).abs() <= 2**-7 * expected.abs() + 2**-12).all()


def test_thetas_are_not_touched_and_infinities_stay():
    ref = torch.tensor([1.0, float("inf"), float("-inf"), float("nan")]).bfloat16()
    theta = torch.tensor([2.0, 1.0, 1.0, 1.0]).bfloat16()
    before = theta.clone()
    ema_update_([ref], [theta], 0.5, rounding="stochastic")
    assert torch.equal(theta, before)
    assert ref[0] == 1.5
    assert ref[1:].isnan().tolist() == [False, False, True]
    assert ref[1:3].isinf().all()
    # a NaN of all ones, which a carry would make a zero
    theta = torch.full((1000,), -1, dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        ref = torch.zeros(1000, dtype=dtype)
        ema_update_([ref], [theta], 0.5, rounding="stochastic")
        assert ref.isnan().all()


INF = float("inf")
# reference, policy, result: of every pair of infinities, and of one beside a number
ENDS = [
    (0.0, 0.0, 0.0), (-INF, -INF, -INF), (INF, INF, INF), (INF, -INF, NAN), (-INF, INF, NAN),
    (1.0, INF, INF), (1.0, -INF, -INF), (INF, 1.0, INF), (-INF, 1.0, -INF), (NAN, -INF, NAN),
]  # fmt: skip


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.6])
@pytest.mark.parametrize(
    ("ref_dtype", "dtype"), [(d, d) for d in FLOATS] + [(torch.bfloat16, torch.float32)]
)
def test_infinities_are_those_of_the_equation(ref_dtype, dtype, alpha, rounding):
    """Equal ones stay: a head's bias that masks tokens is in both models."""
    ref, theta, expected = torch.tensor(ENDS).t().contiguous()
    ref, theta = ref.to(ref_dtype), theta.to(dtype)
    strided = ref.repeat(2, 1).t()[:, 0]
    ema_update_([ref, strided], [theta, theta], alpha, rounding=rounding)
    for moved in (ref, strided):
        torch.testing.assert_close(moved.float(), expected, equal_nan=True, rtol=0, atol=0)


def test_fp64_references_are_moved_in_fp64():
    g = torch.Generator().manual_seed(0)
    for dtype in FLOATS:
        ref = torch.randn(1000, dtype=torch.float64, generator=g)
        theta = torch.randn(1000, dtype=torch.float64, generator=g).to(dtype)
        exact = ema_naive(ref, theta, 0.3)
        for rounding in ("nearest", "stochastic"):
            moved = ref.clone()
            ema_update_([moved], [theta], 0.3, rounding=rounding)
            assert (moved - exact).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_numbers_stay_finite(dtype):
    """And so does what lies a little past them, as it does when rounded to nearest."""
    largest = torch.finfo(dtype).max
    ref = torch.tensor([largest, -largest, largest, 1.0]).repeat(1000).to(dtype)
    theta = torch.tensor([largest, -largest, largest * 1.0001, 2.0]).repeat(1000)
    ema_update_([ref], [theta], 0.6, rounding="stochastic")
    assert torch.equal(
        ref.view(-1, 4)[:, :3],
        torch.tensor([[largest, -largest, largest]]).to(dtype).expand(1000, 3),
    )
    assert ref.view(-1, 4)[:, 3].float().mean() == pytest.approx(1.6, abs=2e-3)


def test_a_tied_weight_moves_once(tiny_llama):
    import copy

    tiny_llama.lm_head.weight = tiny_llama.model.embed_tokens.weight
    reference = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for p in tiny_llama.parameters():
            p.add_(1.0)
    before = reference.lm_head.weight.clone()
    ours, theirs = (model.state_dict() for model in (reference, tiny_llama))
    assert len(ours) == 1 + len(list(reference.parameters()))
    ema_update_(list(ours.values()), list(theirs.values()), 0.25)
    torch.testing.assert_close(reference.lm_head.weight, before + 0.25)
    # a policy's copies of it are alike, or not
    tied, other = reference.lm_head.weight, tiny_llama.lm_head.weight
    before = tied.clone()
    ema_update_([tied, tied], [other, other.clone()], 0.25)
    torch.testing.assert_close(tied, before.lerp(other, 0.25))
    with pytest.raises(ValueError, match="tensors 0 and 1 share one reference weight"):
        ema_update_([tied, tied], [other, other + 1], 0.25)
    # empty tensors share an address, and slices of one buffer share a storage
    flat = torch.zeros(4)
    ema_update_(
        [flat[:0], flat[:0], flat[:2], flat[2:]], [flat[:0], flat[:0], *torch.ones(2, 2)], 0.5
    )
    assert torch.equal(flat, torch.full((4,), 0.5))


def test_the_default_is_the_trainer_s():
    """A movement under half of the last place is made on average, not lost."""
    defaults = [
        inspect.signature(f).parameters["rounding"].default
        for f in (ema_update_, ema.lora_merge_, TrustRegionCallback)
    ]
    assert {*defaults, TRConfig("out").ema_rounding} == {"stochastic"}
    ref, theta = torch.ones(100_000).bfloat16(), torch.full((100_000,), 1 + 2**-7).bfloat16()
    ema_update_([ref], [theta], 0.1, generator=torch.Generator())
    assert ref.double().mean() - 1 == pytest.approx(0.1 * 2**-7, rel=0.1)


def test_parameters_that_require_grad_are_updated_without_a_graph():
    ref, theta = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.ones(4))
    ema_update_([ref], [theta], 0.25)
    assert torch.equal(ref.detach(), torch.full((4,), 0.25))
    assert ref.grad_fn is None


def test_a_whole_model_equals_trl(tiny_llama):
    """TRL's SyncRefModelCallback on the same two models, fp32."""
    import copy

    from trl.trainer.callbacks import SyncRefModelCallback

    reference = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for p in tiny_llama.parameters():
            p.add_(0.01 * torch.randn_like(p))
    theirs = copy.deepcopy(reference)
    SyncRefModelCallback._sync_target_model(tiny_llama, theirs, 0.6)
    ema_update_(list(reference.parameters()), list(tiny_llama.parameters()), 0.6)
    for a, b in zip(reference.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.zeros(2)], [torch.zeros(2)], 1.5), r"alpha must lie in \[0, 1\]"),
        (([torch.zeros(2)], [], 0.5), "1 reference tensors for 0 tensors"),
        (([torch.zeros(2)], [torch.zeros(3)], 0.5), "tensor 0 has shape"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        ema_update_(*arguments)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_quantised_weights_are_refused_by_every_op_alike(dtype, alpha):
    odd, plain = torch.zeros(2, 2).to(dtype), torch.zeros(2, 2)
    calls = (
        lambda: ema_update_([odd], [plain], alpha),
        lambda: ema_update_([plain], [odd], alpha),
        lambda: ema_update_([odd], [odd], alpha),
        lambda: ema.lora_merge_(odd, plain, plain, plain, 1.0, alpha),
        lambda: ema.lora_merge_(plain, odd, plain, plain, 1.0, alpha),
        lambda: ema.lora_merge_(plain, plain, odd, odd, 1.0, alpha),
        lambda: linear_logprobs(odd, odd, torch.tensor([0, 1])),
        lambda: linear_logprobs(plain, plain, torch.tensor([0, 1]), bias=odd[0]),
        lambda: logprobs_from_logits(odd, torch.tensor([0, 1])),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"floating point \(fp64, fp32, bf16 or fp16\)"):
            call()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_alpha_one_rounds_a_wider_policy_to_nearest(rounding):
    """A copy has no rounding noise, whatever the rounding of other updates."""
    theta = torch.tensor([1.001, -3.14159, 65504.0, float("inf"), float("-inf"), 1e-30])
    for dtype in (torch.bfloat16, torch.float16):
        ref = torch.zeros(6, dtype=dtype)
        ema_update_([ref], [theta], 1.0, rounding=rounding)
        assert torch.equal(ref, theta.to(dtype))


def test_factors_of_two_dtypes_are_refused():
    ref, a, b = torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(4, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"of one dtype, got .*float32 and torch.bfloat16"):
        ema.lora_merge_(ref, ref.clone(), a, b, 1.0, 0.5)


def test_unknown_rounding():
    with pytest.raises(ValueError, match="rounding must be nearest or stochastic"):
        ema_update_([torch.zeros(2)], [torch.zeros(2)], 0.5, rounding="up")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lora_merge_is_the_update_of_the_merged_weight(dtype, monkeypatch):
    """Row chunks, strided tensors, and the rounding of ema_update_."""
    monkeypatch.setattr(ema, "_CHUNK", 64)
    torch.manual_seed(0)
    ref, weight = (torch.randn(21, 26).to(dtype)[:, ::2] for _ in range(2))
    a, b = torch.randn(3, 13), torch.randn(21, 3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    merged = weight.to(wide) + 0.5 * b.to(wide) @ a.to(wide)
    for rounding, alpha in (("nearest", 0.3), ("stochastic", 0.3), ("nearest", 1.0)):
        moved = ref.clone()
        ema.lora_merge_(moved, weight, a, b, 0.5, alpha, rounding=rounding)
        exact = torch.lerp(ref.to(wide), merged, alpha)
        unit = torch.finfo(dtype).eps * exact.abs()
        steps = 0.5 if rounding == "nearest" and dtype == torch.bfloat16 else 1.0
        floor = 1e-15 if dtype == torch.float64 else 1e-6
        assert ((moved.to(wide) - exact).abs() <= steps * unit * 1.01 + floor).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pairs_are_rounded_once(dtype):
    """They are moved where they lie: the bits must be those of fp32 arithmetic."""
    g = torch.Generator().manual_seed(0)
    ref, theta = (torch.randn(100_003, generator=g).to(dtype) for _ in range(2))
    ref[:3], theta[:3] = torch.tensor([0.0, 1e-7, -1e-7]), torch.tensor([-0.0, 1e-7, 3e-5])
    for alpha in (0.001, 0.3, 0.6, 0.999):
        expected = ref.float().lerp(theta.float(), alpha).to(dtype)
        moved = ref.clone()
        ema_update_([moved], [theta], alpha, rounding="nearest")
        assert torch.equal(moved, expected)


def test_whole_weights_are_rounded_alike_beside_shards_of_any_size():
    """Tensor parallelism: of two processes one holds more rows of a matrix, and both the norms."""

    class Shard:
        def __init__(self, local):
            self.local = local

        def to_local(self):
            return self.local

    norms = []
    for rows in (1, 2):
        g = torch.Generator().manual_seed(0)
        whole = torch.ones(64, dtype=torch.bfloat16)
        shard = torch.zeros(rows << 16, dtype=torch.bfloat16)
        refs, thetas = [Shard(shard), whole], [Shard(shard + 1), whole * 2]
        ema_update_(refs, thetas, 1e-3, rounding="stochastic", generator=g)
        assert 0 < refs[0].local.mean() < 2e-3
        norms.append(whole)
    assert torch.equal(*norms)
    assert norms[0].unique().numel() == 2


def test_parameters_of_a_model_are_read_once():
    ref, policy = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    ema_update_(ref.parameters(), policy.parameters(), 1.0)
    assert torch.equal(ref.weight, policy.weight)
