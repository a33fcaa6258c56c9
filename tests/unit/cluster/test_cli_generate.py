"""The flags of `moray generate` become options."""

import sys
from pathlib import Path

import pytest

from cluster.cli import app as command_line
from cluster.cli import generate as module
from cluster.client import Answer, GenerateOptions
from wire.proto.common_pb2 import TokenLogprobs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[GenerateOptions]:
    """The options of what was asked; nothing is sent."""
    asked: list[GenerateOptions] = []

    async def print_answer(_target: str, _text: str, options: GenerateOptions) -> None:
        asked.append(options)

    monkeypatch.setattr(module, "print_answer", print_answer)
    return asked


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["moray", "generate", "Hello", "--address", "a:1", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert not ended.value.code


def test_no_flag_leaves_every_default(monkeypatch: pytest.MonkeyPatch, asked: list[GenerateOptions]) -> None:
    run(monkeypatch)
    assert asked == [GenerateOptions()]


def test_every_flag_is_an_option(monkeypatch: pytest.MonkeyPatch, asked: list[GenerateOptions]) -> None:
    run(
        monkeypatch,
        *(
            "--model",
            "m",
            "--n",
            "3",
            "--max-tokens",
            "7",
            "--min-tokens",
            "3",
            "--ignore-eos",
            "--deadline-s",
            "2",
        ),
        *(
            "--stop-token",
            "8",
            "--stop-token",
            "9",
            "--temperature",
            "0.5",
            "--top-p",
            "0.25",
            "--top-k",
            "4",
        ),
        *(
            "--stop",
            "\n\n",
            "--stop",
            "END",
            "--min-p",
            "0.125",
            "--repetition-penalty",
            "1.5",
            "--presence-penalty",
            "-1",
            "--seed",
            "6",
        ),
        *("--frequency-penalty", "0.5", "--logit-bias", "5=-2.5", "--logit-bias", "7=1"),
        *("--logprobs", "2", "--prompt-logprobs", "0", "--priority", "-4", "--tenant", "t"),
    )
    assert asked == [
        GenerateOptions(
            model="m",
            n=3,
            max_tokens=7,
            min_tokens=3,
            ignore_eos=True,
            stop_token_ids=(8, 9),
            stop=("\n\n", "END"),
            temperature=0.5,
            top_p=0.25,
            top_k=4,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-1.0,
            frequency_penalty=0.5,
            logit_bias={5: -2.5, 7: 1.0},
            logprobs=2,
            prompt_logprobs=0,
            seed=6,
            priority=-4,
            tenant="t",
            deadline_s=2.0,
        )
    ]


def test_files_with_a_structure_are_read(
    monkeypatch: pytest.MonkeyPatch, asked: list[GenerateOptions], tmp_path: Path
) -> None:
    (tmp_path / "schema").write_text("{}")
    run(monkeypatch, "--json-schema", str(tmp_path / "schema"))
    run(monkeypatch, "--grammar", str(tmp_path / "schema"))
    run(monkeypatch, "--regex", "a+")
    assert asked == [
        GenerateOptions(json_schema="{}"),
        GenerateOptions(grammar="{}"),
        GenerateOptions(regex="a+"),
    ]


def test_json_tells_log_probabilities_where_asked_for() -> None:
    one = TokenLogprobs(logprob=-0.5, top_token_ids=[7, 3], top_logprobs=[-0.25, -0.5])
    answer = Answer(token_ids=[3], logprobs=[one], prompt_logprobs=[TokenLogprobs(), one])
    told = {"logprob": -0.5, "top": [[7, -0.25], [3, -0.5]]}
    assert module.describe_answers([answer], GenerateOptions()) == {"outputs": [[3]]}
    assert module.describe_answers([answer], GenerateOptions(logprobs=2, prompt_logprobs=2)) == {
        "outputs": [[3]],
        "logprobs": [[told]],
        "prompt_logprobs": [[None, told]],
    }
