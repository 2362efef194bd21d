"""What a plan does once, or in several processes, to answer sooner: with the same numbers."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
from transformers import LlamaConfig

from tralign_fast.memory import Workload, forked, probed_once, trace
from tralign_fast.model import kernel_probe, prepare

PARENT = os.getpid()


def _where(number: int) -> tuple[int, int]:
    return number, os.getpid()


def _fails_in_a_copy(number: int) -> int:
    if number == 2 and os.getpid() != PARENT:
        os._exit(1)  # as one that the kernel kills
    return number


def _refuses(number: int) -> int:
    if number == 1:
        raise ValueError(f"{number}: expected another")
    return number


def test_work_in_several_processes_comes_back_in_order(monkeypatch):
    monkeypatch.setattr(forked, "_can_fork", lambda: True)
    monkeypatch.setattr(forked, "_cores", lambda: 2)
    numbers, processes = zip(*forked.in_processes(_where, range(6)), strict=True)
    assert numbers == (0, 1, 2, 3, 4, 5)
    assert PARENT not in processes
    with pytest.warns(UserWarning, match="a process that traced an alternative ended"):
        assert [*forked.in_processes(_fails_in_a_copy, range(4))] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="expected another") as raised:
        list(forked.in_processes(_refuses, range(3)))
    assert raised.traceback[-1].name == "_refuses"  # not the pool's: a bug shows where it is
    monkeypatch.setattr(forked, "_cores", lambda: 1)
    assert {process for _, process in forked.in_processes(_where, range(3))} == {PARENT}


@pytest.mark.skipif(not find_spec("liger_kernel"), reason="Liger")
def test_models_that_are_alike_are_tried_out_once(monkeypatch):
    asked: list[str] = []

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*arguments):
            asked.append(name)
            return original(*arguments)

        call.__qualname__ = name
        monkeypatch.setattr(owner, name, call)

    names = {"best_norm": kernel_probe, "best_product": kernel_probe, "check_rotary": kernel_probe,
             "_check_head": prepare, "_why_not_packed": prepare}  # fmt: skip
    for name, owner in names.items():
        counted(owner, name)
    monkeypatch.setattr(probed_once, "_answers", {})

    def work(layers: int, hidden: int = 64) -> Workload:
        config = LlamaConfig(
            vocab_size=320, hidden_size=hidden, intermediate_size=160, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        return Workload(config, tokens=256)

    first = trace(work(2))
    assert {*asked} == {*names}
    asked.clear()
    assert trace(work(2)) == first
    trace(work(3))
    assert asked == []
    trace(work(2, hidden=128))
    assert {*asked} == {*names}
