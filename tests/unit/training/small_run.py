"""A model and a run small enough for unit tests."""

import functools
from itertools import islice

from tokenizers import Tokenizer

from model.config import ModelConfig
from tests.unit.model.harness import SMALL_CONFIG
from training.config import Stage, TrainingConfig
from training.data.generator import items
from training.data.types import document_text
from training.tokenizer import train_tokenizer
from training.trainer import Trainer

NUM_TOKENS = 640
ROWS = Stage(name="dense", num_steps=3, num_rows=2, row_tokens=320)
STAGES = (
    ROWS,
    Stage(name="warm-up", num_steps=2, num_rows=2, row_tokens=320),
    Stage(name="sparse", num_steps=2, num_rows=2, row_tokens=320),
)
CONFIG = TrainingConfig(stages=STAGES, warmup_steps=2, report_every_steps=2)


@functools.cache
def small_tokenizer() -> Tokenizer:
    texts = [document_text(item) for item in islice(items(seed=0, held_out=False), 300)]
    return train_tokenizer(texts, num_tokens=NUM_TOKENS)


def small_model() -> ModelConfig:
    return ModelConfig.from_hf({**SMALL_CONFIG, "vocab_size": NUM_TOKENS, "index_topk": 16})


def small_trainer() -> Trainer:
    return Trainer(small_model(), CONFIG, small_tokenizer())
