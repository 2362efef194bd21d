import pytest

from tralign_fast import TrustRegion


@pytest.mark.parametrize(
    ("schedule", "moves"),
    [
        (TrustRegion(0.6, 1), [1, 2, 3, 4, 5, 6]),
        (TrustRegion(1.0, 3), [3, 6]),
        (TrustRegion(0.6, 4), [4]),
        (TrustRegion(0.0, 2), []),
        (TrustRegion(1.0, 0), []),
    ],
)
def test_should_sync(schedule, moves):
    assert [step for step in range(7) if schedule.should_sync(step)] == moves
    assert schedule.is_frozen == (not moves)


def test_defaults_are_the_hard_update():
    assert TrustRegion() == TrustRegion(alpha=0.6, every=512)  # `TRConfig`'s


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
        TrustRegion(alpha, 1)


@pytest.mark.parametrize("every", [-1, 1.5])
def test_every_out_of_range(every):
    with pytest.raises(ValueError, match="every must be a whole number"):
        TrustRegion(0.5, every)
