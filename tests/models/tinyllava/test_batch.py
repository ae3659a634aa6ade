"""TinyLLaVA's rows of different lengths with no picture, one, or several: each gets the answer it gets alone."""

import pytest

import mindvlm
from tests.tiny_batch import assert_rows_are_answers
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.tiny_vary import picture

QUERIES = ["the cup", "What is this?", "<image> and the cup <image>?", "compare"]
IMAGES = [None, picture(0), [picture(1), picture(2)], [picture(2), picture(0), picture(1)]]


@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dialect", ["llama", pytest.param("phi", marks=pytest.mark.slow)])
def test_rows_with_any_number_of_pictures(tmp_path, dialect, mode):
    model = mindvlm.load(write_tiny_tinyllava(tmp_path, dialect=dialect), mode=mode)
    assert_rows_are_answers(model, QUERIES, IMAGES)
