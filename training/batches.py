"""Documents into batches: rows of one length, filled with whole documents, each token with its weight.

Letters: B rows, T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.byte_tokenizer import BOS, EOS, PAD
from router.front.chat.markup import THINK_CLOSE, THINK_OPEN, USER
from training.config import Stage
from training.data.generator import items
from training.data.types import document_text

_OPENS = (THINK_OPEN, THINK_CLOSE)
"""After one of these the model writes."""
_POOL_DOCUMENTS = 24
"""Documents to choose from when a row is filled: the longest that fits goes in."""
_STEPS_APART = 1_000_003
"""Distance between the seeds of two runs; a run has fewer steps."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows to learn from."""

    token_ids_BT: Tensor
    """(B, T) int64; whole documents end to end, then padding."""
    weights_BT: Tensor
    """(B, T) float32, of each token as something to predict: 1 if the model writes it, less if read."""


@dataclass(frozen=True, kw_only=True)
class _Markup:
    bos: int
    eos: int
    pad: int
    user: int
    opens: frozenset[int]


class BatchMaker:
    """Makes the batch of any step, of the training side or the held-out side, from nothing but the seed."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int, prompt_share: float) -> None:
        ids = {text: _token_id(tokenizer, text) for text in (BOS, EOS, PAD, USER, *_OPENS)}
        self._markup = _Markup(
            bos=ids[BOS],
            eos=ids[EOS],
            pad=ids[PAD],
            user=ids[USER],
            opens=frozenset(ids[text] for text in _OPENS),
        )
        self._tokenizer = tokenizer
        self._seed = seed
        self._prompt_share = prompt_share

    def make(self, step: int, stage: Stage, *, held_out: bool = False) -> Batch:
        """The batch of a step."""
        stream = items(seed=self._seed * _STEPS_APART + step, held_out=held_out)
        documents = (
            self._tokenizer.encode(document_text(item), add_special_tokens=False).ids for item in stream
        )
        rows = _rows(documents, stage)
        token_ids_BT = torch.full((stage.num_rows, stage.row_tokens), self._markup.pad)
        weights_BT = torch.zeros(stage.num_rows, stage.row_tokens)
        for row_idx, row in enumerate(rows):
            ids = [token_id for document in row for token_id in document]
            weights = [weight for document in row for weight in self.weights(document)]
            token_ids_BT[row_idx, : len(ids)] = torch.tensor(ids)
            weights_BT[row_idx, : len(ids)] = torch.tensor(weights)
        return Batch(token_ids_BT=token_ids_BT, weights_BT=weights_BT)

    def weights(self, document: Sequence[int]) -> list[float]:
        """Weight of each token: 1 where the model writes, prompt_share where it reads, 0 at the start.

        A conversation's model writes after <think> or </think>, up to the end of its turn; of a plain text it
        writes all.
        """
        markup, weights = self._markup, []
        writes = markup.user not in document
        for token_id in document:
            weights.append(0.0 if token_id == markup.bos else 1.0 if writes else self._prompt_share)
            if markup.user in document:
                writes = (writes or token_id in markup.opens) and token_id != markup.eos
        return weights


def _token_id(tokenizer: Tokenizer, text: str) -> int:
    token_id: int | None = tokenizer.token_to_id(text)
    if token_id is None:
        raise ValueError(f"the tokenizer lacks {text}, which the chat format needs")
    return token_id


def _rows(documents: Iterator[list[int]], stage: Stage) -> list[list[list[int]]]:
    """Whole documents for each row; the longest of a pool that still fits, until none does."""
    pool: list[list[int]] = []
    rows = []
    for _ in range(stage.num_rows):
        row: list[list[int]] = []
        num_free = stage.row_tokens
        while True:
            while len(pool) < _POOL_DOCUMENTS:
                document = next(documents)
                if len(document) <= stage.row_tokens:
                    pool.append(document)
            fitting = [place for place, document in enumerate(pool) if len(document) <= num_free]
            if not fitting:
                break
            # The oldest while there is room for all: by length alone, each row would begin with a long one.
            place = fitting[0] if len(fitting) == len(pool) else max(fitting, key=lambda p: len(pool[p]))
            num_free -= len(pool[place])
            row.append(pool.pop(place))
        rows.append(row)
    return rows
