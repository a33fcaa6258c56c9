"""Many streams at once against a running cluster, each answer compared with the undisturbed one."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from cluster.client import GenerateOptions, InferenceClient
from wire.errors import MorayError

NUM_STREAMS = 16


@dataclass
class Answers:
    """What one stream after another got; written by the loop's thread, read when it has ended."""

    num_done: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """Between two messages of a stream."""
    longest_gap_s: float = 0.0
    """The longest of them, or from a stream's start to its first message."""

    def p99_gap_s(self) -> float:
        """Ninety-nine of a hundred gaps were shorter."""
        return sorted(self.gaps_s)[int(len(self.gaps_s) * 0.99)]


@dataclass(frozen=True)
class Load:
    """Prompts that are asked over and over, each by a stream of its own."""

    address: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    is_sampled: bool
    """Every second stream draws its tokens, from a seed of its own; the others are greedy."""

    def expected(self) -> tuple[tuple[list[int], ...], Answers]:
        """Every prompt's answer, all asked at once and twice; the second time is what others are held to."""
        first, _ = asyncio.run(self._once())
        again, answers = asyncio.run(self._once())
        assert again == first
        return first, answers

    @contextmanager
    def running(self, expected: tuple[list[int], ...]) -> Iterator[Answers]:
        """Streams that go on until the block ends, then finish the answer that they are at."""
        answers, is_over = Answers(), threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._until(is_over, expected, answers)))
        thread.start()
        try:
            yield answers
        finally:
            is_over.set()
            thread.join()

    async def _once(self) -> tuple[tuple[list[int], ...], Answers]:
        answers = Answers()
        async with InferenceClient(self.address) as client:
            found = await asyncio.gather(
                *(self._ask(client, idx, answers) for idx in range(len(self.prompts)))
            )
        return tuple(found), answers

    async def _until(
        self, is_over: threading.Event, expected: tuple[list[int], ...], answers: Answers
    ) -> None:
        async def repeat(client: InferenceClient, idx: int) -> None:
            while not is_over.is_set():
                try:
                    got = await self._ask(client, idx, answers)
                except MorayError as error:
                    answers.wrong.append(f"prompt {idx}: {type(error).__name__}: {error.message}")
                    continue
                answers.num_done += 1
                if got != expected[idx]:
                    answers.wrong.append(f"prompt {idx}: {got} instead of {expected[idx]}")

        async with InferenceClient(self.address) as client:
            await asyncio.gather(*(repeat(client, idx) for idx in range(len(self.prompts))))

    async def _ask(self, client: InferenceClient, idx: int, answers: Answers) -> list[int]:
        options = GenerateOptions(max_tokens=self.max_tokens, ignore_eos=True)
        if self.is_sampled and idx % 2:
            options = replace(options, temperature=1.0, seed=idx)
        tokens: list[int] = []
        last_s = time.monotonic()
        async for message in client.stream(self.prompts[idx], options):
            now_s = time.monotonic()
            answers.longest_gap_s = max(answers.longest_gap_s, now_s - last_s)
            if tokens:
                answers.gaps_s.append(now_s - last_s)
            last_s = now_s
            assert message.first_idx == len(tokens)
            tokens += message.token_ids
        return tokens


def make_load(
    address: str, *, num_streams: int = NUM_STREAMS, max_tokens: int = 60, sampled: bool = False
) -> Load:
    """Streams over prompts of 1 to 31 tokens, each its own."""
    prompts = tuple(tuple(3 + (7 * i + j) % 200 for j in range(1 + 2 * i)) for i in range(num_streams))
    return Load(address, prompts, max_tokens, sampled)
