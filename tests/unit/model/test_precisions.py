"""Low precision against the FP32 goldens, compared as their README asks: KL and best tokens, pooled.

A choice of experts or positions that flips changes a token's logits by whole units, so single positions say
nothing. What the reference runs reach is in the goldens' json, "modes". `sparse` is too chaotic for them.
"""

import functools
import json
from dataclasses import dataclass

import pytest
import torch

from model.cache_layout import KeyForm
from model.precision import Precision
from tests.reference_data import LOGIT_TOLERANCE, REFERENCE_DIR, SHAPES, goldens
from tests.unit.model.harness import reference_model, run_prompt
from tests.unit.model.implementations import IMPLEMENTATIONS, named_kernels

CALM_SHAPES = tuple(shape for shape in SHAPES if shape != "sparse")
INT8_TOP1 = 0.97
"""Least share of positions whose best token is the golden's."""
INT8_KL = 0.02
"""Largest mean KL divergence from the golden, nats."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near logits are to the golden, over all positions of all prompts of a shape."""

    top1: float
    kl_mean: float
    kl_median: float
    deviation: float
    """Largest difference of a logit, in units of the golden's spread."""


@functools.cache
def _agreement(
    shape: str, precision: Precision, *, name: str = "best", key_form: KeyForm = "float32"
) -> Agreement:
    model = reference_model(shape, kernels=named_kernels(name), precision=precision)
    cases = goldens(shape)
    expected = torch.cat([golden.tensor("logits") for golden in cases])
    got = torch.cat([run_prompt(model, golden.prompt, key_form=key_form).logits for golden in cases])
    log_p, log_q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return Agreement(
        top1=float((expected.argmax(-1) == got.argmax(-1)).double().mean()),
        kl_mean=float(kl.mean()),
        kl_median=float(kl.median()),
        deviation=float((expected - got).abs().max()) / cases[0].logit_std,
    )


def _reached(shape: str, *modes: str) -> Agreement:
    """What the first of these reference runs that the shape has reached."""
    stats = json.loads((REFERENCE_DIR / "goldens" / f"{shape}.json").read_text())["modes"]
    found = next(stats[mode] for mode in modes if mode in stats)
    return Agreement(
        top1=found["top1"], kl_mean=found["kl_mean"], kl_median=found["kl_median"], deviation=0.0
    )


def _assert_no_worse(got: Agreement, reached: Agreement) -> None:
    assert got.top1 >= reached.top1
    assert got.kl_mean <= reached.kl_mean
    assert got.kl_median <= reached.kl_median


@pytest.mark.parametrize("name", ["best", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_weights_are_those_of_these_checkpoints(shape: str, name: str) -> None:
    """They store BF16, or FP8 codes times powers of two, and the arithmetic is FP32: nothing is rounded."""
    assert _agreement(shape, "bfloat16", name=name).deviation <= LOGIT_TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_auto_precision_rounds_nothing(shape: str) -> None:
    assert _agreement(shape, "auto").deviation <= LOGIT_TOLERANCE


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_fp8_checkpoint_in_fp8_rounds_nothing(name: str) -> None:
    assert _agreement("fp8", "fp8", name=name).deviation <= LOGIT_TOLERANCE


@pytest.mark.parametrize("name", ["best", "torch"])
@pytest.mark.parametrize("shape", CALM_SHAPES)
def test_bfloat16_is_no_worse_than_the_reference_runs(shape: str, name: str) -> None:
    _assert_no_worse(_agreement(shape, "bfloat16", name=name), _reached(shape, "hf_bf16"))


@pytest.mark.parametrize("name", ["best", "torch"])
@pytest.mark.parametrize("shape", CALM_SHAPES)
def test_fp8_is_no_worse_than_the_reference_runs(shape: str, name: str) -> None:
    """Of shapes without an FP8 run the BF16 one as deployed, which rounds index keys and latents to FP8."""
    _assert_no_worse(_agreement(shape, "fp8", name=name), _reached(shape, "ds_fp8", "ds_bf16"))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_keeps_the_best_tokens(shape: str, name: str) -> None:
    got = _agreement(shape, "int8", name=name)
    assert got.top1 >= INT8_TOP1
    assert got.kl_mean <= INT8_KL


@pytest.mark.parametrize("name", ["best", "torch"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("shape", CALM_SHAPES)
def test_int8_index_keys_are_no_worse_than_the_references_fp8_ones(
    shape: str, precision: Precision, name: str
) -> None:
    got = _agreement(shape, precision, name=name, key_form="int8")
    _assert_no_worse(got, _reached(shape, "ds_bf16"))


@pytest.mark.parametrize("name", ["best", "torch"])
def test_int8_index_keys_change_nothing_where_everything_is_read(name: str) -> None:
    """`default` has no prompt above index_topk."""
    assert _agreement("default", "float32", name=name, key_form="int8").deviation <= LOGIT_TOLERANCE
