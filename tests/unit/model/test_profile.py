"""A clock counts every part of the model and changes no bit of it."""

import dataclasses
from typing import Any

import pytest
import torch

from model.checkpoint import Checkpoint
from model.kernels.base import Kernels
from model.kernels.plain import TorchKernels
from model.local_experts import LocalExperts
from model.profile import PART_OF_KERNEL, PARTS, StepClock
from model.transformer import Transformer
from model.weights import Packing, load_model_weights
from tests.reference_data import checkpoint_dir, goldens
from tests.unit.model.harness import Model, reference_model, run_prompt
from tests.unit.model.implementations import named_kernels

NOT_COUNTED = {"name", "start", "pack", "pack_heads", "pack_joined", "pack_mlp", "gather_experts"}
"""What no step calls."""
PROMPT = goldens("mtp")[2].prompt
"""Longer than what the indexer selects."""


def timed_model(kernels: Kernels, clock: StepClock) -> Model:
    """The model of the checkpoint `mtp`, as an engine with a clock builds it."""
    checkpoint = Checkpoint.open(checkpoint_dir("mtp"))
    packing = Packing(kernels=clock.time_kernels(kernels), precision="float32")
    weights = clock.time_weights(load_model_weights(checkpoint, packing))
    transformer = Transformer(checkpoint.config, weights, packing.kernels)
    return Model(checkpoint.config, transformer, LocalExperts.load(checkpoint, packing))


@pytest.mark.parametrize("chunk", [1, 9])
@pytest.mark.parametrize("name", ["torch", "best"])
def test_timed_model_has_the_same_bits(name: str, chunk: int) -> None:
    kernels = named_kernels(name)
    timed = run_prompt(timed_model(kernels, StepClock()), PROMPT, chunk=chunk)
    plain = run_prompt(reference_model("mtp", kernels=kernels), PROMPT, chunk=chunk)
    assert torch.equal(timed.logits, plain.logits)
    assert timed.mtp_logits is not None
    assert plain.mtp_logits is not None
    assert torch.equal(timed.mtp_logits, plain.mtp_logits)


@pytest.mark.parametrize("name", ["torch", "best"])
def test_every_part_is_counted(name: str) -> None:
    clock = StepClock()
    run_prompt(timed_model(named_kernels(name), clock), PROMPT)
    assert set(clock.seconds) == set(PARTS)
    assert min(clock.seconds.values()) > 0


def test_loading_is_not_counted() -> None:
    clock = StepClock()
    timed_model(named_kernels("best"), clock)
    assert dict(clock.seconds) == {}


def test_every_kernel_of_a_step_has_a_part() -> None:
    kernels = {name for name in (*vars(Kernels), *Kernels.__annotations__) if not name.startswith("_")}
    assert set(PART_OF_KERNEL) == kernels - NOT_COUNTED
    assert set(PART_OF_KERNEL.values()) <= set(PARTS)


def test_timed_kernels_have_the_others_name_and_packing() -> None:
    kernels = TorchKernels()
    timed = StepClock().time_kernels(kernels)
    assert timed.name == "torch"
    assert timed.pack == kernels.pack


def test_weights_outside_of_steps_are_left_alone() -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("mtp"))
    weights = load_model_weights(checkpoint, Packing(kernels=named_kernels("best")))
    timed = StepClock().time_weights(weights)
    changed = {
        field.name
        for field in dataclasses.fields(weights)
        if getattr(timed, field.name) is not getattr(weights, field.name)
    }
    assert changed == {"layers", "head_VD"}


def test_timed_function_takes_and_gives_the_same() -> None:
    def join(*parts: str, between: str) -> str:
        return between.join(parts)

    clock = StepClock()
    assert clock.timed("head", join)("a", "b", between="-") == "a-b"
    assert clock.seconds["head"] > 0


def test_timed_function_that_fails_is_not_counted() -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    clock = StepClock()
    with pytest.raises(ZeroDivisionError):
        clock.timed("gate", fail)()
    assert dict(clock.seconds) == {}


def test_marks_hold_what_was_counted_until_then() -> None:
    clock = StepClock()
    clock.mark(1.0)
    clock.seconds["gate"] += 0.5
    clock.mark(2.0)
    clock.seconds["gate"] += 0.5
    assert clock.marks == [(1.0, {}), (2.0, {"gate": 0.5})]
