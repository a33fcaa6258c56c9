"""What bits of a token do not depend on in native kernels: chunks, company, threads."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.cache_layout import KeyForm
from model.make import make_checkpoint
from model.precision import Precision
from model.sizes import SIZES
from tests.reference_data import SHAPES, goldens
from tests.unit.model.harness import Model, load_model, reference_model, run_prompt, run_together
from tests.unit.model.implementations import IMPLEMENTATIONS, named_kernels

PRECISIONS: tuple[Precision, ...] = ("float32", "int8")


def _model(shape: str, name: str, precision: Precision = "float32", *, num_threads: int = 1) -> Model:
    return reference_model(shape, kernels=named_kernels(name, num_threads=num_threads), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_chunks_or_company(shape: str, precision: Precision) -> None:
    prompts, model = [golden.prompt for golden in goldens(shape)], _model(shape, "avx512", precision)
    alone = [run_prompt(model, prompt).logits for prompt in prompts]
    together = run_together(model, prompts, chunks=[(1, 9, 4, 2)[i % 4] for i in range(len(prompts))])
    assert [torch.equal(a, b) for a, b in zip(alone, together, strict=True)] == [True] * len(prompts)


@pytest.mark.parametrize(
    ("shape", "name", "precision"),
    [("sparse", "avx512", "float32"), ("fp8", "avx512", "int8"), ("mtp", "avx2", "float32")],
)
def test_bits_do_not_depend_on_threads(shape: str, name: str, precision: Precision) -> None:
    prompt = goldens(shape)[1].prompt
    one = run_prompt(_model(shape, name, precision), prompt, chunk=5).logits
    model = _model(shape, name, precision, num_threads=2)
    assert torch.equal(run_prompt(model, prompt, chunk=5).logits, one)


@pytest.mark.parametrize("precision", ["bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("name", ["plain", "avx2", "avx512"])
def test_bits_of_every_library_do_not_depend_on_chunks_or_company(name: str, precision: Precision) -> None:
    """On the shape whose checkpoint is FP8."""
    prompts, model = [golden.prompt for golden in goldens("fp8")], _model("fp8", name, precision)
    alone = [run_prompt(model, prompt).logits for prompt in prompts]
    together = run_together(model, prompts, chunks=[5, 1, 9])
    assert [torch.equal(a, b) for a, b in zip(alone, together, strict=True)] == [True] * len(prompts)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bits_are_those_of_the_last_run(name: str, precision: Precision) -> None:
    prompt, model = goldens("sparse")[3].prompt, _model("sparse", name, precision)
    first = run_prompt(model, prompt, chunk=11).logits
    assert torch.equal(run_prompt(model, prompt, chunk=11).logits, first)


@pytest.mark.parametrize("key_form", ["float32", "int8"])
@pytest.mark.parametrize("chunk", [1, 3, 40])
@pytest.mark.parametrize("name", ["avx512", "avx2"])
def test_bits_of_generated_tokens_do_not_depend_on_chunks(name: str, chunk: int, key_form: KeyForm) -> None:
    """What a preempted request computes again in chunks it had generated one by one."""
    prompt, model = goldens("yarn")[2].prompt, _model("yarn", name)
    whole = run_prompt(model, prompt, prompt_tokens=20, key_form=key_form).logits
    assert torch.equal(
        run_prompt(model, prompt, chunk=chunk, prompt_tokens=20, key_form=key_form).logits, whole
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a longer index_topk than the reference ones."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_checkpoint(directory, size="tiny", seed=4)
    return directory


def _long_prompt() -> list[int]:
    return torch.randint(0, 277, (700,), generator=torch.Generator().manual_seed(2)).tolist()


def _long_run(directory: Path, name: str, precision: Precision, chunk: int) -> tuple[Tensor, Tensor | None]:
    model = load_model(directory, kernels=named_kernels(name), precision=precision)
    run = run_prompt(model, _long_prompt(), chunk=chunk)
    return run.logits, run.mtp_logits


@pytest.mark.parametrize(
    ("name", "precision", "chunk"),
    [("avx512", "float32", 1), ("avx512", "float32", 100), ("avx512", "int8", 333), ("avx2", "float32", 100)],
)
def test_bits_do_not_depend_on_chunks_over_a_long_context(
    tiny: Path, name: str, precision: Precision, chunk: int
) -> None:
    """700 tokens cross every boundary of inner sums and partitions; dense and sparse rows, index_topk 64."""
    logits, drafts = _long_run(tiny, name, precision, 1 << 30)
    parts, part_drafts = _long_run(tiny, name, precision, chunk)
    assert SIZES["tiny"]["index_topk"] == 64
    assert torch.equal(logits, parts)
    assert torch.equal(drafts, part_drafts)


@pytest.mark.parametrize("shape", SHAPES)
def test_best_tokens_of_torch_do_not_depend_on_chunks_or_company(shape: str) -> None:
    prompts, model = [golden.prompt for golden in goldens(shape)], _model(shape, "torch")
    alone = [run_prompt(model, prompt).logits.argmax(-1) for prompt in prompts]
    together = run_together(model, prompts, chunks=[(1, 9, 4, 2)[i % 4] for i in range(len(prompts))])
    assert [logits.argmax(-1).tolist() for logits in together] == [ids.tolist() for ids in alone]


@pytest.mark.parametrize("block_values", [1, 3000, 40000])
def test_best_tokens_do_not_depend_on_the_memory_bound(
    monkeypatch: pytest.MonkeyPatch, block_values: int
) -> None:
    golden, model = goldens("sparse")[3], _model("sparse", "torch")
    free = run_prompt(model, golden.prompt).logits
    monkeypatch.setattr("model.kernels.plain_attention.BLOCK_VALUES", block_values)
    torch.testing.assert_close(run_prompt(model, golden.prompt).logits, free, rtol=1e-4, atol=1e-4)
