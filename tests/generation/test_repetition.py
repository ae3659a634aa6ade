"""Loops end an answer; repetitive pages do not."""

import itertools

import pytest

from mindvlm.core.config import GenerationConfig
from mindvlm.generation.repetition import MAX_REPEATED_TOKENS_OF_PAGES, RepeatedTail, num_repeated_tokens

TEXT = list(b"An answer that begins well:")


def byte_ids(text: str) -> list[int]:
    return list(text.encode())


def num_taken(ids, limit: int) -> int | None:
    """Number of ids after which they are a loop; None if they are not."""
    tail = RepeatedTail(limit)
    return next((number for number, token in enumerate(ids, 1) if tail.is_loop_with(token)), None)


@pytest.mark.parametrize("period", [1, 2, 7, 10])
def test_a_loop_ends_when_its_tail_has_the_length_of_the_limit(period):
    unit = list(range(65, 65 + period))
    ids = [*TEXT, *itertools.islice(itertools.cycle(unit), 100)]
    assert num_taken(ids, 40) == len(TEXT) + 40
    assert num_taken(ids[: len(TEXT) + 39], 40) is None
    # a longer limit takes longer, and the last token must fit into the loop
    assert num_taken(ids, 100) == len(TEXT) + 100
    assert num_taken([*ids[:-1], 0], 100) is None


def test_fewer_than_four_repetitions_are_no_loop():
    unit = list(range(65, 76))
    assert num_taken([*unit * 3, *unit[:10]], 40) is None
    assert num_taken(unit * 4, 40) == 44 and num_taken(unit[:10] * 4, 40) == 40


@pytest.mark.parametrize("period", [*range(1, 30), 50, 100, 150, 175, 176, 200, 250])
def test_loops_of_pages_are_found(period):
    unit = [1000 + number % 199 + 200 * (number // 199) for number in range(period)]
    expected = len(TEXT) + max(MAX_REPEATED_TOKENS_OF_PAGES, 4 * period)
    assert num_taken([*TEXT, *unit * 1000], MAX_REPEATED_TOKENS_OF_PAGES) == expected


def test_a_sequence_that_is_too_long_is_no_loop():
    assert num_taken(list(range(251)) * 20, MAX_REPEATED_TOKENS_OF_PAGES) is None
    # a longer limit finds longer ones
    assert num_taken(list(range(500)) * 20, 2000) == 2000 and num_taken(list(range(501)) * 20, 2000) is None


@pytest.mark.parametrize(
    "page",
    [
        "| 0.00 " * 40 + "|",
        ("| 0.00 " * 4 + "|\n") * 20,
        "<tr>" + "<td>0</td>" * 40 + "</tr>",
        ("0 & " * 9 + "0 \\\\\n") * 15,
        ("| " * 10 + "|\n") * 25,
        "0\n" * 100,
        "0.00\n" * 100,
        "".join(f"{number}. \n" for number in range(1, 101)),
        "".join(f"{number}. see above\n" for number in range(1, 101)),
        "".join(f"Chapter {number} {'.' * 150} {7 * number}\n" for number in range(1, 41)),
        "Name: ________ Date: ________\n" * 20,
        "-" * 300 + "\n" + "=" * 300,
        "Jane Doe\n12 Long Street\nSpringfield\n\n" * 18,
    ],
)
def test_repetitive_pages_are_no_loops(page):
    for limit in (MAX_REPEATED_TOKENS_OF_PAGES, GenerationConfig().max_repeated_tokens):
        assert num_taken([*TEXT, *byte_ids(page), *byte_ids("The sum is 0.")], limit) is None


def test_a_table_of_equal_cells_is_shorter_than_the_default_limit():
    rows, limit = byte_ids("| 0 | 0 | 0 | 0 |\n" * 50), GenerationConfig().max_repeated_tokens
    assert num_taken([*rows, *byte_ids("The sum is 0.")], limit) is None
    assert num_taken(rows * 2, limit) == limit


def test_the_number_of_repeated_tokens():
    assert num_repeated_tokens([]) == num_repeated_tokens(TEXT) == num_repeated_tokens([*[7] * 50, 8]) == 0
    assert num_repeated_tokens([7] * 4) == 4 and num_repeated_tokens([7] * 3) == 0
    assert num_repeated_tokens([*TEXT, *[1, 2, 3] * 5, 1]) == 16
