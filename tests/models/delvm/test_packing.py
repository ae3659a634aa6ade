"""Packs of sentences: what each mode makes of known sentences; recorded packs are compared in `test_golden.py`."""

import numpy as np
import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.packing import PackedTokens, PackOrder, padded_rows
from mindvlm.models.delvm.token_files import TokenFile, write_token_file

LINES = [[10, 11, 0, 13, 14], [20, -21, 22], [30, 31, 32, 33, 34, 35, 36], [40]]


@pytest.fixture
def file(tmp_path):
    write_token_file(tmp_path / "a.bin", LINES)
    return TokenFile(tmp_path / "a.bin", 50)


def packed(file, mode="pack", **changes):
    packs = PackedTokens(file, 8, 4, mode=mode, min_length=2, **changes)
    packs.lines = np.array([0, 1, 2])
    packs.ends = np.cumsum(file.lengths[packs.lines])
    return packs


def test_a_sentence_is_cut_at_the_end_of_a_segment_and_of_a_pack(file):
    packs = packed(file)
    assert len(packs) == 1 and len(list(packs)) == 1  # 15 codes; 7 fill no second pack
    pack = packs[0]
    assert pack.input_ids.tolist() == [10, 11, 0, 13, 14, 20, 21, 22]
    # neither code 0 nor -21 is a target; the code after a segment of the same sentence is
    assert pack.labels.tolist() == [11, -100, 13, 14, -100, -100, 22, -100]
    assert pack.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert pack.cu_seqlens.tolist() == [0, 4, 5, 8]
    assert pack.segment_ids.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert {one.dtype for one in (pack.input_ids, pack.labels, pack.positions, pack.cu_seqlens)} == {np.dtype(np.int32)}


def test_a_sentence_continues_in_the_next_pack(file):
    packs = packed(file)
    packs.lines = np.array([2, 0, 1])
    packs.ends = np.cumsum(file.lengths[packs.lines])
    packs.pack_length = 4
    assert [pack.input_ids.tolist() for pack in packs] == [[30, 31, 32, 33], [34, 35, 36, 10], [11, 0, 13, 14]]
    assert packs[0].labels.tolist() == [31, 32, 33, 34]
    assert packs[1].labels.tolist() == [35, 36, -100, 11]
    assert packs[2].positions.tolist() == [0, 1, 2, 3]


def test_a_pack_begins_after_a_sentence_that_ends_with_the_pack_before(file):
    packs = packed(file)
    packs.pack_length = 5
    assert packs[1].input_ids.tolist() == [20, 21, 22, 30, 31]
    assert packs[1].labels.tolist() == [-100, 22, -100, 31, 32]


def test_code_0_can_be_a_target(file):
    assert packed(file, ignore_code_0=False)[0].labels.tolist() == [11, 0, 13, 14, -100, -100, 22, -100]


def test_the_mode_one_has_segments_of_one_length(file):
    pack = packed(file, "one")[0]
    assert pack.cu_seqlens.tolist() == [0, 4, 8]
    assert pack.labels.tolist() == [11, -100, 13, 14, -100, -100, 22, -100]


def test_the_mode_unpack_has_a_row_per_sentence(file):
    pack = packed(file, "unpack")[0]
    assert pack.input_ids.tolist() == [10, 11, 0, 13, 20, 21, 22, 0]
    assert pack.cu_seqlens.tolist() == [0, 4, 7, 8]
    ids, labels = pack.rows(2, 4)
    assert ids.tolist() == [[10, 11, 0, 13], [20, 21, 22, 0]]
    assert labels.tolist() == [[11, -100, 13, -100], [-100, 22, -100, 0]]


def test_short_sentences_are_left_out_and_the_order_is_that_of_numpy(file):
    packs = PackedTokens(file, 8, 4, min_length=3)
    assert packs.kept.tolist() == [0, 1, 2]
    expected = np.arange(3)
    np.random.RandomState(1024).shuffle(expected)
    assert packs.order.tolist() == expected.tolist()
    assert len(PackedTokens(file, 8, 4)) == 0


def test_rows_of_an_evaluation_are_cut_and_padded():
    ids, labels = padded_rows([np.array([1, -2, 3, 4, 5]), np.array([6, 0])], 4)
    assert ids.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert labels.tolist() == [[-100, 3, 4, -100], [-100] * 4]
    assert padded_rows([np.array([6, 0])], 4, ignore_code_0=False)[1].tolist() == [[0, -100, -100, -100]]


def test_ranks_share_each_epoch_without_overlap():
    orders = [PackOrder(11, 2, rank=rank, num_ranks=2) for rank in range(2)]
    epochs = [[np.concatenate(list(order.epoch())).tolist() for order in orders] for _ in range(2)]
    for ranks in epochs:
        assert [len(own) for own in ranks] == [4, 4] and len({*ranks[0], *ranks[1]}) == 8
    assert epochs[0] != epochs[1]


def test_batches_grow():
    sizes = [len(batch) for batch in PackOrder(12, 3, growth=(1, 1, 2)).epoch()]
    assert sizes == [1, 1, 2, 2, 3, 3]


def test_lengths_and_data_that_do_not_fit_are_refused(file):
    with pytest.raises(UserError, match="a pack has 9 codes; expected a multiple of a segment's 4"):
        PackedTokens(file, 9, 4)
    with pytest.raises(UserError, match="mode of packing is 'all'; expected one of pack, one, unpack"):
        PackedTokens(file, 8, 4, mode="all")
    with pytest.raises(UserError, match="the data fill 3 packs, but a batch has 4"):
        PackOrder(3, 2, num_ranks=2)
