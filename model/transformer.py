"""DeepSeek-V3.2: tokens in, hidden states and logits out; cache and routed experts belong to the caller.

Letters: T tokens, D hidden, V vocabulary, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import Step, attention, plan_span
from model.batch import Batch, CacheView, MoeStep, PendingRows, ReadyRows, Trace
from model.config import ModelConfig
from model.errors import ConfigInvalid
from model.kernels.base import Kernels
from model.online_bias import OnlineBias
from model.rope import Rope
from model.weights import LayerWeights, ModelWeights, MoeWeights, MtpWeights


class Transformer:
    """The model without its routed experts; stateless between calls, so any thread may use it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        kernels: Kernels,
        *,
        zero_first_embedding: bool = False,
        online_bias: OnlineBias | None = None,
    ) -> None:
        """Takes the weights, and the kernels that they were packed with; online_bias None = a plain gate."""
        self.config = config
        self._weights = weights
        self._kernels = kernels
        self._rope = Rope(config, device=weights.embed_VD.device)
        self.online_bias = online_bias
        self._zero_first_embedding = zero_first_embedding
        """Whether the MTP layer takes zeros for the embedding at position 0 (vLLM does, SGLang does not)."""

    def start(self) -> None:
        """Called once by the thread that will run the steps, when everything is loaded."""
        self._kernels.start()

    def forward(self, batch: Batch, cache: CacheView, moe: MoeStep, trace: Trace | None = None) -> Tensor:
        """Hidden states after the final norm: (T, D) float32; the batch's cache rows are appended.

        Args:
            batch: the next tokens of some sequences.
            cache: rows of those sequences; layers [0, num_hidden_layers) are used.
            moe: starts the routed experts of one layer.
            trace: is told every choice of experts and positions.
        """
        return self.forward_all([(batch, cache)], moe, trace)[0]

    @torch.inference_mode()
    def forward_all(
        self, micro_batches: Sequence[tuple[Batch, CacheView]], moe: MoeStep, trace: Trace | None = None
    ) -> list[Tensor]:
        """`forward` of several batches at once: one computes while the experts of the others are under way.

        Each layer of a batch is computed behind the same layer of those before it, so a batch may go on with
        a sequence of an earlier one.
        """
        runs = [
            _Run(
                step=self._step(batch, cache, trace),
                x_TD=self._weights.embed_VD[batch.token_ids_T].to(torch.float32),
                delta=_NOTHING,
            )
            for batch, cache in micro_batches
        ]
        for layer_idx, layer in enumerate(self._weights.layers):
            for run in runs:
                run.delta = _run_layer(run.x_TD, run.delta, layer, run.step, moe, layer_idx=layer_idx)
        norm_D, eps = self._weights.norm_D, self.config.rms_norm_eps
        return [
            self._kernels.add_rms_norm(run.x_TD, run.delta.result(run.x_TD), norm_D, eps=eps) for run in runs
        ]

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Scores of the next token: (T, V) float32, of hidden states from `forward`."""
        return self._weights.head_VD(hidden_TD)

    @torch.inference_mode()
    def mtp_forward(
        self, batch: Batch, hidden_TD: Tensor, cache: CacheView, moe: MoeStep, trace: Trace | None = None
    ) -> Tensor:
        """The MTP layer's hidden states after shared_head.norm: (T, D) float32.

        Feed them back as `hidden_TD` for a second draft step.

        Args:
            batch: token_ids_T are the NEXT tokens t_{i+1} of positions i = position_ids_T.
            hidden_TD: (T, D) float32, states of positions i from `forward`, or from this.
            cache: rows of those sequences; layer num_hidden_layers is used.
            moe: starts the routed experts of one layer.
            trace: is told every choice of experts and positions.

        Raises:
            ConfigInvalid: the checkpoint has no MTP layer.
        """
        mtp = self._mtp()
        step, kernels, eps = self._step(batch, cache, trace), self._kernels, self.config.rms_norm_eps
        embed_TD = mtp.embed_VD[batch.token_ids_T].to(torch.float32)
        if self._zero_first_embedding:
            is_first_T = batch.position_ids_T.to(embed_TD.device) == 0
            embed_TD = embed_TD.masked_fill(is_first_T[:, None], 0.0)
        embed_TD = kernels.rms_norm(embed_TD, mtp.embed_norm_D, eps=eps)
        hidden_TD = kernels.rms_norm(hidden_TD.contiguous(), mtp.hidden_norm_D, eps=eps)
        x_TD = mtp.join_D2D(torch.cat((embed_TD, hidden_TD), dim=-1))
        layer_idx = self.config.num_hidden_layers
        delta = _run_layer(x_TD, _NOTHING, mtp.layer, step, moe, layer_idx=layer_idx)
        return kernels.add_rms_norm(x_TD, delta.result(x_TD), mtp.norm_D, eps=eps)

    @torch.inference_mode()
    def mtp_head(self, hidden_TD: Tensor) -> Tensor:
        """Scores of token i + 2: (T, V) float32, of hidden states from `mtp_forward`."""
        return self._mtp().head_VD(hidden_TD)

    def mtp_logits(
        self, batch: Batch, hidden_TD: Tensor, cache: CacheView, moe: MoeStep, trace: Trace | None = None
    ) -> Tensor:
        """`mtp_head` of `mtp_forward`: (T, V) float32, the scores of token i + 2."""
        return self.mtp_head(self.mtp_forward(batch, hidden_TD, cache, moe, trace))

    def _step(self, batch: Batch, cache: CacheView, trace: Trace | None) -> Step:
        table = self._rope.table(batch.position_ids_T.to(self._weights.embed_VD.device))
        index_topk, rows = self.config.index_topk, cache.layer(0)
        plans = tuple(plan_span(span, i, index_topk=index_topk) for i, span in enumerate(batch.spans))
        return Step(
            config=self.config,
            kernels=self._kernels,
            batch=batch,
            plans=plans,
            dense_reads=tuple(plan.dense_reads(rows) for plan in plans),
            table=table,
            cache=cache,
            trace=trace,
            online_bias=self.online_bias,
        )

    def _mtp(self) -> MtpWeights:
        if self._weights.mtp is None:
            raise ConfigInvalid("num_nextn_predict_layers", wanted="1 for MTP", given=0)
        return self._weights.mtp


@dataclass(frozen=True)
class _Delta:
    """What a block adds to the residual stream: a sum of parts, of which some may still be under way."""

    parts: tuple[PendingRows, ...] = ()

    def result(self, x_TD: Tensor) -> Tensor:
        """(T, D) float32, of the shape of x."""
        if not self.parts:
            return torch.zeros_like(x_TD)
        first, *others = self.parts
        total_TD = first.result()
        for part in others:
            total_TD = total_TD + part.result()
        return total_TD


_NOTHING = _Delta()


@dataclass
class _Run:
    """One micro-batch between two layers."""

    step: Step
    x_TD: Tensor
    delta: _Delta


def _run_layer(
    x_TD: Tensor, delta: _Delta, layer: LayerWeights, step: Step, moe: MoeStep, *, layer_idx: int
) -> _Delta:
    """One decoder block of the residual stream x, with what the block before it adds still apart.

    Adds delta (T, D) and the attention's output to x (T, D) in place; returns what the MLP adds.
    """
    kernels, eps = step.kernels, step.config.rms_norm_eps
    normed_TD = kernels.add_rms_norm(x_TD, delta.result(x_TD), layer.input_norm_D, eps=eps)
    attention_TD = attention(normed_TD, layer.attention, step, layer_idx=layer_idx)
    normed_TD = kernels.add_rms_norm(x_TD, attention_TD, layer.post_norm_D, eps=eps)
    if layer.moe is not None:
        return _run_moe(normed_TD, layer.moe, step, moe, layer_idx=layer_idx)
    return _NOTHING if layer.mlp is None else _Delta((ReadyRows(layer.mlp(normed_TD)),))


def _run_moe(x_TD: Tensor, weights: MoeWeights, step: Step, moe: MoeStep, *, layer_idx: int) -> _Delta:
    """Routed experts plus the shared one, which is computed while others compute those: (T, D)."""
    logits_TE = weights.gate_ED(x_TD)
    if step.online_bias is None:
        ids_TK, weights_TK = step.kernels.choose_experts(logits_TE, weights.bias_E, step.config)
    else:
        ids_TK, weights_TK = step.online_bias.choose(
            step.kernels, logits_TE, weights.bias_E, step.config, layer_idx=layer_idx
        )
    if step.trace is not None:
        step.trace.on_gate(layer_idx, ids_TK, weights_TK)
    shared = weights.shared.begin(x_TD) if moe.is_elsewhere else ReadyRows(weights.shared(x_TD))
    return _Delta((shared, moe(layer_idx, x_TD, ids_TK, weights_TK)))
