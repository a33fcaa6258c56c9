"""`moray logits` equals the goldens in both topologies, for any number of expert workers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e_cluster import RayHead, Shell
from reference_data import INDEX_MARGIN, LOGIT_TOLERANCE, SHAPES, Golden, checkpoint_dir, goldens
from safetensors.torch import load_file
from torch import Tensor


def score(shell: Shell, shape: str, *arguments: str, **env: str) -> list[dict[str, Tensor]]:
    """The tensors of every golden prompt of a shape."""
    prompts = [list(golden.prompt) for golden in goldens(shape)]
    tokens, out = shell.folder / "tokens.json", shell.folder / "out.safetensors"
    tokens.write_text(json.dumps({"tokens": prompts}))
    files = ("--model", str(checkpoint_dir(shape)), "--tokens", str(tokens), "--out", str(out))
    done = shell.run("logits", *files, *arguments, **env)
    assert done.returncode == 0, done.stderr
    named = load_file(out)
    return [
        {name.removesuffix(f".{i}"): tensor for name, tensor in named.items() if name.endswith(f".{i}")}
        for i in range(len(prompts))
    ]


def check(golden: Golden, tensors: dict[str, Tensor]) -> None:
    """Logits within the tolerance, the same experts, the same positions."""
    spread = golden.logit_std
    assert (tensors["logits"] - golden.tensor("logits")).abs().max() <= LOGIT_TOLERANCE * spread
    moe_layers = [n for n in range(8) if golden.has(f"router_ids.{n}")]
    assert tensors["expert_ids"].shape[0] == len(moe_layers)
    for row, layer in enumerate(moe_layers):
        assert torch.equal(tensors["expert_ids"][row], golden.tensor(f"router_ids.{layer}").int())
        weights = golden.tensor(f"router_weights.{layer}")
        torch.testing.assert_close(tensors["expert_weights"][row], weights, rtol=1e-4, atol=1e-5)
    for layer in range(tensors["indexer_ids"].shape[0]):
        if golden.has(f"index.{layer}"):
            check_positions(golden, layer, tensors["indexer_ids"][layer])
    if golden.has("mtp.logits"):
        assert (tensors["mtp_logits"] - golden.tensor("mtp.logits")).abs().max() <= LOGIT_TOLERANCE * spread


def check_positions(golden: Golden, layer: int, ids_TU: Tensor) -> None:
    """The same sets, except where the golden marks a tie."""
    wanted_TU = golden.tensor(f"index.{layer}")
    margin_T = golden.tensor(f"index_margin.{layer}")
    for t in range(ids_TU.shape[0]):
        same = {int(i) for i in ids_TU[t] if i >= 0} == {int(i) for i in wanted_TU[t] if 0 <= i <= t}
        assert same or float(margin_T[t]) < INDEX_MARGIN, f"{golden} layer {layer} token {t}"


@pytest.mark.parametrize("shape", SHAPES)
def test_one_process_equals_the_goldens(make_shell: Callable[[], Shell], shape: str) -> None:
    scored = score(make_shell(), shape, "--prefill-chunk", "13")
    for golden, tensors in zip(goldens(shape), scored, strict=True):
        check(golden, tensors)


QUICK = (("default", 1), ("mtp", 2), ("sparse", 3))
"""Each case starts a cluster: the others are in the long form."""


@pytest.mark.parametrize(
    ("shape", "num_experts"),
    [
        *QUICK,
        *(
            pytest.param(shape, num_experts, marks=pytest.mark.slow)
            for shape in SHAPES
            for num_experts in (1, 2, 3)
            if (shape, num_experts) not in QUICK
        ),
    ],
)
def test_a_cluster_equals_the_goldens_and_one_process(
    make_shell: Callable[[], Shell], ray_head: RayHead, shape: str, num_experts: int
) -> None:
    shell = make_shell()
    cluster = ("--topology", "cluster", "--experts", str(num_experts))
    scored = score(shell, shape, *cluster, **ray_head.joined)
    whole = score(shell, shape)
    for golden, tensors, alone in zip(goldens(shape), scored, whole, strict=True):
        check(golden, tensors)
        # Bit for bit: neither processes nor placement may change a sum.
        assert all(torch.equal(tensors[name], alone[name]) for name in alone)


def test_a_cluster_of_its_own_equals_the_goldens(make_shell: Callable[[], Shell]) -> None:
    scored = score(make_shell(), "mtp", "--topology", "cluster", "--experts", "2")
    for golden, tensors in zip(goldens("mtp"), scored, strict=True):
        check(golden, tensors)


def test_a_prompt_longer_than_the_context_is_refused(make_shell: Callable[[], Shell], tmp_path: Path) -> None:
    tokens = tmp_path / "long.json"
    tokens.write_text(json.dumps({"tokens": [[5] * 513]}))
    out = tmp_path / "out.safetensors"
    done = make_shell().run(
        "logits", "--model", str(checkpoint_dir("default")), "--tokens", str(tokens), "--out", str(out)
    )
    assert done.returncode == 1
    assert "513" in done.stderr
    assert "512" in done.stderr
