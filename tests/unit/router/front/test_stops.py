"""Stop strings end a text at the same place however it is cut, and nothing behind it was shown."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.front.stops import StopFilter

TEXT = st.text("ab#", max_size=24)
STOPS = st.lists(st.text("ab#", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


def shown(stops, pieces):
    """What comes out at each piece, and at the end."""
    stop_filter = StopFilter(stops)
    return [*(stop_filter.push(piece) for piece in pieces), stop_filter.finish()], stop_filter.is_over


def plain_end(text, stops):
    """The plain reference: grow the text until it ends with a stop string; the longest one goes."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end - max(map(len, ending))
    return None


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 24), max_size=6))
def test_text_ends_where_the_reference_says_however_it_is_cut(text, stops, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces, is_over = shown(stops, [text[begin:end] for begin, end in itertools.pairwise(edges)])
    end = plain_end(text, stops)
    assert is_over == (end is not None)
    assert "".join(pieces) == text[:end]


@given(text=TEXT, stops=STOPS)
def test_nothing_of_a_stop_string_is_ever_shown_early(text, stops):
    """Whatever follows: the text so far plus a stop string must not end before what was shown."""
    stop_filter = StopFilter(stops)
    so_far = ""
    for idx, character in enumerate(text):
        so_far += stop_filter.push(character)
        if stop_filter.is_over:
            break
        for stop in stops:
            end = plain_end(text[: idx + 1] + stop, stops)
            assert len(so_far) <= end


@pytest.mark.parametrize(
    ("stops", "pieces", "out"),
    [
        (("###",), ["a#", "#b", "##", "#c"], ["a", "##b", "", "", ""]),
        (("END",), ["the E", "N", "d"], ["the ", "", "ENd", ""]),
        (("END",), ["the EN"], ["the ", "EN"]),
        (("abc", "b"), ["abc"], ["a", ""]),
        (("bc", "abc"), ["xabc"], ["x", ""]),
        (("\n\n",), ["a\n", "\nb\n\nc"], ["a", "", ""]),
        ((), ["a", "b"], ["a", "b", ""]),
    ],
    ids=str,
)
def test_examples(stops, pieces, out):
    assert shown(stops, pieces)[0] == out


def test_stop_string_that_may_not_count_yet_is_text():
    stop_filter = StopFilter(("ab", "abcd"))
    assert stop_filter.push("xab", may_stop=False) == "x"
    assert stop_filter.push("ce") == "abce"
    assert stop_filter.push("ab") == ""
    assert stop_filter.is_over


def test_stop_string_may_begin_before_it_may_count():
    stop_filter = StopFilter(("ab",))
    assert stop_filter.push("xa", may_stop=False) == "x"
    assert stop_filter.push("b") == ""
    assert stop_filter.is_over
