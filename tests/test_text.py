"""Text that grows token by token, and the strings that end it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.text import IncrementalText, find_stop, held_back


def from_bytes(ids):
    """A tokenizer with a token a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def grow(decode, ids, final=True):
    """Pieces, a token at a time."""
    text = IncrementalText(decode)
    pieces = [text.update(ids[: n + 1], final=final and n == len(ids) - 1) for n in range(len(ids))]
    assert text.text == "".join(pieces)
    return pieces


def test_a_character_comes_when_its_bytes_are_there():
    pieces = grow(from_bytes, list("aé€😀b".encode()))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]


def test_what_is_held_back_comes_at_the_end():
    ids = list("a€".encode())[:-1]
    assert grow(from_bytes, ids)[-1] == "\ufffd" and grow(from_bytes, ids, final=False)[-1] == ""


def test_bytes_that_never_make_a_character_do_not_stop_the_text():
    assert "".join(grow(from_bytes, [0x61, 0xFF, 0x62, 0x63])) == "a\ufffdbc"


def test_several_tokens_at_once():
    text = IncrementalText(from_bytes)
    assert text.update(list(b"hello")) == "hello" and text.update(list(b"hello")) == ""
    assert text.update(list(b"hello you")) == " you" and text.text == "hello you"


def test_tokens_whose_text_depends_on_the_one_before():
    """As sentencepiece does: the first word of a text loses its space."""
    words = ["\u2581the", "\u2581cat", "s", "\u2581sat"]
    pieces = grow(lambda ids: "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" "), [0, 1, 2, 3])
    assert "".join(pieces) == "the cats sat"


def test_tokens_without_text():
    pieces = grow(lambda ids: "".join(chr(i) for i in ids if i > 31), [1, 65, 2, 66, 3])
    assert pieces == ["", "A", "", "B", ""]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_pieces_join_to_the_text(text):
    ids = list(text.encode("utf-8", errors="ignore"))
    assert "".join(grow(from_bytes, ids)) == from_bytes(ids)


@pytest.mark.parametrize(
    ("text", "added", "stops", "found"),
    [
        ("hello", 5, ("ll",), ("ll", 2)),
        ("hello", 1, ("ll",), None),
        ("hello", 2, ("ll",), ("ll", 2)),
        ("hello", 2, ("o", "ll"), ("ll", 2)),
        ("hello", 3, ("lo", "l", "o"), ("l", 2)),
        ("hello", 5, ("x", "hello!"), None),
        ("aaa", 1, ("aa",), ("aa", 1)),
        ("", 0, ("a",), None),
        ("ab", 1, ("ab", "b"), ("ab", 0)),
    ],
)
def test_find_stop(text, added, stops, found):
    assert find_stop(text, added, stops) == found


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=10), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stops_are_found_as_early_as_in_the_whole_text(text, stops):
    """Fed a character at a time, the first prefix that holds a stop string is the one that reports it."""
    for n in range(1, len(text) + 1):
        found, whole = find_stop(text[:n], 1, stops), [(text[:n].find(s), s) for s in stops if s in text[:n]]
        assert (found is None) == (not whole)
        if found is not None:
            assert found[1] == min(at for at, _ in whole) and text.startswith(found[0], found[1])
            break


@pytest.mark.parametrize(
    ("text", "stops", "held"),
    [
        ("hello", ("lo!",), 2),
        ("hello", ("x",), 0),
        ("hello", ("oh", "llow"), 3),
        ("hello", (), 0),
        ("aa", ("aaaa",), 2),
        ("ab", ("b",), 0),
        ("", ("b",), 0),
    ],
)
def test_what_may_become_a_stop_string(text, stops, held):
    assert held_back(text, stops) == held
