"""Requests to a whole cluster: right answers, and clear refusals."""

import random
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from e2e_cluster import Running

from benchmarks._one_process import greedy, one_process
from cluster.client import GenerateOptions, make_request
from wire.errors import MorayError, from_rpc
from wire.proto import inference_pb2_grpc

PAGE_TOKENS = 4
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def tiny(cluster: Running) -> Path:
    """The checkpoint that the cluster serves."""
    return Path(cluster.shell.status()["model"]["path"])


def test_eight_mixed_prompts_at_once_equal_a_single_process(cluster: Running, tiny: Path) -> None:
    rng = random.Random(7)
    lengths = [1, 2, PAGE_TOKENS, PAGE_TOKENS + 1, 17, 30, PAGE_TOKENS * 10 + 1, 150]
    prompts = [[rng.randrange(3, 259) for _ in range(length)] for length in lengths]

    answers = cluster.shell.generate(prompts, "--max-tokens", str(NEW_TOKENS))

    with one_process(tiny) as engine:
        expected = [greedy(engine, [prompt], max_tokens=NEW_TOKENS)[0] for prompt in prompts]
    assert answers == expected


def test_text_streams_back(cluster: Running) -> None:
    done = cluster.shell.run("generate", "Hello, Moray", "--max-tokens", "16", "--ignore-eos")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 3


def test_the_same_seed_gives_the_same_text(cluster: Running) -> None:
    sampled = ("--temperature", "1.0", "--top-p", "0.9", "--max-tokens", "20")
    first = cluster.shell.generate([[40, 41, 42]], *sampled, "--seed", "5")
    again = cluster.shell.generate([[9] * 30, [40, 41, 42]], *sampled, "--seed", "5")
    other = cluster.shell.generate([[40, 41, 42]], *sampled, "--seed", "6")
    assert again[1] == first[0]
    assert other != first


def test_text_follows_a_structure_and_ends_at_a_stop_string(cluster: Running) -> None:
    whole = ("generate", "Hello, Moray", "--regex", "[0-9]{3}-[a-z]{5}", "--max-tokens", "20")
    done = cluster.shell.run(*whole)
    assert done.returncode == 0, done.stderr
    text = done.stdout.strip()
    assert re.fullmatch("[0-9]{3}-[a-z]{5}", text)
    cut = cluster.shell.run(*whole, "--stop", text[2:5])
    assert cut.stdout.strip() == text[:2]


def test_more_outputs_leave_the_first_as_it_is_and_tell_their_log_probabilities(cluster: Running) -> None:
    sampled = ("--temperature", "1.0", "--seed", "5", "--max-tokens", "12", "--repetition-penalty", "1.2")
    (first,) = cluster.shell.generate([[40, 41, 42]], *sampled)
    outputs = cluster.shell.generate([[40, 41, 42]], *sampled, "--n", "3", "--logprobs", "1")
    assert outputs[0] == first
    assert len({tuple(output) for output in outputs}) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["hi", "--max-tokens", "0"], "max_tokens"),
        (["hi", "--model", "gpt-7"], "gpt-7"),
        (["hi", "--temperature", "-1"], "temperature"),
        (["hi", "--top-p", "1.5"], "top_p"),
        (["hi", "--regex", "[0-9"], "regex"),
        (["hi", "--n", "65"], "n: wanted 1 to 64"),
        (["hi", "--logit-bias", "999999=1"], "logit_bias"),
        (["x" * 5000], "4096"),
        (["hi", "--max-tokens", "999999"], "max_tokens"),
    ],
)
def test_a_wrong_request_is_refused_by_name(cluster: Running, arguments: list[str], says: str) -> None:
    done = cluster.shell.run("generate", *arguments)
    assert done.returncode != 0
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def refusal(cluster: Running, prompt: object) -> MorayError:
    """The error of one raw request."""
    address = cluster.shell.members()["router-0"]["address"]
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(make_request(prompt, GenerateOptions()), timeout=30))  # type: ignore[arg-type]
    return from_rpc(caught.value)


def test_a_token_outside_the_vocabulary_names_the_field(cluster: Running) -> None:
    error = refusal(cluster, [1, 2, 100_000])
    assert (type(error).__name__, error.field) == ("InvalidRequest", "tokens")


def test_an_empty_prompt_names_the_field(cluster: Running) -> None:
    error = refusal(cluster, [])
    assert (type(error).__name__, error.field) == ("InvalidRequest", "tokens")


def test_bytes_that_are_no_request_are_refused(cluster: Running) -> None:
    address = cluster.shell.members()["router-0"]["address"]
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_stream("/moray.v1.Inference/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(b"\xff\xff\xff not a message", timeout=30))
    error = from_rpc(caught.value)
    assert (type(error).__name__, error.field) == ("InvalidRequest", "request")


def test_the_python_client_of_the_readme_works(cluster: Running) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    address = cluster.shell.members()["router-0"]["address"]
    done = subprocess.run(
        [sys.executable, "-c", program.replace("localhost:50051", address)],
        env=cluster.shell.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 3
