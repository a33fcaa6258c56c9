"""The same engine on a CUDA device, through torch's operators; skipped where there is none."""

import pytest
import torch

from model.checkpoint import Checkpoint
from tests.reference_data import SHAPES, checkpoint_dir, goldens
from wire.metrics import Metrics
from workers.attention.build import EngineConfig, build_whole_engine
from workers.attention.scoring import ScoreSpec
from workers.config import AttentionConfig, ComputeConfig

TOLERANCE = 1e-3
"""Of a logit, in units of the logits' spread: cuBLAS adds in another order than the goldens' CPUs."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_on_a_gpu_equal_the_golden(shape: str) -> None:
    golden = goldens(shape)[-1]
    engine = build_whole_engine(
        Checkpoint.open(checkpoint_dir(shape)),
        config=EngineConfig(
            group=AttentionConfig(num_gpus=1, num_pages=64), compute=ComputeConfig(dtype="float32")
        ),
        metrics=Metrics("attention"),
    )
    engine.start()
    try:
        scored = engine.score(ScoreSpec(token_ids=golden.prompt, chunk_tokens=32)).result(timeout=60)
    finally:
        engine.stop()
    deviation = (scored["logits"] - golden.tensor("logits")).abs().max() / golden.logit_std
    assert deviation <= TOLERANCE
