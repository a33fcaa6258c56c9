"""The turns of a chat: what is asked next, and what a failed question leaves behind."""

from cluster.chat.conversation import Conversation
from router.front.chat.parsing import Reply, parse_reply

CALLS = (
    'r</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="g">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)


def reply(text: str) -> Reply:
    return parse_reply(text, thinking_mode="thinking")


def test_results_go_back_in_the_order_of_the_calls():
    chat = Conversation(thinking_mode="thinking")
    chat.ask("?")
    first, second = chat.take(reply(CALLS))
    assert (first.name, second.name) == ("f", "g")
    chat.add_result(second, "two")
    chat.add_result(first, "one")
    assert "<result>one</result>\n<result>two</result>" in chat.prompt()


def test_answer_ends_the_question_and_the_next_one_sees_it_without_its_reasoning():
    chat = Conversation(thinking_mode="thinking", system="S")
    chat.ask("a?")
    assert chat.take(reply("because</think>A.")) == []
    chat.ask("b?")
    assert "A." in chat.prompt()
    assert "because" not in chat.prompt()


def test_forgotten_question_leaves_no_trace():
    chat = Conversation(thinking_mode="thinking")
    chat.ask("a?")
    chat.take(reply("r</think>A."))
    before = chat.messages
    chat.ask("b?")
    chat.take(reply(CALLS))
    chat.forget_question()
    assert chat.messages == before


def test_reply_cut_in_its_reasoning_does_not_spoil_the_next_question():
    chat = Conversation(thinking_mode="thinking")
    chat.ask("a?")
    assert chat.take(reply("")) == []
    chat.ask("b?")
    assert chat.prompt().endswith("b?<｜Assistant｜><think>")
