"""`moray logits` in one process: the names, shapes and types that scripts count on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.reference_data import LOGIT_TOLERANCE, Golden, checkpoint_dir, goldens

LAYERS, MOE_LAYERS, TOP_K, INDEX_TOP_K, VOCAB = 2, 1, 4, 20, 320
"""Of the checkpoint `mtp`; its MTP layer counts in neither."""
NAMES = ("expert_ids", "expert_weights", "indexer_ids", "logits", "mtp_logits")


def score(folder: Path, prompts: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """What the installed command writes."""
    tokens, out = folder / "tokens.json", folder / "out.safetensors"
    tokens.write_text(json.dumps({"tokens": prompts}))
    program = str(Path(sys.executable).with_name("moray"))
    files = ["--model", str(checkpoint_dir("mtp")), "--tokens", str(tokens), "--out", str(out)]
    done = subprocess.run(
        [program, "logits", *files], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(out)


@pytest.fixture(scope="module")
def cases() -> list[Golden]:
    return goldens("mtp")[1:]


@pytest.fixture(scope="module")
def several(cases: list[Golden], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Two prompts: of 21 and of 60 tokens."""
    return score(tmp_path_factory.mktemp("several"), [golden.prompt for golden in cases])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """One prompt, of one token."""
    return score(tmp_path_factory.mktemp("single"), [(7,)])


def of_prompt(tensors: dict[str, Tensor], prompt_idx: int) -> dict[str, Tensor]:
    return {name: tensors[f"{name}.{prompt_idx}"] for name in NAMES}


def check_contract(tensors: dict[str, Tensor], num_tokens: int) -> None:
    found = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    wanted = {
        "logits": ("torch.float32", (num_tokens, VOCAB)),
        "expert_ids": ("torch.int32", (MOE_LAYERS, num_tokens, TOP_K)),
        "expert_weights": ("torch.float32", (MOE_LAYERS, num_tokens, TOP_K)),
        "indexer_ids": ("torch.int32", (LAYERS, num_tokens, min(INDEX_TOP_K, num_tokens))),
        # The MTP layer reads the next token: a single token gives it no row.
        "mtp_logits": ("torch.float32", (num_tokens - 1, VOCAB)),
    }
    assert found == wanted


def test_several_prompts_are_numbered(several: dict[str, Tensor]) -> None:
    assert sorted(several) == sorted(f"{name}.{i}" for name in NAMES for i in (0, 1))


@pytest.mark.parametrize("prompt_idx", [0, 1])
def test_shapes_and_types_of_several(
    several: dict[str, Tensor], cases: list[Golden], prompt_idx: int
) -> None:
    check_contract(of_prompt(several, prompt_idx), len(cases[prompt_idx].prompt))


def test_one_prompt_has_plain_names_even_of_one_token(single: dict[str, Tensor]) -> None:
    check_contract(single, num_tokens=1)


@pytest.mark.parametrize("prompt_idx", [0, 1])
def test_lists_are_sorted_and_padded_at_the_end(several: dict[str, Tensor], prompt_idx: int) -> None:
    tensors = of_prompt(several, prompt_idx)
    assert bool((tensors["expert_ids"].diff(dim=-1) > 0).all())
    positions_LTU = tensors["indexer_ids"].long()
    _, num_tokens, width = positions_LTU.shape
    counts_T = torch.arange(1, num_tokens + 1).clamp(max=width)
    is_padding_TU = torch.arange(width) >= counts_T[:, None]
    assert torch.equal(positions_LTU < 0, is_padding_TU.expand_as(positions_LTU))
    assert bool((positions_LTU[positions_LTU < 0] == -1).all())
    rises_LTU = positions_LTU.diff(dim=-1) > 0
    assert bool((rises_LTU | is_padding_TU[:, 1:]).all())
    assert bool((positions_LTU <= torch.arange(num_tokens)[:, None]).all())


@pytest.mark.parametrize("prompt_idx", [0, 1])
def test_logits_and_choices_equal_the_goldens(
    several: dict[str, Tensor], cases: list[Golden], prompt_idx: int
) -> None:
    golden, tensors = cases[prompt_idx], of_prompt(several, prompt_idx)
    bound = LOGIT_TOLERANCE * golden.logit_std
    assert (tensors["logits"] - golden.tensor("logits")).abs().max() <= bound
    assert (tensors["mtp_logits"] - golden.tensor("mtp.logits")).abs().max() <= bound
    assert torch.equal(tensors["expert_ids"][0], golden.tensor("router_ids.1").int())
    torch.testing.assert_close(
        tensors["expert_weights"][0], golden.tensor("router_weights.1"), rtol=1e-4, atol=1e-5
    )
