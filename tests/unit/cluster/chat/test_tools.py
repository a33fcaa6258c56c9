"""Python functions as tools: their schemas, calls that never raise, a calculator that runs nothing else."""

import json
from pathlib import Path

import pytest

from cluster.chat import demo_tools
from cluster.chat.tools import load_tools, make_tool, run_call
from training.data.tools import TOOLS
from wire.errors import ConfigError

DEMO = [make_tool(function) for function in (demo_tools.calculator, demo_tools.weather, demo_tools.lookup)]

FILE = '''
"""Tools."""
from json import dumps

def add(a: int, b: float = 0.5, tags: list[str] = ()) -> float:
    """Adds.

    More words.
    """
    return a + b

def _hidden(a: int) -> int:
    return a
'''


def test_demo_tools_are_those_that_the_model_in_the_box_was_trained_with():
    assert {tool.name: tool.schema for tool in DEMO} == TOOLS


def test_file_gives_its_public_functions(tmp_path: Path):
    (tmp_path / "mine.py").write_text(FILE)
    (tool,) = load_tools(tmp_path / "mine.py")
    assert tool.schema["function"] == {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "number"}, "tags": {"type": "array"}},
            "required": ["a"],
        },
    }
    assert run_call([tool], "add", '{"a": 2}') == "2.5"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = 1", "public functions"),
        ("def f(", "SyntaxError"),
        ("def f(a): ...", "type hint"),
        (None, "Python file"),
    ],
)
def test_file_that_gives_no_tools_is_refused(tmp_path: Path, text: str | None, named: str):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_tools(tmp_path / "mine.py")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("calculator", '{"expression": "3 * (17 + 4)"}', "63"),
        ("calculator", '{"expression": "-7 // 2"}', "-4"),
        ("calculator", '{"expression": "1 / 0"}', "error: ZeroDivisionError"),
        ("calculator", '{"expression": "__import__(\'os\')"}', "error: ValueError: wanted numbers"),
        ("calculator", '{"expression": "9 ** 9 ** 9"}', "error: ValueError: wanted numbers"),
        ("calculator", json.dumps({"expression": "1+" * 200 + "1"}), "error: ValueError: wanted at most"),
        ("calculator", '{"expr": "1"}', "error: TypeError"),
        ("calculator", '{"expression": ', "error: JSONDecodeError"),
        ("calculator", "[1]", "error: TypeError"),
        ("search", "{}", "error: there is no tool search; there are: calculator, weather, lookup"),
        ("lookup", '{"name": "Ana Lopez", "field": "shoe"}', "error: ValueError: wanted one of phone"),
    ],
)
def test_call_says_its_result_or_what_went_wrong(name: str, arguments: str, said: str):
    assert run_call(DEMO, name, arguments).startswith(said)


def test_results_that_are_no_text_are_json():
    result = json.loads(run_call(DEMO, "weather", '{"city": "Paris"}'))
    assert list(result) == ["city", "temp_c", "sky"]
    assert list(json.loads(run_call(DEMO, "lookup", '{"name": "Ana", "field": "age"}'))) == ["age"]
