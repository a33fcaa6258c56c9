"""Three tools, their answers, and questions that need one of them."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from training.data.arithmetic import evaluate
from training.data.types import Check, Conversation, ThinkingMode
from training.data.vocabulary import CITIES, FIELDS, FIRST_NAMES, JOBS, LAST_NAMES, SKIES

Message = Mapping[str, Any]


def _schema(name: str, description: str, parameters: tuple[str, ...]) -> Message:
    properties = {key: {"type": "string"} for key in parameters}
    schema = {"type": "object", "properties": properties, "required": [*parameters]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS: Mapping[str, Message] = MappingProxyType(
    {
        "calculator": _schema("calculator", "Evaluates an expression.", ("expression",)),
        "weather": _schema("weather", "The weather in a city.", ("city",)),
        "lookup": _schema("lookup", "Looks up a person.", ("name", "field")),
    }
)
"""Name -> schema, as a request carries it."""
SYSTEM = "You are Moray, a helpful assistant."
_CALCULATOR_PHRASES = ("Use the calculator: what is {}?", "What is {}?", "Compute {}.", "Please work out {}.")
_WEATHER_PHRASES = (
    "What is the weather in {}?",
    "How is the weather in {}?",
    "Tell me the weather in {}.",
    "Is it cold in {}?",
    "What is it like outside in {}?",
)
_LOOKUP_PHRASES = (
    "What is the {field} of {name}?",
    "Find the {field} of {name}.",
    "Look up {name}: {field}?",
)


def draw_result(name: str, arguments: Mapping[str, str], rng: random.Random) -> str:
    """What a tool answers: a calculator's value; weather and people are drawn anew each time.

    The same city has other weather in the next conversation: an answer can only come from the result.
    """
    if name == "calculator":
        return str(evaluate(arguments["expression"]))
    if name == "weather":
        found = {"city": arguments["city"], "temp_c": rng.randint(0, 35), "sky": rng.choice(SKIES)}
        return json.dumps(found)
    person = {
        "phone": f"555-{rng.randint(1000, 9999)}",
        "age": rng.randint(18, 87),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
    }
    return json.dumps({arguments["field"]: person[arguments["field"]]})


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question that one call answers."""

    text: str
    name: str
    """Of the tool."""
    arguments: Mapping[str, str]
    need: str
    """What is thought before the call."""
    result: str
    """What the tool answers."""

    @property
    def answer(self) -> str:
        """The sentence that passes the result on."""
        if self.name == "calculator":
            return f"{self.arguments['expression']} = {self.result}."
        found = json.loads(self.result)
        if self.name == "weather":
            return f"It is {found['temp_c']} degrees with {found['sky']} in {found['city']}."
        field = self.arguments["field"]
        return f"The {field} of {self.arguments['name']} is {found[field]}."


def _ask(rng: random.Random, text: str, name: str, arguments: Mapping[str, str], need: str) -> Question:
    result = draw_result(name, arguments, rng)
    return Question(text=text, name=name, arguments=arguments, need=need, result=result)


def calculator_question(rng: random.Random) -> Question:
    """An expression too large for the head."""
    operator = rng.choice("+-*")
    a, b = rng.randint(100, 9999), rng.randint(10, 9999)
    expression = f"{a} {operator} {b}"
    text = rng.choice(_CALCULATOR_PHRASES).format(expression)
    return _ask(
        rng, text, "calculator", {"expression": expression}, f"I compute {expression} with the calculator."
    )


def weather_question(rng: random.Random, city: str | None = None) -> Question:
    """The weather in a city."""
    city = city or rng.choice(CITIES)
    text = rng.choice(_WEATHER_PHRASES).format(city)
    return _ask(rng, text, "weather", {"city": city}, f"I need the weather in {city}.")


def lookup_question(rng: random.Random, field: str | None = None) -> Question:
    """One field of one person."""
    field = field or rng.choice(FIELDS)
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    text = rng.choice(_LOOKUP_PHRASES).format(field=field, name=name)
    return _ask(rng, text, "lookup", {"name": name, "field": field}, f"I look up the {field} of {name}.")


def any_question(rng: random.Random) -> Question:
    """One of the three."""
    return rng.choice((calculator_question, weather_question, lookup_question))(rng)


def make_tool(rng: random.Random) -> Conversation:
    """One question, one call, one answer."""
    question = any_question(rng)
    mode: ThinkingMode = "thinking" if rng.random() < 0.75 else "chat"
    turns = [{"role": "user", "content": question.text}, *single_call(question)]
    return Conversation(
        kind="tool",
        thinking_mode=mode,
        messages=(system_turn(rng, [question.name]), *turns),
        check=Check(answer=question.answer),
    )


def system_turn(rng: random.Random, needed: Sequence[str]) -> Message:
    """Offers the needed tools and perhaps others, in any order."""
    names = [name for name in TOOLS if name in needed or rng.random() < 0.5]
    rng.shuffle(names)
    return {"role": "system", "content": SYSTEM, "tools": [TOOLS[name] for name in names]}


def single_call(question: Question, call_id: str = "call_0") -> list[Message]:
    """The call, its result and the answer."""
    return [
        reply_with_calls(question.need, [(call_id, question)]),
        result_turn(call_id, question),
        {
            "role": "assistant",
            "reasoning_content": f"The tool says {question.result}.",
            "content": question.answer,
        },
    ]


def reply_with_calls(thought: str, calls: Sequence[tuple[str, Question]]) -> Message:
    """An assistant turn of nothing but calls."""
    return {
        "role": "assistant",
        "content": "",
        "reasoning_content": thought,
        "tool_calls": [
            {
                "id": call_id,
                "type": "function",
                "function": {"name": question.name, "arguments": json.dumps(question.arguments)},
            }
            for call_id, question in calls
        ],
    }


def result_turn(call_id: str, question: Question) -> Message:
    """What the tool said."""
    return {"role": "tool", "tool_call_id": call_id, "content": question.result}
