"""What is done once a run is what the loop would have done at every step."""

from __future__ import annotations

from torch import nn

from tralign_fast.training.once import OncePerRun


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.asked = 0

    def train(self, mode: bool = True):
        self.asked += 1
        return super().train(mode)


def make():
    return nn.Sequential(nn.Sequential(Counting()), nn.Dropout()).eval()


def step(once, model, policy=None):
    """Of transformers' loop: the mode, then whatever runs in it."""
    leaf = model[0][0]
    before = leaf.asked
    with once.training_mode(model, model if policy is None else policy):
        assert model.train() is model
        walked = leaf.asked > before
        assert all(m.training for m in model.modules())
        model.eval()  # of a reference that scores inside the step
        assert not leaf.training
        model.train()
        assert leaf.training
    assert "train" not in vars(model)
    return walked


def test_the_mode_is_set_once_and_again_after_an_evaluation():
    once, model = OncePerRun(), make()
    assert [step(once, model) for _ in range(3)] == [True, False, False]
    model.eval()
    assert [step(once, model) for _ in range(2)] == [True, False]
    once.restart()
    assert step(once, model)


def test_a_policy_that_was_evaluated_inside_of_its_wrapper_is_switched_back():
    once, model = OncePerRun(), make()
    step(once, model)
    model[0].eval()
    assert step(once, model, policy=model[0])


def test_a_mode_that_nobody_asked_for_leaves_nothing_behind():
    once, model = OncePerRun(), make()
    step(once, model)
    with once.training_mode(model, model):
        model.train(False)
        assert not any(m.training for m in model.modules())
    with once.training_mode(model, model):
        pass
    assert "train" not in vars(model)


def test_a_class_with_its_own_mode_is_always_asked():
    once, model = OncePerRun(), Counting()
    for count in (1, 2, 3):
        with once.training_mode(model, model):
            model.train()
        assert model.asked == count


def test_parameters_are_counted_once_a_run():
    class Model:
        calls = 0

        def num_parameters(self, exclude_embeddings):
            assert exclude_embeddings
            self.calls += 1
            return 7

    once, model = OncePerRun(), Model()
    assert [once.num_parameters(model) for _ in range(3)] == [7] * 3
    assert model.calls == 1
    once.restart()
    once.num_parameters(model)
    assert model.calls == 2
