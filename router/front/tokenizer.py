"""Text to token ids and back, piece by piece, with the tokenizer of the checkpoint."""

import asyncio
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from router.requests.members import ModelFacts
from wire.errors import InvalidRequest

_log = logging.getLogger(__name__)

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_WINDOW_TOKENS = 64
_KEPT_TOKENS = 8


@dataclass(frozen=True)
class PromptTokenizer:
    """The tokenizer of one model."""

    tokenizer: Tokenizer
    bos_token_id: int | None
    """Put before every text prompt that does not start with it; None = nothing is."""

    def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of a prompt; special tokens written in it count as such."""
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if self.bos_token_id is None or ids[:1] == (self.bos_token_id,):
            return ids
        return (self.bos_token_id, *ids)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@dataclass
class TextStream:
    """Turns a stream of tokens into text; never half a character.

    All pieces together are the text of all tokens. A character whose bytes are spread over tokens comes
    with the last of them: the bytes E2, 82, AC of the euro sign, one a token, give "", "", "€".
    """

    tokenizer: PromptTokenizer | None
    """None = every piece is ""."""
    _window: list[int] = field(default_factory=list)
    _num_read: int = 0
    """Tokens at the window's start whose text went out; kept because some decoders look back."""

    def push(self, token_ids: tuple[int, ...]) -> str:
        """The text that these tokens complete."""
        if self.tokenizer is None:
            return ""
        pieces = []
        for token_id in token_ids:
            self._window.append(token_id)
            pieces.append(self._take(self.tokenizer))
        return "".join(pieces)

    def finish(self) -> str:
        """What is still held, once no token follows; an unfinished character shows as U+FFFD."""
        if self.tokenizer is None:
            return ""
        known = len(self.tokenizer.decode(self._window[: self._num_read]))
        rest = self.tokenizer.decode(self._window)[known:]
        self._window, self._num_read = [], 0
        return rest

    def _take(self, tokenizer: PromptTokenizer) -> str:
        known = len(tokenizer.decode(self._window[: self._num_read]))
        text = tokenizer.decode(self._window)
        if len(text) > known and not text.endswith(_REPLACEMENT):
            del self._window[: self._num_read]
            self._num_read = len(self._window)
            return text[known:]
        if len(self._window) - self._num_read > _MAX_WINDOW_TOKENS:
            return self._cut(tokenizer, text, known)
        return ""

    def _cut(self, tokenizer: PromptTokenizer, text: str, known: int) -> str:
        """Lets go of the front of a long window, where that splits no character.

        A model may write U+FFFD for ever; without this each token would decode all of them again. If head
        and tail decode to the whole apart, no character lies across the cut.
        """
        head, tail = self._window[:-_KEPT_TOKENS], self._window[-_KEPT_TOKENS:]
        head_text, tail_text = tokenizer.decode(head), tokenizer.decode(tail)
        if not tail_text or head_text + tail_text != text:
            return ""
        self._window, self._num_read = tail, 0
        return head_text[known:]


class TokenizerStore:
    """The tokenizer of the model that is served, loaded once, in a thread."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._loaded: dict[tuple[str, str], PromptTokenizer | str] = {}

    async def find(self, model: ModelFacts) -> PromptTokenizer | None:
        """The model's tokenizer, or None where it has none that this host can read."""
        found = await self._load(model)
        return None if isinstance(found, str) else found

    async def encode(self, text: str, model: ModelFacts) -> tuple[int, ...]:
        """The token ids of a text prompt.

        Raises:
            InvalidRequest: there is no tokenizer here; says why and what to send instead.
        """
        found = await self._load(model)
        if isinstance(found, str):
            raise InvalidRequest(
                f"text: wanted token ids, because {found}; got text; send the prompt as tokens", field="text"
            )
        return await asyncio.to_thread(found.encode, text)

    async def _load(self, model: ModelFacts) -> PromptTokenizer | str:
        key = (model.path, model.fingerprint)
        async with self._lock:
            if key not in self._loaded:
                loaded = await asyncio.to_thread(load_tokenizer, model)
                if isinstance(loaded, str):
                    _log.warning("model %s takes no text prompts here: %s", model.name, loaded)
                self._loaded = {key: loaded}
            return self._loaded[key]


def load_tokenizer(model: ModelFacts) -> PromptTokenizer | str:
    """The tokenizer in the model's directory, or why there is none."""
    path = Path(model.path) / "tokenizer.json"
    if not model.path or not path.is_file():
        return f"the router finds no tokenizer.json in the checkpoint ({model.path or 'no path'}) on its host"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        adds_bos = _adds_bos(path.with_name("tokenizer_config.json"))
    except Exception as error:  # noqa: BLE001  tokenizers raises bare Exception; mapped to the reason
        return f"{path} cannot be read ({error})"
    return PromptTokenizer(tokenizer=tokenizer, bos_token_id=model.bos_token_id if adds_bos else None)


def _adds_bos(path: Path) -> bool:
    if not path.is_file():
        return False
    return json.loads(path.read_text(encoding="utf-8")).get("add_bos_token") is True
