import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.processing.text.edit_distance import character_error_rate, normalized_edit_distance


def edit_distance(first, second):
    return round(character_error_rate([first], [second]) * max(len(second), 1))


@pytest.mark.parametrize(
    "first, second, expected",
    [("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2), ("abc", "ac", 1)],
)
def test_edit_distance_of_known_pairs(first, second, expected):
    assert edit_distance(first, second) == expected


@given(st.text("abc", max_size=8), st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_error_rate_weighs_texts_by_their_length():
    assert character_error_rate(["abcd", "x"], ["abcd", "yz"]) == pytest.approx(2 / 6)


def test_error_rate_refuses_lists_of_different_length():
    with pytest.raises(ValueError):
        character_error_rate(["a"], ["a", "b"])


def table_distance(first, second):
    """The textbook table, cell by cell."""
    previous = list(range(len(second) + 1))
    for i, item in enumerate(first, start=1):
        current = [i]
        for j, other in enumerate(second, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (item != other)))
        previous = current
    return previous[-1]


@given(st.text("ab\U0001f600\ud800", max_size=12), st.text("ab\U0001f600\ud800", max_size=12))
def test_edit_distance_equals_the_textbook_table(first, second):
    assert edit_distance(first, second) == table_distance(first, second)


def test_normalized_distance_is_a_mean_of_shares():
    assert normalized_edit_distance(["abcd", "x", ""], ["abcd", "yz", ""]) == pytest.approx((0 + 1 + 0) / 3)
    assert normalized_edit_distance(["aaaa"], ["a"]) == 0.75, "the longer text counts: never above 1"
