"""Every kernel as a function of some rows of one fixed batch, to ask what a row's bits depend on."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from model.batch import LayerCache
from model.cache_layout import KeyForm
from model.kernels.base import AbsorbedHeads, Assignments, CacheNorms, Kernels, Reads
from model.kernels.plain import TorchKernels
from model.matrix import HeadMatrix, Matrix, Mlp
from model.precision import Form
from model.rope import RopeTable
from tests.unit.model.kernels.cases import (
    cache_of,
    config,
    layout_of,
    random,
    rope_table,
    shuffled,
    stored_matrix,
)

NUM_ROWS = 300
"""More than two threads take column by column, and than one pass over a panel takes."""
FIRST_POSITION = 401
"""Of row 0 where rows are consecutive tokens: contexts cross 512 keys, and 2 * 256."""
HIDDEN, WIDTH, HEADS = 300, 70, 5
LATENT, ROPE, INDEX = 24, 8, 16

Operation = Callable[[Kernels, slice], Tensor]
"""The results of the rows of a slice; the first dimension is rows."""


def _product(form: Form, kernels: Kernels, rows: slice) -> Tensor:
    return _matrix(kernels, form)(random(NUM_ROWS, HIDDEN, seed=1)[rows])


@functools.cache
def _matrix(kernels: Kernels, form: Form) -> Matrix:
    return kernels.pack(stored_matrix(WIDTH, HIDDEN, seed=2), form)


def _head_product(form: Form, kernels: Kernels, rows: slice) -> Tensor:
    return _heads(kernels, form)(random(NUM_ROWS, HEADS, HIDDEN, seed=3)[rows])


@functools.cache
def _heads(kernels: Kernels, form: Form) -> HeadMatrix:
    return kernels.pack_heads(random(HEADS, WIDTH, HIDDEN, seed=4), form)


def _mlp(form: Form, kernels: Kernels, rows: slice) -> Tensor:
    return _experts(kernels, form)[0](random(NUM_ROWS, HIDDEN, seed=5)[rows])


def _expert_sums(form: Form, kernels: Kernels, rows: slice) -> Tensor:
    ids = torch.rand(NUM_ROWS, 4, generator=torch.Generator().manual_seed(6)).argsort(-1)[rows, :2]
    assignments = Assignments.from_choices(ids, random(NUM_ROWS, 2, seed=7)[rows])
    return kernels.expert_sums(random(NUM_ROWS, HIDDEN, seed=8)[rows], assignments, _experts(kernels, form))


@functools.cache
def _experts(kernels: Kernels, form: Form) -> Mapping[int, Mlp]:
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    return {
        i: kernels.pack_mlp(*(stored_matrix(*shape, seed=10 * i + j) for j, shape in enumerate(shapes)), form)
        for i in range(4)
    }


def _rms_norm(kernels: Kernels, rows: slice) -> Tensor:
    return kernels.rms_norm(random(NUM_ROWS, HIDDEN, seed=9)[rows], random(HIDDEN, seed=10), eps=1e-6)


def _add_rms_norm(kernels: Kernels, rows: slice) -> Tensor:
    x, delta = random(NUM_ROWS, HIDDEN, seed=11)[rows], random(NUM_ROWS, HIDDEN, seed=12)[rows]
    normed = kernels.add_rms_norm(x, delta, random(HIDDEN, seed=13), eps=1e-6)
    return torch.cat((x, normed), dim=-1)


def _table(rows: slice) -> RopeTable:
    whole = rope_table(NUM_ROWS, ROPE, seed=14)
    return RopeTable(cos_TP=whole.cos_TP[rows], sin_TP=whole.sin_TP[rows])


def _queries(kernels: Kernels, rows: slice) -> Tensor:
    model = config(qk_nope_head_dim=10, qk_rope_head_dim=ROPE, index_head_dim=INDEX)
    return kernels.rotate_queries(random(NUM_ROWS, HEADS, 10 + ROPE, seed=15)[rows], _table(rows), model)


def _index_queries(kernels: Kernels, rows: slice) -> Tensor:
    return kernels.rotate_index_queries(random(NUM_ROWS, HEADS, INDEX, seed=16)[rows], _table(rows))


def _stored_rows(key_form: KeyForm, kernels: Kernels, rows: slice) -> Tensor:
    """As integers: bytes of INT8 keys may look like NaN."""
    norms = CacheNorms(
        latent_C=random(LATENT, seed=17),
        key_I=random(INDEX, seed=18),
        key_bias_I=random(INDEX, seed=19),
        eps=1e-6,
    )
    latent, key = random(NUM_ROWS, LATENT + ROPE, seed=20)[rows], random(NUM_ROWS, INDEX, seed=21)[rows]
    cached = cache_of(len(key), layout=layout_of(key_form))
    kernels.store_rows(latent, key, norms, _table(rows), cached)
    return cached.rows_NW.view(torch.int32)


def _choice(kernels: Kernels, rows: slice) -> Tensor:
    model = config(n_routed_experts=60, n_group=6, topk_group=3, num_experts_per_tok=5)
    logits, bias = random(NUM_ROWS, 60, seed=22)[rows], random(60, seed=23) * 0.1
    ids, weights = kernels.choose_experts(logits, bias, model)
    return torch.cat((ids, weights), dim=-1)


@functools.cache
def _cache(key_form: KeyForm) -> LayerCache:
    """A cache with keys, stored by torch."""
    cached = cache_of(1500, layout=layout_of(key_form), seed=27)
    norms = CacheNorms(
        latent_C=torch.ones(LATENT), key_I=torch.ones(INDEX), key_bias_I=torch.zeros(INDEX), eps=1e-6
    )
    table = rope_table(1500, ROPE, seed=28)
    rows, key = random(1500, LATENT + ROPE, seed=29), random(1500, INDEX, seed=30)
    TorchKernels().store_rows(rows, key, norms, table, cached)
    return cached


def _reads(rows: slice) -> Reads:
    return Reads(
        begin_row=rows.start,
        end_row=rows.stop,
        first_position=FIRST_POSITION + rows.start,
        context_S=shuffled(750, seed=31)[: FIRST_POSITION + rows.stop],
    )


def _expanded(kernels: Kernels, rows: slice) -> Tensor:
    query = random(NUM_ROWS, HEADS, 10 + ROPE, seed=24)[rows]
    return kernels.attend_expanded(query, _expansion(kernels), _cache("float32"), _reads(rows))


@functools.cache
def _expansion(kernels: Kernels) -> HeadMatrix:
    return kernels.pack_heads(random(HEADS, 10 + 13, LATENT, seed=25) * LATENT**-0.5, "float32")


def _absorbed(kernels: Kernels, rows: slice) -> Tensor:
    query = random(NUM_ROWS, HEADS, 10 + ROPE, seed=32)[rows]
    return kernels.attend_absorbed(query, _absorbed_heads(kernels), _cache("float32"), [_reads(rows)])


@functools.cache
def _absorbed_heads(kernels: Kernels) -> AbsorbedHeads:
    return AbsorbedHeads(
        key_HCN=kernels.pack_heads(random(HEADS, LATENT, 10, seed=35) * 10**-0.5, "float32"),
        value_HOC=kernels.pack_heads(random(HEADS, 13, LATENT, seed=36) * LATENT**-0.5, "float32"),
    )


def _selected(kernels: Kernels, rows: slice) -> Tensor:
    query = random(NUM_ROWS, HEADS, 10 + ROPE, seed=33)[rows]
    ids = torch.randint(0, 1500, (NUM_ROWS, 600), generator=torch.Generator().manual_seed(34))[rows]
    whole = _reads(rows)
    read = Reads(
        begin_row=rows.start,
        end_row=rows.stop,
        first_position=whole.first_position,
        context_S=whole.context_S,
        selected_RU=ids,
    )
    return kernels.attend_absorbed(query, _absorbed_heads(kernels), _cache("float32"), [read])


def _index_scores(key_form: KeyForm, kernels: Kernels, rows: slice) -> Tensor:
    """Scores that every row sees: those of the positions before row 0."""
    query, head = random(NUM_ROWS, HEADS, INDEX, seed=35)[rows], random(NUM_ROWS, HEADS, seed=36)[rows]
    return kernels.index_scores(query, head, _cache(key_form), _reads(rows))[:, :FIRST_POSITION]


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        **{
            f"matrix {form}": functools.partial(_product, form)
            for form in ("float32", "bfloat16", "fp8", "int8")
        },
        **{f"heads {form}": functools.partial(_head_product, form) for form in ("float32", "bfloat16")},
        **{f"mlp {form}": functools.partial(_mlp, form) for form in ("float32", "bfloat16", "fp8", "int8")},
        **{
            f"experts {form}": functools.partial(_expert_sums, form)
            for form in ("float32", "bfloat16", "fp8", "int8")
        },
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "rotate_queries": _queries,
        "rotate_index_queries": _index_queries,
        **{f"store_rows {form}": functools.partial(_stored_rows, form) for form in ("float32", "int8")},
        "choose_experts": _choice,
        "attend_expanded": _expanded,
        "attend_absorbed": _absorbed,
        "attend_absorbed selected": _selected,
        **{f"index_scores {form}": functools.partial(_index_scores, form) for form in ("float32", "int8")},
    }
)
