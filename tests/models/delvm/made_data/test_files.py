"""Files of folders, tar files and LMDBs, and the errors of damaged ones."""

import gzip

import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.delvm.made_data.files import find_entries, natural_order, open_picture
from mindvlm.processing.samples.public_data import Unusable
from tests.models.delvm.made_data.tiny_downloads import COLOURS, png, write_files, write_lmdb, write_tar

FILES = {"b/10.PNG": b"one", "b/2.png": b"two", "a.json": b"{}", "b/c/x.y.jpg": b"four"}


def found(*sources):
    return {entry.name + entry.suffix: entry.read() for entry in find_entries([str(source) for source in sources])}


def test_folders_and_tar_files_hold_the_same_files(tmp_path):
    folder = write_files(tmp_path / "f", FILES | {".hidden/a.png": b"", "b/._a.png": b""})
    expected = {"a.json": b"{}", "b/10.png": b"one", "b/2.png": b"two", "b/c/x.y.jpg": b"four"}
    assert found(folder) == expected and list(found(folder)) == list(expected)
    archive = write_tar(tmp_path / "f.tar", FILES | {"b/._a.png": b""})
    assert found(archive) == expected and list(found(archive)) == [name.lower() for name in FILES]
    # in a folder, and among several sources, a tar file counts as a folder
    write_tar(folder / "b/t.tar", {"./z.jpg": b"five"})
    assert found(folder) == expected | {"b/t/z.jpg": b"five"}
    assert found(write_tar(tmp_path / "odd.tar", FILES | {".": b"", "": b""})) == expected
    assert found(archive, folder / "b/t.tar") == {f"f/{name}": content for name, content in expected.items()} | {
        "t/z.jpg": b"five"
    }


@pytest.mark.parametrize("size", [0, 100, 512, 1000, 2048, 2500, 3000, 3072, 3200, 3500])
def test_a_truncated_tar_file_is_refused(tmp_path, size):
    path = write_tar(tmp_path / "a.tar", {f"{number}.png": bytes(700) for number in range(2)})
    whole = path.read_bytes()
    assert len(found(path)) == 2
    path.write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"a\.tar: is truncated or no uncompressed tar file .*; download it again"):
        found(path)


def test_other_sources_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(write_tar(path, FILES).read_bytes()))
    for source, message in ((path, "no uncompressed tar file"), (tmp_path / "none", "neither a folder nor a .tar")):
        with pytest.raises(UserError, match=message):
            found(source)
    with pytest.raises(UserError, match="a file outside|or one outside"):
        found(write_tar(path, {"../a.png": b""}))


def test_lmdbs_are_read_by_their_list(tmp_path, monkeypatch):
    pytest.importorskip("lmdb")
    write_lmdb(tmp_path / "in.lmdb", {"2.png": png(COLOURS[0]), "10.png": b"two"}, ["10.png", "2.png", "3.png"])
    entries = find_entries([str(tmp_path)])
    assert [entry.name for entry in entries] == ["in.lmdb/10", "in.lmdb/2", "in.lmdb/3"]
    assert entries[0].read() == b"two" and open_picture(entries[1].read).size == (40, 30)
    with pytest.raises(Unusable, match="not in the LMDB"):
        entries[2].read()
    (tmp_path / "in.lmdb/meta_info.txt").unlink()
    with pytest.raises(UserError, match=r"meta_info\.txt: cannot be read"):
        find_entries([str(tmp_path)])
    write_files(tmp_path / "in.lmdb", {"meta_info.txt": b"", "data.mdb": b"damaged"})
    with pytest.raises(UserError, match=r"in\.lmdb: is no readable LMDB \(.*; copy it again"):
        find_entries([str(tmp_path)])
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(UserError, match=r"in\.lmdb: an LMDB, which needs the package lmdb; run: pip install lmdb"):
        find_entries([str(tmp_path)])


def test_numbers_in_names_are_ordered_as_numbers():
    names = ["f10", "f9", "f09b", "f1/10", "f1/9", "a", "10", "9"]
    assert sorted(names, key=natural_order) == ["9", "10", "a", "f1/9", "f1/10", "f09b", "f9", "f10"]
