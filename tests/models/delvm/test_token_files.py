"""Files of codes: what is read and written, and what is refused."""

import numpy as np
import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.token_files import TokenFile, find_token_files, join_lines, write_token_file

LINES = [[5, 0, -3], [7], [1, 2, 3, 4]]


@pytest.fixture
def path(tmp_path):
    assert write_token_file(tmp_path / "a.bin", LINES) == 3
    return tmp_path / "a.bin"


def write_index(path, rows, dtype=np.int64):
    with open(f"{path}.meta", "wb") as file:
        np.save(file, np.array(rows, dtype))


def test_the_files_are_those_of_the_original_program(path):
    assert path.read_bytes() == b'{"tokens": [5, 0, -3]}\n{"tokens": [7]}\n{"tokens": [1, 2, 3, 4]}\n'
    index = np.load(f"{path}.meta")
    assert index.tolist() == [[0, 3], [23, 1], [39, 4]] and index.dtype == np.int64


def test_lines_are_read_in_any_order(path):
    file = TokenFile(path, 8)
    assert [file[number].tolist() for number in (2, 0, 1)] == [LINES[2], LINES[0], LINES[1]]
    assert [line.tolist() for line in file] == LINES


def test_lines_are_joined_and_the_last_sentence_may_be_shorter():
    assert list(join_lines(LINES, 2)) == [[5, 0, -3, 7], [1, 2, 3, 4]]


def test_files_are_found_in_the_order_of_the_original_program(tmp_path):
    for name in ("b/x.bin", "a/z/x.bin", "a/x.bin", "z.bin", "a/x.bin.meta"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_token_files(tmp_path)]
    assert found == ["z.bin", "a/x.bin", "a/z/x.bin", "b/x.bin"]
    with pytest.raises(UserError, match=r"nowhere: no such folder; give the folder of the files of codes"):
        find_token_files(tmp_path / "nowhere")


@pytest.mark.parametrize("cut", [1, 10, 25, 30, 63])
def test_a_truncated_file_is_refused(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"a\.bin: is truncated: .* line 3 .*copy both files again"):
        TokenFile(path, 8)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 3], [23, 1]], "has 25 bytes after line 2, the last one of a.bin.meta"),
        ([[0, 3], [23, 1], [39, 4], [90, 1]], "is truncated"),
        ([[0, 3], [39, 1], [23, 4]], "its offsets do not increase"),
        ([[-1, 3], [23, 1], [39, 4]], "its offsets do not increase"),
        ([0, 3], r"holds int64 \[2\]; expected whole numbers of shape \[lines, 2\]"),
        (np.zeros((0, 2)).astype(int), "holds no lines"),
    ],
)
def test_an_index_of_another_file_is_refused(path, rows, message):
    write_index(path, rows)
    with pytest.raises(UserError, match=message):
        TokenFile(path, 8)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 3], [23, 2], [39, 4]], "line 2 has 1 codes, but a.bin.meta says 2"),
        ([[0, 3], [24, 1], [39, 4]], r"line 1 \(byte 0\) is no"),
        ([[1, 3], [23, 1], [39, 4]], r"line 1 \(byte 1\) is no"),
    ],
)
def test_a_line_that_its_index_does_not_fit_is_refused(path, rows, message):
    write_index(path, rows)
    with pytest.raises(UserError, match=message):
        list(TokenFile(path, 8))


@pytest.mark.parametrize(
    "content", [b"[1]", b'{"tokens": 1}', b'{"tokens": [1.5]}', b'{"tokens": [true]}', b"\xff\xfe"]
)
def test_a_line_of_another_content_is_refused(path, content):
    path.write_bytes(content + b"\n")
    write_index(path, [[0, 1]])
    with pytest.raises(UserError, match=r"line 1 \(byte 0\) is no"):
        TokenFile(path, 8)[0]


@pytest.mark.parametrize(("code", "is_known"), [(7, True), (8, False), (-7, True), (-8, False), (10**30, False)])
def test_codes_out_of_range_are_refused(path, code, is_known):
    path.write_text(f'{{"tokens": [1, {code}]}}\n')
    write_index(path, [[0, 2]])
    if is_known:
        assert TokenFile(path, 8)[0].tolist() == [1, code]
    else:
        with pytest.raises(UserError, match=f"line 1 has the code {code}; expected -7 to 7"):
            TokenFile(path, 8)[0]


def test_missing_and_foreign_files_are_refused(path, tmp_path):
    path.with_name("a.bin.meta").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"a\.bin\.meta: is no NumPy array"):
        TokenFile(path, 8)
    path.with_name("a.bin.meta").unlink()
    with pytest.raises(UserError, match=r"a\.bin\.meta: no such file"):
        TokenFile(path, 8)
    write_index(tmp_path / "b.bin", [[0, 1]])
    with pytest.raises(UserError, match=r"b\.bin: cannot be read"):
        TokenFile(tmp_path / "b.bin", 8)
    (tmp_path / "b.bin").touch()
    with pytest.raises(UserError, match=r"b\.bin: is truncated: it has 0 bytes"):
        TokenFile(tmp_path / "b.bin", 8)


def test_an_interrupted_write_leaves_both_files_as_they_were(path):
    before = path.read_bytes(), path.with_name("a.bin.meta").read_bytes()

    def lines():
        yield [1, 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_file(path, lines())
    assert (path.read_bytes(), path.with_name("a.bin.meta").read_bytes()) == before
    assert sorted(one.name for one in path.parent.iterdir()) == ["a.bin", "a.bin.meta"]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("c.txt", LINES, r"c\.txt: files of codes end in \.bin"),
        ("c.bin", [], "there are no lines to write"),
        ("c.bin", [[1], []], "line 2 would have no codes"),
        ("no/c.bin", LINES, "the folder .* does not exist"),
    ],
)
def test_nothing_is_written_of_unusable_lines(tmp_path, name, lines, message):
    with pytest.raises(UserError, match=message):
        write_token_file(tmp_path / name, lines)
    assert not list(tmp_path.iterdir())
