"""The command line: exit code 2 for wrong usage, 1 for failures, and one line that names what is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.cli import app as command_line
from tests.reference_data import checkpoint_dir

COMMANDS = (
    *("up", "down", "status", "scale", "role", "drain", "rebalance", "generate", "chat"),
    *("logits", "router", "bench", "checkpoint", "template"),
)
Moray = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def no_cluster_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_STATE_FILE", str(tmp_path / "none.json"))
    monkeypatch.delenv("MORAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def moray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Moray:
    """Runs the command line in this process; its exit code and what it wrote to stderr."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["moray", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def check_one_line(error: str, *parts: str) -> None:
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert [part for part in parts if part not in error] == []


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.json"
    path.write_text('{"tokens": [[1, 2, 3]]}')
    return path


def broken_checkpoint(folder: Path, *, tensor: str, shape: tuple[int, ...] | None) -> Path:
    """The default checkpoint without one tensor, or with another shape of it."""
    folder.mkdir()
    for path in checkpoint_dir("default").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    whole = weights.pop(tensor)
    if shape is not None:
        weights[tensor] = whole.flatten()[: shape[0] * shape[1]].reshape(shape).contiguous()
    save_file(weights, folder / "model.safetensors")
    return folder


def test_command_is_installed_and_lists_every_command() -> None:
    program = Path(sys.executable).with_name("moray")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert [name for name in COMMANDS if f"│ {name} " not in done.stdout] == []


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["generate"], 2, "wanted either a text or --tokens"),
        (["status", "--address", "unix:/no/such.sock"], 1, "no router answers at unix:/no/such.sock"),
        (["scale", "--experts", "3"], 1, "no cluster is noted"),
        (["scale", "--experts", "3", "--controller", "unix:/no/such.sock"], 1, "no controller answers at"),
        (["role", "decode-1", "both"], 1, "no cluster is noted"),
        (["drain", "10.0.0.1"], 1, "no cluster is noted"),
        (["scale"], 2, "--experts, --prefill or --decode"),
        (
            ["rebalance", "--controller", "unix:/no/such.sock"],
            1,
            "no controller answers at unix:/no/such.sock",
        ),
        (["down"], 1, "no cluster is noted in"),
    ],
)
def test_installed_command_ends_with_one_line_and_its_code(
    arguments: list[str], code: int, part: str
) -> None:
    program = Path(sys.executable).with_name("moray")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    check_one_line(done.stderr, part)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, moray: Moray) -> None:
    assert moray(command, "--help") == (0, "")


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("expert: {replica: 3}", ["'expert.replica'", "did you mean 'replicas'?"]),
        ("expert: {replicas: none}", ["'expert.replicas'", "wanted a valid integer", "got 'none'"]),
        ("prefill: {replicas: 0}", ["'prefill.replicas'", "nothing can prefill"]),
        ("a: [1\nb: }", ["'--config'", "wanted a readable YAML file"]),
    ],
)
def test_wrong_config_is_a_usage_error(moray: Moray, tmp_path: Path, config: str, parts: list[str]) -> None:
    path = tmp_path / "moray.yaml"
    path.write_text(config)
    code, error = moray("up", "--config", path)
    assert code == 2
    check_one_line(error, *parts)


def test_router_refuses_a_wrong_config(moray: Moray, tmp_path: Path) -> None:
    code, error = moray("router", "--controller", "h:1", "--config", tmp_path / "none.yaml")
    assert code == 2
    check_one_line(error, "'--config'", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["up", "--experts", "0"], "--experts"),
        (["up", "--decode", "many"], "--decode"),
        (["generate", "x", "--top-k", "-1"], "--top-k"),
        (["generate", "x", "--max-tokens", "4294967296"], "--max-tokens"),
        (["generate", "x", "--logit-bias", "5"], "--logit-bias"),
        (["generate", "x", "--json-schema", "/no/such/file"], "--json-schema"),
        (["generate", "x", "--regex", "a", "--grammar", "g"], "--grammar"),
        (["generate", "x", "--logit-bias", "-1=2"], "--logit-bias"),
        (["generate", "x", "--logit-bias", "1=much"], "--logit-bias"),
        (["generate", "x", "--seed", "18446744073709551616"], "--seed"),
        (["logits", "--model", "m", "--tokens", "t", "--out", "o", "--topology", "ring"], "--topology"),
        (
            ["logits", "--model", "m", "--tokens", "t", "--out", "o", "--prefill-chunk", "4294967296"],
            "-chunk",
        ),
        (["logits", "--tokens", "t", "--out", "o"], "--model"),
        (["router"], "--controller"),
        (["status", "--adress", "x"], "--adress"),
        (["hover"], "hover"),
    ],
)
def test_wrong_flag_is_a_usage_error_that_names_it(moray: Moray, arguments: list[str], flag: str) -> None:
    code, error = moray(*arguments)
    assert code == 2
    assert flag in error


