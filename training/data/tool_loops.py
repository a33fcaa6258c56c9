"""Conversations with more than one call."""

import json
import random

from training.data.tools import (
    Message,
    any_question,
    lookup_question,
    reply_with_calls,
    result_turn,
    single_call,
    system_turn,
    weather_question,
)
from training.data.types import Check, Conversation
from training.data.vocabulary import CITIES


def make_tool_loop(rng: random.Random) -> Conversation:
    """Two calls at once, two in a row, or a second question after a first was answered."""
    return rng.choice((_at_once, _in_a_row, _second_question))(rng)


def _at_once(rng: random.Random) -> Conversation:
    """The weather in two cities."""
    first_city, second_city = rng.sample(CITIES, 2)
    first, second = weather_question(rng, first_city), weather_question(rng, second_city)
    calls = [("call_0", first), ("call_1", second)]
    answer = f"{first.answer} {second.answer}"
    turns = [
        {"role": "user", "content": f"What is the weather in {first_city} and in {second_city}?"},
        reply_with_calls(f"I need the weather in {first_city} and in {second_city}.", calls),
        *(result_turn(call_id, question) for call_id, question in calls),
        {
            "role": "assistant",
            "reasoning_content": f"The tools say {first.result} and {second.result}.",
            "content": answer,
        },
    ]
    return _conversation(rng, turns, [first.name], answer)


def _in_a_row(rng: random.Random) -> Conversation:
    """The city of a person, then the weather there."""
    home = lookup_question(rng, "city")
    city, name = json.loads(home.result)["city"], home.arguments["name"]
    weather = weather_question(rng, city)
    turns = [
        {"role": "user", "content": f"What is the weather in the city of {name}?"},
        reply_with_calls(home.need, [("call_0", home)]),
        result_turn("call_0", home),
        reply_with_calls(f"{name} lives in {city}. {weather.need}", [("call_1", weather)]),
        result_turn("call_1", weather),
        {
            "role": "assistant",
            "reasoning_content": f"The tool says {weather.result}.",
            "content": weather.answer,
        },
    ]
    return _conversation(rng, turns, [home.name, weather.name], weather.answer)


def _second_question(rng: random.Random) -> Conversation:
    """An answered question, then another."""
    first, second = any_question(rng), any_question(rng)
    turns = [
        {"role": "user", "content": first.text},
        *single_call(first, "call_0"),
        {"role": "user", "content": second.text},
        *single_call(second, "call_1"),
    ]
    return _conversation(rng, turns, [first.name, second.name], second.answer)


def _conversation(rng: random.Random, turns: list[Message], needed: list[str], answer: str) -> Conversation:
    return Conversation(
        kind="tool_loop",
        thinking_mode="thinking" if rng.random() < 0.75 else "chat",
        messages=(system_turn(rng, needed), *turns),
        check=Check(answer=answer),
    )
