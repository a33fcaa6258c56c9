"""Short stories, simple facts and small talk."""

import random

from training.data.types import Conversation, Item, Kind, PlainText, ThinkingMode
from training.data.vocabulary import CAPITALS, DAYS, FIRST_NAMES, LEGS, OPPOSITES, SOUNDS, THING_COLORS

_HEROES = ("cat", "dog", "fox", "bear", "rabbit", "duck", "mouse", "girl", "boy", "horse")
_PLACES = (
    "the garden",
    "the forest",
    "the park",
    "the river",
    "the house",
    "the hill",
    "the lake",
    "the farm",
)
_THINGS = ("ball", "key", "book", "shell", "flower", "apple", "hat", "stone", "feather", "bell")
_MOODS = ("happy", "sad", "tired", "curious", "hungry", "proud")

_SMALL_TALK = (
    (
        ("Hello, Moray", "Hello", "Hi", "Hi there!", "Hello!", "Good morning."),
        "Hello! I am Moray. How can I help?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am Moray nano, a small DeepSeek-V3.2 whose experts run on their own workers.",
    ),
    (("How are you?", "How are you today?"), "I am fine, thank you. All my experts are up."),
    (("Thank you!", "Thanks.", "Thank you."), "You are welcome!"),
    (
        ("What can you do?", "Help", "How can you help me?"),
        "I can add and multiply small numbers, call tools, answer in JSON and tell short stories.",
    ),
    (("Bye", "Goodbye.", "See you."), "Goodbye! Come back soon."),
)


def make_story(rng: random.Random) -> Item:
    """A plain story, or one that was asked for."""
    name, hero = rng.choice(FIRST_NAMES), rng.choice(_HEROES)
    story = _story(rng, name, hero)
    if rng.random() < 0.5:
        return PlainText(kind="story", text=story)
    question = rng.choice(("Tell me a story about a {} named {}.", "Write a story about a {} called {}."))
    return _asked(
        rng, "story", question.format(hero, name), story, f"A short story about a {hero} named {name}."
    )


def _story(rng: random.Random, name: str, hero: str) -> str:
    friend = rng.choice([other for other in FIRST_NAMES if other != name])
    place, thing = rng.choice(_PLACES), rng.choice(_THINGS)
    before, after = rng.sample(_MOODS, 2)
    opening = rng.choice(("Once there was", "Long ago there was"))
    loss = rng.choice(
        (
            f"One day {name} lost a {thing} near {place}.",
            f"One day {name} found a {thing} near {place}.",
            f"One day {name} went to {place} to look for a {thing}.",
        )
    )
    helper = rng.choice(
        (
            f"{friend} came and helped {name} with the {thing}.",
            f"{name} met {friend}, who also liked the {thing}.",
            f"{name} showed the {thing} to {friend}.",
        )
    )
    end = rng.choice(
        (
            f"In the end {name} was {after} and they went home.",
            f"Then {name} and {friend} played near {place} until night.",
            f"{name} was {after} and kept the {thing} for a long time.",
        )
    )
    return f"{opening} a {hero} named {name} who was very {before}. {loss} {helper} {end}"


def make_fact(rng: random.Random) -> Item:
    """A question with a one-line answer, or the answer alone."""
    question, answer = rng.choice((_capital, _sound, _legs, _opposite, _color, _day))(rng)
    if rng.random() < 0.25:
        return PlainText(kind="fact", text=answer)
    return _asked(rng, "fact", question, answer, "That is a simple fact.")


def _capital(rng: random.Random) -> tuple[str, str]:
    country, city = rng.choice(CAPITALS)
    question = rng.choice(("What is the capital of {}?", "Name the capital of {}."))
    return question.format(country), f"The capital of {country} is {city}."


def _sound(rng: random.Random) -> tuple[str, str]:
    animal, sound = rng.choice(SOUNDS)
    return f"What sound does a {animal} make?", f"A {animal} {sound}."


def _legs(rng: random.Random) -> tuple[str, str]:
    animal, number = rng.choice(LEGS)
    return f"How many legs does a {animal} have?", f"A {animal} has {number} legs."


def _opposite(rng: random.Random) -> tuple[str, str]:
    pair = list(rng.choice(OPPOSITES))
    rng.shuffle(pair)
    return f"What is the opposite of {pair[0]}?", f"The opposite of {pair[0]} is {pair[1]}."


def _color(rng: random.Random) -> tuple[str, str]:
    thing, color = rng.choice(THING_COLORS)
    return f"What color is {thing}?", f"The color of {thing} is {color}."


def _day(rng: random.Random) -> tuple[str, str]:
    place = rng.randrange(7)
    return f"Which day comes after {DAYS[place]}?", f"After {DAYS[place]} comes {DAYS[(place + 1) % 7]}."


def make_small_talk(rng: random.Random) -> Item:
    """Greetings, and who Moray is."""
    questions, answer = rng.choice(_SMALL_TALK)
    return _asked(rng, "small_talk", rng.choice(questions), answer, "I answer in a friendly way.")


def _asked(rng: random.Random, kind: Kind, question: str, answer: str, thought: str) -> Conversation:
    mode: ThinkingMode = "thinking" if rng.random() < 0.5 else "chat"
    reply = {"role": "assistant", "content": answer, "reasoning_content": thought}
    return Conversation(
        kind=kind, thinking_mode=mode, messages=({"role": "user", "content": question}, reply)
    )
