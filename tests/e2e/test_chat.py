"""The trained model in a whole cluster: it reasons, calls tools, and says what one process says."""

import json
from collections.abc import Callable

import pytest
from e2e_cluster import Running
from tokenizers import Tokenizer

from benchmarks._one_process import greedy, one_process
from cluster.chat.demo_tools import weather
from cluster.models import find_model
from router.front.chat.encoding import encode_messages


@pytest.fixture(scope="module")
def nano(start: Callable[..., Running]) -> Running:
    return start({"model": "nano"})


def test_sum_is_worked_out_and_right(nano: Running) -> None:
    done = nano.shell.run("generate", "--chat", "What is 47 + 85?")
    assert done.returncode == 0, done.stderr
    assert "47 + 85 = 132." in done.stdout


def test_tool_is_called_and_its_result_is_in_the_answer(nano: Running) -> None:
    done = nano.shell.run("chat", "What is the weather in Paris?")
    assert done.returncode == 0, done.stderr
    found = weather("Paris")
    assert '→ weather {"city": "Paris"}' in done.stdout
    assert f"It is {found['temp_c']} degrees with {found['sky']} in Paris." in done.stdout


def test_cluster_says_what_one_process_says(nano: Running) -> None:
    source = find_model("nano").path
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    asked = [{"role": "user", "content": "Tell me a story about a fox named Hugo."}]
    prompt = encode_messages(asked, thinking_mode="thinking")
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    (answer,) = nano.shell.generate([ids], "--max-tokens", "60")
    with one_process(source) as engine:
        assert [answer] == greedy(engine, [ids], max_tokens=60)
    assert "Hugo" in tokenizer.decode(answer)


def test_json_flag_gives_the_tokens_of_the_chat(nano: Running) -> None:
    done = nano.shell.run("generate", "--chat", "--no-thinking", "--json", "Hello")
    tokenizer = Tokenizer.from_file(str(find_model("nano").path / "tokenizer.json"))
    (tokens,) = json.loads(done.stdout)["outputs"]
    assert "Hello!" in tokenizer.decode(tokens)
