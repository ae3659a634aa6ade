"""A tiny run, pictures, and the predict tool in this process."""

import pytest

import mindvlm
from mindvlm.tools import predict_llm
from tests.tiny_vary import picture, tiny_model, write_tiny_vary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_tiny_vary(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    """Three pictures, the second of them broken."""
    folder = tmp_path / "pages"
    folder.mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.JPG")):
        picture(i).save(folder / name)
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def loaded(monkeypatch):
    """Lets the tool use the shared model, and records how it asked for it."""
    calls = []
    # what its loading says is no output of the first test
    tiny_model()
    monkeypatch.setattr("mindvlm.tools.read_pages.identity", lambda config, family: "tiny@0")

    def load(config_path=None, **options):
        calls.append((config_path, options))
        return tiny_model()

    monkeypatch.setattr(mindvlm, "load", load)
    return calls


@pytest.fixture
def run(capsys):
    def run_main(*argv) -> tuple[int, str, str]:
        status = predict_llm.main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return run_main
