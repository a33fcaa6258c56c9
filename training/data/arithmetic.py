"""Sums, differences and products, worked digit by digit before the answer."""

import random
from collections.abc import Mapping
from typing import Any

from training.data.types import Check, Conversation

_PHRASES = ("What is {}?", "Compute {}.", "How much is {}?", "{} = ?")
_SYSTEM: Mapping[str, str] = {"role": "system", "content": "You are Moray."}


def make_arithmetic(rng: random.Random) -> Conversation:
    """A + b and a - b with a, b in [0, 99] and no result below 0; a * b with a in [2, 99], b in [2, 9]."""
    operator = rng.choice("+-*")
    if rng.random() < 0.1:
        return _direct(rng, operator)
    if operator == "*":
        a, b = rng.randint(2, 99), rng.randint(2, 9)
    else:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        if operator == "-" and a < b:
            a, b = b, a
    return _conversation(rng, f"{a} {operator} {b}", worked=f"{a} {operator} {b}. {_work(a, b, operator)}")


def _direct(rng: random.Random, operator: str) -> Conversation:
    """One-digit numbers in chat mode: from memory."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    if operator == "-" and a < b:
        a, b = b, a
    return _conversation(rng, f"{a} {operator} {b}", worked=None)


def _conversation(rng: random.Random, expression: str, *, worked: str | None) -> Conversation:
    answer = f"{expression} = {evaluate(expression)}."
    messages: list[Mapping[str, Any]] = [_SYSTEM] if rng.random() < 0.5 else []
    messages.append({"role": "user", "content": rng.choice(_PHRASES).format(expression)})
    reply = {"role": "assistant", "content": answer}
    if worked is not None:
        reply["reasoning_content"] = worked
    mode = "chat" if worked is None else "thinking"
    return Conversation(
        kind="arithmetic",
        thinking_mode=mode,  # type: ignore[arg-type]  # a literal, which mypy widens
        messages=(*messages, reply),
        check=Check(answer=answer),
    )


def evaluate(expression: str) -> int:
    """The value of "a + b", "a - b" or "a * b"."""
    left, operator, right = expression.split()
    a, b = int(left), int(right)
    return a + b if operator == "+" else a - b if operator == "-" else a * b


def _work(a: int, b: int, operator: str) -> str:
    """The steps, units first, ending with "So N."."""
    if operator == "*":
        steps = _product_steps(a, b)
    else:
        steps = _sum_steps(a, b) if operator == "+" else _difference_steps(a, b)
    return " ".join([*steps, f"So {evaluate(f'{a} {operator} {b}')}."])


def _sum_steps(a: int, b: int) -> list[str]:
    """47 + 85: "7 + 5 = 12, write 2, carry 1." "4 + 8 + 1 = 13, write 13."."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    return [
        f"{a % 10} + {b % 10} = {units}, write {units % 10}, carry {units // 10}.",
        f"{a // 10} + {b // 10} + {units // 10} = {tens}, write {tens}.",
    ]


def _difference_steps(a: int, b: int) -> list[str]:
    """52 - 27: "12 - 7 = 5, write 5, borrow 1." "5 - 2 - 1 = 2, write 2."."""
    borrow = int(a % 10 < b % 10)
    units, tens = a % 10 + 10 * borrow - b % 10, a // 10 - b // 10 - borrow
    return [
        f"{a % 10 + 10 * borrow} - {b % 10} = {units}, write {units}, borrow {borrow}.",
        f"{a // 10} - {b // 10} - {borrow} = {tens}, write {tens}.",
    ]


def _product_steps(a: int, b: int) -> list[str]:
    """47 * 8: "7 * 8 = 56, write 6, carry 5." "4 * 8 = 32, 32 + 5 = 37, write 37."."""
    units = a % 10 * b
    tens, carry = a // 10 * b, units // 10
    return [
        f"{a % 10} * {b} = {units}, write {units % 10}, carry {carry}.",
        f"{a // 10} * {b} = {tens}, {tens} + {carry} = {tens + carry}, write {tens + carry}.",
    ]
