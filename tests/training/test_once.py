"""What is done once a run is what the loop would have done at every step."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tralign_fast.training.once import OncePerRun, quick_parameters


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


def test_the_models_of_transformers_are_not_walked_either(tiny_llama):
    """In 5.24 they have a `train` of their own."""
    once, model = OncePerRun(), tiny_llama.eval()
    walked = []
    for _ in range(3):
        with once.training_mode(model, model):
            before = "train" in vars(model)
            assert model.train() is model
            walked.append(not before)
            assert all(m.training for m in model.modules())
    assert walked == [True, False, False]


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


def test_quick_parameters_are_torchs_in_its_order_each_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    model.extend([model[1], nn.Embedding(2, 2)])  # a module twice
    model[3].weight = model[0].weight  # and a parameter
    model.register_parameter("own", nn.Parameter(torch.zeros(1)))
    undo = quick_parameters(model)

    def check(model):
        for recurse in (True, False):
            theirs = list(nn.Module.parameters(model, recurse))
            assert list(map(id, model.parameters(recurse=recurse))) == list(map(id, theirs))

    check(model)
    model[0].bias = None
    model[1][0] = nn.Linear(3, 3)  # what comes and goes is seen
    check(model)
    other = copy.deepcopy(model)
    check(other)
    undo()
    assert "parameters" not in vars(model)
    undo()


def test_a_step_walks_the_parameters_without_names(monkeypatch):
    """Twice, for the norm of the gradients and for `zero_grad`."""
    model = nn.Linear(2, 2)
    quick_parameters(model)
    monkeypatch.setattr(nn.Module, "named_parameters", None)
    model.weight.grad = torch.ones(2, 2)
    model.zero_grad()
    assert model.weight.grad is None


def test_a_model_with_a_walk_of_its_own_keeps_it():
    class Named(nn.Linear):
        def named_parameters(self, *args, **kwargs):
            return iter([("weight", self.weight)])

    model = Named(2, 2)
    quick_parameters(model)
    assert len(list(model.parameters())) == 1
