import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.core.errors import UserError
from mindvlm.models.registry import record_formats
from mindvlm.training.datasets.annotation_index import AnnotationIndex
from mindvlm.training.datasets.config import DatasetsConfig, sample_options
from mindvlm.training.datasets.grouping import (
    GroupedMixture,
    deal_evenly,
    group_by_length,
    group_by_modality,
    modality_length,
    record_lengths,
)
from tests.training.datasets.conftest import conversation
from tests.training.datasets.opened_loader import open_loader

FORMATS = record_formats()
permute = np.random.default_rng(0).permutation
lengths_of_both = st.lists(st.integers(-40, 40).filter(bool), min_size=1, max_size=50)


@given(lengths_of_both, st.integers(1, 4), st.integers(1, 4))
def test_an_order_has_every_sample_once(lengths, batch_size, num_shards):
    order = group_by_modality(lengths, batch_size=batch_size, num_shards=num_shards, permute=permute)
    assert sorted(order) == list(range(len(lengths)))
    sizes = list(map(abs, lengths))
    order = group_by_length(sizes, batch_size=batch_size, num_shards=num_shards, permute=permute)
    assert sorted(order) == list(range(len(lengths)))


@given(lengths_of_both, st.integers(1, 4), st.integers(1, 4))
def test_megabatches_are_of_one_kind_but_for_the_rests(lengths, batch_size, num_shards):
    size = batch_size * num_shards
    order = group_by_modality(lengths, batch_size=batch_size, num_shards=num_shards, permute=permute)
    whole = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    mixed = [batch for batch in whole if len({lengths[i] > 0 for i in batch}) > 1]
    assert mixed in ([], whole[:1])


def test_one_kind_is_grouped_by_length():
    order = group_by_modality([3, 9, 4, 8], batch_size=2, num_shards=1, permute=range)
    assert order == group_by_length([3, 9, 4, 8], batch_size=2, num_shards=1, permute=range) == [1, 0, 3, 2]


def test_a_length_of_zero_is_refused():
    with pytest.raises(UserError, match="sample 1 has the length 0"):
        group_by_modality([3, 0, -1], batch_size=1, num_shards=1, permute=range)


def test_devices_get_even_sums():
    assert deal_evenly([0, 1, 2, 3], [9, 8, 2, 1], 2) == [[0, 3], [1, 2]]
    assert deal_evenly([0, 1, 2], [9, 8, 2], 2) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("record", "length"),
    [
        (conversation("two words", "x"), -3),
        ({"messages": [{"role": "user", "content": "two words"}], "images": ["a.png"]}, 2),
        (conversation("<image>\ntwo words", "x", image="a.png"), 4),
        ([{"from": "human", "value": "hi"}], -1),
        ({"image": "a.png", "question": "", "caption": "a b c"}, 3),
        ({"conversations": []}, -1),
        ({"conversations": [1, {"from": "gpt"}]}, -1),
        ("nonsense", -1),
    ],
)
def test_length_of_a_record(record, length):
    assert modality_length(record, FORMATS["vary_tiny_600k" if "caption" in record else "llava"]) == length


def test_lengths_of_a_file(tmp_path):
    lines = [json.dumps(conversation("a b", "c")), "{", json.dumps(conversation("<image>", "c", image="a.png"))]
    (tmp_path / "a.jsonl").write_text("\n".join(['{"first": 1}', *lines]))
    assert record_lengths(AnnotationIndex(tmp_path / "a.jsonl"), FORMATS["vary"]).tolist() == [-1, -3, -1, 2]


def test_a_grouped_epoch_has_the_records_of_a_plain_one():
    lengths = [np.arange(1, 21), -np.arange(1, 11)]
    mixture = GroupedMixture(["a", "b"], [20, 10], [1.0, 0.5], seed=3, lengths=lengths, batch_size=2, num_shards=2)
    for epoch in range(3):
        places = [mixture[epoch * 25 + i] for i in range(25)]
        assert len({(place.dataset, place.record) for place in places}) == 25
        kinds = [{place.dataset for place in places[i : i + 4]} for i in range(0, 24, 4)]
        assert sum(len(kind) > 1 for kind in kinds) <= 1
    assert [mixture[i] for i in range(25)] != [mixture[25 + i] for i in range(25)]


def test_a_job_can_group(registry, make_processor):
    config = DatasetsConfig(registry=str(registry), datasets="pages+talk", batch_size=3, num_workers=0)
    config.group_by_modality = True
    loader = open_loader(config, make_processor, seed=1)
    batches = [loader.take() for _ in range(14)]
    # every placeholder is a row of a picture of 4 rows
    numbers = [(batch.sources >= batch.input_ids.size).sum() // 4 for batch in batches]
    mixed = [number for number in numbers if number not in (0, 3)]
    # a broken picture lets the next sample of its row in
    assert len(mixed) <= 4 and {*numbers} >= {0, 3}
    other = sample_options(config, make_processor, seed=1, num_shards=2).mixture
    assert other.num_shards == 2 and isinstance(other, GroupedMixture)
    assert not isinstance(sample_options(config, make_processor, seed=1, shuffle=False).mixture, GroupedMixture)
    loader.close()
