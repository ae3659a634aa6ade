import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.core.errors import UserError
from mindvlm.training.datasets import json_records
from mindvlm.training.datasets.annotation_index import AnnotationIndex

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
records = st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=3), min_size=1, max_size=12)


@given(
    records,
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.sampled_from(["list", "lines", "lines, CRLF", "list with mark"]),
    st.integers(1, 40),
)
def test_every_record_is_read_back(values, indent, ascii_only, layout, chunk):
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(json_records, "CHUNK_BYTES", chunk):
        if layout.startswith("lines"):
            path = Path(folder) / "a b.jsonl"
            newline = "\r\n" if "CRLF" in layout else "\n"
            text = newline.join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
        else:
            path = Path(folder) / "文.json"
            text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
        mark = b"\xef\xbb\xbf" if "mark" in layout else b""
        path.write_bytes(mark + text.encode("utf-8", "surrogatepass"))
        index = AnnotationIndex(path)
        assert [index.read(i) for i in range(len(index))] == values
        lines = (mark.decode() + text).encode("utf-8", "surrogatepass").split(b"\n")
        for i in range(len(index)):
            assert lines[index.place(i).line - 1].lstrip(b"\xef\xbb\xbf [,").startswith((b"{",)), "line of the record"
        index.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', r"bad.json, line 3: not JSON \(Expecting value\)"),
        ('[\n{"a": 1}\n{"a": 2}\n]', "line 3: expected ',' or '\\]' after a record, found '{"),
        ('[{"a": 1},\n\n 5]', "line 3: expected a record {...}, found '5]"),
        ('[{"a": 1},\n]', "line 2: expected a record"),
        ('[{"a": 1},\n{"a": "x', "line 2: not JSON .Unterminated string"),
        ('[{"a": 1}', "line 1: expected ',' or"),
        ('[{"a": 1}]\n more', "line 2: more text after the end of the list, found 'more'"),
        ('"text"', "line 1: expected a list of records"),
        ("", "line 1: expected a list of records"),
        ("[]", "has no records"),
        ('{\n "a": 1\n}', "line 1: not JSON by itself; write one record a line, or all of them as one list"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"a": "\xff"}]', "line 1: not UTF-8"),
        ('[{"a": 1},\n{"b": "é\n', "line 2: not JSON"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1") if "\xff" in text else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        AnnotationIndex(path)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) in (["bad.json"], [".bad.json.index", "bad.json"])


def test_an_error_in_the_middle_is_found_without_reading_on(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + '{"a": 1},\n' * 1000 + '{"a" 1},\n' + '{"a": 1},\n' * 1_000_000 + "{}]")
    with pytest.raises(UserError, match=r"line 1001: not JSON \(Expecting ':' delimiter\)"):
        AnnotationIndex(path)


def test_a_broken_line_is_an_error_of_that_record_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n{"a": 3}\n')
    index = AnnotationIndex(path)
    assert len(index) == 3 and index.read(2) == {"a": 3} and index.place(1).line == 3
    with pytest.raises(UserError, match="not JSON .Expecting value at column 6"):
        index.read(1)


def test_joined_files_have_a_byte_order_mark_at_each_joint(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(2 * (b"\xef\xbb\xbf" + b'{"a": 1}\n{"a": 2}\n'))
    index = AnnotationIndex(tmp_path / "a.jsonl")
    assert [index.read(number)["a"] for number in range(4)] == [1, 2, 1, 2]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_utf_16_is_named(tmp_path, name):
    (tmp_path / name).write_text('[{"a": 1}]', encoding="utf-16")
    with pytest.raises(UserError, match=f"{name}: is UTF-16; save the file as UTF-8"):
        AnnotationIndex(tmp_path / name)


def test_the_index_is_written_once_and_again_after_a_change(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}]')
    first = AnnotationIndex(path)
    written = first.path.stat().st_mtime_ns
    assert AnnotationIndex(path).path.stat().st_mtime_ns == written
    path.write_text('[{"a": 1}, {"a": 2}]')
    assert len(AnnotationIndex(path)) == 2
    path.write_text('[{"b": 1}, {"b": 2}]')
    os.utime(path, ns=(1, 1))
    assert AnnotationIndex(path).read(1) == {"b": 2}


def test_a_damaged_index_is_written_again(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}]')
    index = AnnotationIndex(path).path
    for damage in (b"", index.read_bytes()[:-3], b"x" * 300):
        index.write_bytes(damage)
        assert AnnotationIndex(path).read(0) == {"a": 1}


def test_the_index_goes_where_it_can(tmp_path, monkeypatch):
    path = tmp_path / "data" / "a.json"
    path.parent.mkdir()
    path.write_text('[{"a": 1}]')
    assert AnnotationIndex(path, folder=tmp_path / "new" / "indexes").path.parent == tmp_path / "new" / "indexes"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != path.parent)
    assert AnnotationIndex(path).path.parent == tmp_path / "cache" / "mindvlm"
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    (tmp_path / "cache" / "mindvlm").joinpath(AnnotationIndex(path).path.name).unlink()
    with pytest.raises(UserError, match="no place for its index .*; set data.index_folder"):
        AnnotationIndex(path)


def test_a_file_that_changes_under_way_is_said(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2}]')
    index = AnnotationIndex(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="has changed since it was opened"):
        index.read(1)


MEASURE = """
import resource, sys
from mindvlm.training.datasets.annotation_index import AnnotationIndex
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
index = AnnotationIndex(sys.argv[1])
assert index.read(len(index) - 1) == {"number": len(index) - 1, "text": "文字 " * 60}, "last record"
print(len(index), peak() - before)
"""


def test_a_file_of_200_megabytes_is_indexed_within_100_of_memory(tmp_path):
    path = tmp_path / "large.json"
    with open(path, "w", encoding="utf-8") as file:
        text = json.dumps("文字 " * 60, ensure_ascii=False)
        block = ",\n".join(f'{{"number": %d, "text": {text}}}' for _ in range(1000))
        for start in range(0, 450_000, 1000):
            file.write((",\n" if start else "[") + block % tuple(range(start, start + 1000)))
        file.write("]")
    assert path.stat().st_size > 200e6
    command = [sys.executable, "-c", MEASURE, str(path)]
    num_records, growth = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert num_records == 450_000
    assert growth < 100, f"{growth} MiB"