def test_text_and_tokens_together_are_a_usage_error(moray: Moray, tokens: Path) -> None:
    code, error = moray("generate", "hello", "--tokens", tokens)
    assert code == 2
    check_one_line(error, "'text'", "either a text or --tokens", "got both")


@pytest.mark.parametrize("command", ["generate", "logits"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[[1, 2]]",
        "{}",
        '{"tokens": []}',
        '{"tokens": [1, 2]}',
        '{"tokens": [[1], "a"]}',
        '{"tokens": [[1.5]]}',
        '{"tokens": [[true]]}',
        '{"tokens": [[-1]]}',
        '{"tokens": [[4294967296]]}',
    ],
)
def test_tokens_file_that_is_none_is_a_usage_error(
    moray: Moray, tokens: Path, command: str, content: str
) -> None:
    tokens.write_text(content)
    more = ["--model", "m", "--out", tokens.with_name("o")] if command == "logits" else []
    code, error = moray(command, "--tokens", tokens, *more)
    assert code == 2
    check_one_line(error, "'--tokens'")


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_unreadable_tokens_file_is_named(moray: Moray, tokens: Path, content: bytes | None) -> None:
    tokens.unlink()
    if content is not None:
        tokens.write_bytes(content)
    code, error = moray("generate", "--tokens", tokens)
    assert code == 2
    check_one_line(error, "'--tokens'", "a readable JSON file", str(tokens))


def test_no_router_is_a_failure_that_names_the_address(moray: Moray) -> None:
    code, error = moray("generate", "hello", "--address", "unix:/no/such.sock")
    assert code == 1
    check_one_line(error, "no router answers at unix:/no/such.sock", "`moray up`", "--address")


def test_no_controller_is_a_failure_that_names_the_address(moray: Moray) -> None:
    code, error = moray("down", "--controller", "unix:/no/such.sock")
    assert code == 1
    check_one_line(error, "no controller answers at unix:/no/such.sock")


def test_unknown_dtype_is_a_usage_error(moray: Moray, tokens: Path) -> None:
    files = ("--model", checkpoint_dir("default"), "--tokens", tokens, "--out", tokens.with_name("o"))
    code, error = moray("logits", *files, "--dtype", "int4")
    assert code == 2
    assert "'int4' is not one of 'auto', 'float32'" in " ".join(error.replace("│", " ").split())


@pytest.mark.parametrize("out", ["", "nowhere/out.safetensors"])
def test_output_that_cannot_be_written_is_refused_before_the_work(
    moray: Moray, tokens: Path, out: str
) -> None:
    path = tokens.parent / out
    code, error = moray("logits", "--model", "no such model", "--tokens", tokens, "--out", path)
    assert code == 2
    check_one_line(error, "'--out'", f"got {path}")


@pytest.mark.parametrize(
    ("tensor", "shape", "problem"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", None, "missing"),
        ("lm_head.weight", (4, 5), "given (4, 5)"),
    ],
)
@pytest.mark.parametrize("command", ["logits", "inspect"])
def test_broken_checkpoint_is_a_failure_that_names_the_tensor(
    moray: Moray, tokens: Path, command: str, tensor: str, shape: tuple[int, int] | None, problem: str
) -> None:
    folder = broken_checkpoint(tokens.with_name("m"), tensor=tensor, shape=shape)
    files = ("--model", folder, "--tokens", tokens, "--out", tokens.with_name("o"))
    code, error = moray("logits", *files) if command == "logits" else moray("checkpoint", "inspect", folder)
    assert code == 1
    check_one_line(error, tensor, problem)
    assert not tokens.with_name("o").exists()


@pytest.mark.parametrize(
    ("prompts", "part"),
    [
        ([[]], "tokens: wanted at least one"),
        ([[1, 99_999]], "tokens: 99999"),
        ([[1] * 600], "the context has 512"),
    ],
)
def test_prompt_that_the_model_cannot_take_is_a_failure(
    moray: Moray, tokens: Path, prompts: list[list[int]], part: str
) -> None:
    tokens.write_text(json.dumps({"tokens": prompts}))
    files = ("--model", checkpoint_dir("default"), "--tokens", tokens, "--out", tokens.with_name("o"))
    code, error = moray("logits", *files)
    assert code == 1
    check_one_line(error, part)
