"""Sentences about a person, to be answered as JSON that fits a schema."""

import json
import random
from collections.abc import Mapping

from training.data.types import Check, Conversation
from training.data.vocabulary import CITIES, COLORS, FIRST_NAMES, JOBS, PETS

_CLAUSES: Mapping[str, str] = {
    "age": "is {} years old",
    "city": "lives in {}",
    "job": "works as a {}",
    "color": "likes the color {}",
    "pet": "has a {}",
}


def make_json(rng: random.Random) -> Conversation:
    """Two to four fields asked for, sometimes one more mentioned."""
    person: dict[str, object] = {
        "name": rng.choice(FIRST_NAMES),
        "age": rng.randint(5, 99),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
        "color": rng.choice(COLORS),
        "pet": rng.choice(PETS),
    }
    mentioned = rng.sample(list(_CLAUSES), rng.randint(1, 4))
    asked = ["name", *rng.sample(mentioned, min(len(mentioned), rng.randint(1, 3)))]
    value = {field: person[field] for field in asked}
    clauses = [_CLAUSES[field].format(person[field]) for field in mentioned]
    text = clauses[0] if len(clauses) == 1 else ", ".join(clauses[:-1]) + " and " + clauses[-1]
    schema = {
        "type": "object",
        "properties": {field: {"type": "integer" if field == "age" else "string"} for field in asked},
        "required": asked,
        "additionalProperties": False,
    }
    return Conversation(
        kind="json",
        thinking_mode="chat",
        messages=(
            {"role": "system", "content": "Answer in JSON.", "response_format": schema},
            {"role": "user", "content": f"{person['name']} {text}."},
            {"role": "assistant", "content": json.dumps(value)},
        ),
        check=Check(schema=schema, value=value),
    )
