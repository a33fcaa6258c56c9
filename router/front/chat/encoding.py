"""Messages into the prompt text that V3.2 was trained on.

Worked example, thinking mode: [{"role": "user", "content": "1+1?"}] becomes
<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜><think>

Reasoning stays in the prompt while the tool loop of the last user turn runs and is dropped from earlier
turns. The format has no ids: results stand in the order of the calls, so they are put in that order first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.front.chat import markup
from wire.errors import InvalidRequest

Message = Mapping[str, Any]
"""One turn, as the OpenAI API writes it; a system or developer turn may carry tools and response_format."""

THINKING_MODES = ("thinking", "chat")
_ASKING_ROLES = ("user", "developer")
_ROLES = ("system", *_ASKING_ROLES, "assistant", "tool")


def encode_messages(
    messages: Sequence[Message],
    *,
    thinking_mode: str,
    context: Sequence[Message] = (),
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
) -> str:
    """The prompt of a conversation, up to where the model goes on.

    Args:
        messages: turns to encode, oldest first.
        thinking_mode: "thinking" opens <think> after the last user turn, "chat" closes it at once.
        context: turns before `messages` that are encoded already; nothing of them is repeated.
        drop_thinking: leave out the reasoning of turns before the last user turn.
        add_default_bos_token: begin with the sentence mark, unless there is a context.

    Raises:
        InvalidRequest: a field is missing or does not fit; it names the message.
    """
    check_thinking_mode(thinking_mode)
    turns = _in_call_order([*context, *messages])
    last_asked = max((i for i, turn in enumerate(turns) if turn["role"] in _ASKING_ROLES), default=-1)
    state = _Encoder(turns, thinks=thinking_mode == "thinking", last_asked=last_asked, drops=drop_thinking)
    prompt = "".join(state.turn(i) for i in range(len(context), len(turns)))
    return (markup.BOS if add_default_bos_token and not context else "") + prompt


def check_thinking_mode(thinking_mode: object) -> None:
    """Raises InvalidRequest unless it is one of THINKING_MODES."""
    if thinking_mode not in THINKING_MODES:
        wanted = " or ".join(f'"{mode}"' for mode in THINKING_MODES)
        raise _refused("thinking_mode", wanted=wanted, given=repr(thinking_mode))


def _refused(field: str, *, wanted: str, given: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: wanted {wanted}, got {given}", field=field)


@dataclass(frozen=True)
class _Encoder:
    turns: Sequence[Message]
    thinks: bool
    last_asked: int
    drops: bool

    def turn(self, idx: int) -> str:
        turn = self.turns[idx]
        if turn["role"] == "system":
            return _text(turn, idx) + _attachments(turn, idx)
        if turn["role"] == "user":
            return markup.USER + _text(turn, idx) + markup.ASSISTANT + self._opening(idx == self.last_asked)
        if turn["role"] == "developer":
            if not turn.get("content"):
                raise _refused(f"messages[{idx}].content", wanted="a text that is not empty", given="none")
            text = _attachments(turn, idx) + markup.DEVELOPER_HEAD + _text(turn, idx)
            return markup.USER + text + markup.ASSISTANT + self._opening(idx == self.last_asked)
        if turn["role"] == "tool":
            return self._result(idx)
        return self._reply(idx)

    def _opening(self, is_current: bool) -> str:
        return markup.THINK_OPEN if self.thinks and is_current else markup.THINK_CLOSE

    def _result(self, idx: int) -> str:
        is_first = self.turns[idx - 1]["role"] != "tool"
        is_last = idx + 1 == len(self.turns) or self.turns[idx + 1]["role"] != "tool"
        text = (markup.RESULTS_OPEN if is_first else "") + f"\n<result>{_text(self.turns[idx], idx)}</result>"
        if not is_last:
            return text
        return text + markup.RESULTS_CLOSE + "\n\n" + self._opening(idx > self.last_asked)

    def _reply(self, idx: int) -> str:
        turn = self.turns[idx]
        calls, reasoning = turn.get("tool_calls") or [], turn.get("reasoning_content") or ""
        thought = ""
        if self.thinks and idx > self.last_asked:
            if not reasoning and not calls:
                field = f"messages[{idx}].reasoning_content"
                raise _refused(field, wanted="the reasoning of an answer in thinking mode", given="none")
            thought = reasoning + markup.THINK_CLOSE
        return thought + _text(turn, idx) + encode_calls(calls, f"messages[{idx}]") + markup.EOS


def encode_calls(calls: Sequence[Message], place: str) -> str:
    """The tool block of a reply; "" without calls.

    Args:
        calls: [{"function": {"name", "arguments"}}], arguments a JSON object as a string or as it is.
        place: names the message in errors.
    """
    if not calls:
        return ""
    blocks = []
    for i, call in enumerate(calls):
        function = call.get("function", call)
        field = f"{place}.tool_calls[{i}].function"
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _refused(f"{field}.name", wanted="a name", given=repr(function)[:60])
        arguments = _arguments(function.get("arguments", "{}"), f"{field}.arguments")
        lines = "\n".join(_parameter(name, value) for name, value in arguments.items())
        blocks.append(f'{markup.INVOKE_OPEN}{function["name"]}">\n{lines}\n{markup.INVOKE_CLOSE}')
    return f"\n\n{markup.CALLS_OPEN}\n" + "\n".join(blocks) + f"\n{markup.CALLS_CLOSE}"


def _arguments(arguments: object, field: str) -> Mapping[str, object]:
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except ValueError as error:
            raise _refused(field, wanted="a JSON object", given=f"{arguments[:60]!r} ({error})") from error
    if not isinstance(value, Mapping):
        raise _refused(field, wanted="a JSON object", given=repr(arguments)[:60])
    return value


def _parameter(name: str, value: object) -> str:
    is_text = isinstance(value, str)
    text = value if isinstance(value, str) else _json(value)
    kind = "true" if is_text else "false"
    return f'{markup.PARAMETER_OPEN}{name}" string="{kind}">{text}{markup.PARAMETER_CLOSE}'


def _attachments(turn: Message, idx: int) -> str:
    """Tools and response format of a system or developer turn."""
    text = ""
    if turn.get("tools"):
        _check_objects(turn["tools"], f"messages[{idx}].tools")
        schemas = "\n".join(_json(tool.get("function", tool)) for tool in turn["tools"])
        text += f"\n\n{markup.TOOLS_HEAD}{schemas}{markup.TOOLS_TAIL}"
    if turn.get("response_format"):
        text += f"\n\n{markup.RESPONSE_FORMAT_HEAD}{_json(turn['response_format'])}"
    return text


def _check_objects(values: object, field: str) -> None:
    if not isinstance(values, Sequence) or not all(isinstance(value, Mapping) for value in values):
        raise _refused(field, wanted="a list of objects", given=repr(values)[:60])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text(turn: Message, idx: int) -> str:
    content = turn.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise _refused(f"messages[{idx}].content", wanted="a text", given=type(content).__name__)
    return content


def _in_call_order(turns: Sequence[Message]) -> list[Message]:
    """The turns, the results of each round put in the order of its calls."""
    ordered: list[Message] = []
    calls: Sequence[Message] = ()
    for idx, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or turn.get("role") not in _ROLES:
            given = repr(turn.get("role")) if isinstance(turn, Mapping) else type(turn).__name__
            raise _refused(f"messages[{idx}].role", wanted=f"one of {', '.join(_ROLES)}", given=given)
        if turn["role"] != "tool":
            calls = (turn.get("tool_calls") or ()) if turn["role"] == "assistant" else ()
            _check_objects(calls, f"messages[{idx}].tool_calls")
            ordered.append(turn)
        elif idx == 0 or turns[idx - 1]["role"] != "tool":
            results = _round(turns, idx)
            ordered.extend(_matched(calls, results, idx))
    return ordered


def _round(turns: Sequence[Message], start: int) -> list[Message]:
    end = start
    while end < len(turns) and isinstance(turns[end], Mapping) and turns[end].get("role") == "tool":
        end += 1
    return list(turns[start:end])


def _matched(calls: Sequence[Message], results: list[Message], start: int) -> list[Message]:
    """Results by the ids of their calls; by position where no result has an id."""
    if not calls:
        field = f"messages[{start}].role"
        raise _refused(
            field, wanted="a tool result after an assistant turn with tool_calls", given="none before it"
        )
    if len(results) > len(calls):
        field = f"messages[{start + len(calls)}]"
        raise _refused(field, wanted=f"{len(calls)} results, one a call", given=f"{len(results)} results")
    if not any(result.get("tool_call_id") for result in results):
        if len(results) < len(calls):
            call_id = calls[len(results)].get("id")
            raise _refused("messages", wanted=f"a result of every call, {call_id!r} too", given="none for it")
        return results
    by_id: dict[object, list[Message]] = {}
    for i, result in enumerate(results):
        call_id = result.get("tool_call_id")
        if not any(call.get("id") == call_id for call in calls):
            known = ", ".join(repr(call.get("id")) for call in calls)
            raise _refused(
                f"messages[{start + i}].tool_call_id", wanted=f"one of {known}", given=repr(call_id)
            )
        by_id.setdefault(call_id, []).append(result)
    ordered = []
    for call in calls:
        if not by_id.get(call.get("id")):
            wanted = f"a tool message with tool_call_id {call.get('id')!r}, one for every call"
            raise _refused("messages", wanted=wanted, given="none")
        ordered.append(by_id[call.get("id")].pop(0))
    return ordered
