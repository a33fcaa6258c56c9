"""The fast model against the goldens: whole, in chunks, step by step, in company."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model.batch import PendingRows, make_batch
from model.errors import ConfigInvalid
from model.local_experts import LocalExperts
from tests.reference_data import (
    INDEX_MARGIN,
    LOGIT_TOLERANCE,
    ROUTER_MARGIN,
    SHAPES,
    Golden,
    goldens,
)
from tests.unit.model.harness import Model, greedy, reference_model, run_prompt, run_together
from tests.unit.model.implementations import IMPLEMENTATIONS, named_kernels

ALL = goldens(*SHAPES)
WHOLE = 1 << 30
RUNS = [*(("best", chunk) for chunk in (1, 5, 17, WHOLE)), *((name, 7) for name in IMPLEMENTATIONS)]
"""Kernels and chunks: every chunk on those that a worker takes here, one on each of the others."""


def _model(shape: str, name: str = "best", **options: bool) -> Model:
    return reference_model(shape, kernels=named_kernels(name), **options)


def _differing_rows(golden_ids: Tensor, got_ids: Tensor) -> Tensor:
    """(T,) bool: rows with another set; both sorted, -1 padded on either side."""
    width = max(golden_ids.shape[1], got_ids.shape[1])
    sets = [
        torch.nn.functional.pad(ids.long(), (0, width - ids.shape[1]), value=-1).sort(-1).values
        for ids in (golden_ids, got_ids)
    ]
    return (sets[0] != sets[1]).any(-1)


def _pad_columns(parts: list[Tensor]) -> Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1]), value=-1) for p in parts])


@pytest.mark.parametrize(("name", "chunk"), RUNS)
@pytest.mark.parametrize("golden", ALL, ids=str)
def test_logits_equal_the_golden_in_any_chunks(golden: Golden, name: str, chunk: int) -> None:
    run = run_prompt(_model(golden.shape, name), golden.prompt, chunk=chunk)
    deviation = (run.logits - golden.tensor("logits")).abs().max()
    assert deviation <= LOGIT_TOLERANCE * golden.logit_std


@pytest.mark.parametrize(("name", "chunk"), RUNS)
@pytest.mark.parametrize("golden", ALL, ids=str)
def test_logits_of_generated_tokens_equal_the_golden(golden: Golden, name: str, chunk: int) -> None:
    """All but the first two tokens count as generated: they take the absorbed form of attention."""
    run = run_prompt(_model(golden.shape, name), golden.prompt, chunk=chunk, prompt_tokens=2)
    deviation = (run.logits - golden.tensor("logits")).abs().max()
    assert deviation <= LOGIT_TOLERANCE * golden.logit_std


@pytest.mark.parametrize(("name", "chunk"), RUNS)
@pytest.mark.parametrize("golden", ALL, ids=str)
def test_experts_are_those_of_the_golden(golden: Golden, name: str, chunk: int) -> None:
    model = _model(golden.shape, name)
    trace = run_prompt(model, golden.prompt, chunk=chunk).trace
    for layer_idx in model.config.moe_layer_ids:
        differs = _differing_rows(
            golden.tensor(f"router_ids.{layer_idx}"), torch.cat(trace.expert_ids[layer_idx])
        )
        assert (golden.tensor(f"router_margin.{layer_idx}")[differs] < ROUTER_MARGIN).all()
        torch.testing.assert_close(
            torch.cat(trace.expert_weights[layer_idx]),
            golden.tensor(f"router_weights.{layer_idx}"),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize(("name", "chunk"), RUNS)
@pytest.mark.parametrize("golden", [g for g in ALL if g.has("index.0")], ids=str)
def test_selected_positions_are_those_of_the_golden(golden: Golden, name: str, chunk: int) -> None:
    model = _model(golden.shape, name)
    trace = run_prompt(model, golden.prompt, chunk=chunk).trace
    for layer_idx in range(model.config.num_hidden_layers):
        got = _pad_columns(trace.indexer_ids[layer_idx])
        differs = _differing_rows(golden.tensor(f"index.{layer_idx}"), got)
        assert (golden.tensor(f"index_margin.{layer_idx}")[differs] < INDEX_MARGIN).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_trace_lists_everything_visible_below_index_topk(shape: str) -> None:
    trace = run_prompt(_model(shape), [9, 8, 7], chunk=2).trace
    assert [ids.tolist() for ids in trace.indexer_ids[0]] == [[[0, -1], [0, 1]], [[0, 1, 2]]]


@pytest.mark.parametrize("name", ["best", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_in_one_batch_equal_their_goldens(shape: str, name: str) -> None:
    cases = goldens(shape)
    chunks = [(7, 1, 13, 30)[i % 4] for i in range(len(cases))]
    together = run_together(_model(shape, name), [g.prompt for g in cases], chunks=chunks)
    deviations = [
        float((got - g.tensor("logits")).abs().max()) for got, g in zip(together, cases, strict=True)
    ]
    assert max(deviations) <= LOGIT_TOLERANCE * cases[0].logit_std


@pytest.mark.parametrize("name", ["best", "torch"])
@pytest.mark.parametrize("golden", ALL, ids=str)
def test_greedy_text_is_that_of_the_golden(golden: Golden, name: str) -> None:
    expected = golden.tensor("greedy").tolist()
    assert greedy(_model(golden.shape, name), golden.prompt, num_tokens=len(expected)) == expected


@pytest.mark.parametrize(("name", "chunk"), RUNS)
@pytest.mark.parametrize("golden", goldens("mtp"), ids=str)
def test_mtp_logits_equal_the_golden(golden: Golden, name: str, chunk: int) -> None:
    got = run_prompt(_model("mtp", name), golden.prompt, chunk=chunk).mtp_logits
    assert (got - golden.tensor("mtp.logits")).abs().max() <= LOGIT_TOLERANCE * golden.logit_std


@pytest.mark.parametrize("golden", goldens("mtp"), ids=str)
def test_mtp_with_zeroed_first_embedding_equals_its_golden(golden: Golden) -> None:
    model = _model("mtp", zero_first_embedding=True)
    got = run_prompt(model, golden.prompt).mtp_logits
    expected = golden.tensor("mtp_pos0_zeroed.logits").float()
    # Stored in float16: 11 bits of values up to 10 leave errors up to 4e-3.
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_mtp_of_a_model_without_it_is_refused() -> None:
    model = _model("default")
    batch = make_batch([[3]], first_positions=[0])
    with pytest.raises(ConfigInvalid, match="num_nextn_predict_layers"):
        model.transformer.mtp_logits(batch, torch.zeros(1, 128), model.cache().view(batch), model.experts)


class _Turns:
    """Local experts that note when each layer's rows are started, and when they are waited for."""

    is_elsewhere = True

    def __init__(self, experts: LocalExperts) -> None:
        self._experts = experts
        self.events: list[tuple[str, int, int]] = []

    def __call__(self, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> PendingRows:
        self.events.append(("start", layer_idx, len(x_TD)))
        return _Noted(self, layer_idx, self._experts(layer_idx, x_TD, ids_TK, weights_TK))


@dataclass
class _Noted:
    turns: _Turns
    layer_idx: int
    pending: PendingRows

    def result(self) -> Tensor:
        rows_TD = self.pending.result()
        self.turns.events.append(("wait", self.layer_idx, len(rows_TD)))
        return rows_TD


def test_two_micro_batches_are_in_flight_and_change_no_bit() -> None:
    """Rows of both are started before anyone waits; the second goes on with the first's sequence."""
    model = reference_model("default")
    prompt = [7, 3, 19, 44, 5, 61, 8]
    parts = [make_batch([prompt[:4]], first_positions=[0]), make_batch([prompt[4:]], first_positions=[4])]
    whole = make_batch([prompt], first_positions=[0])
    cache = model.cache()
    expected_TD = model.transformer.forward(whole, cache.view(whole), model.experts)
    cache, turns = model.cache(), _Turns(model.experts)
    views = [cache.view(part) for part in parts]
    found = model.transformer.forward_all(list(zip(parts, views, strict=True)), turns)
    assert torch.equal(torch.cat(found), expected_TD)
    num_open, most_open = 0, 0
    for kind, _, _ in turns.events:
        num_open += 1 if kind == "start" else -1
        most_open = max(most_open, num_open)
    assert (num_open, most_open) == (0, 2)
