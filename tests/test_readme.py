"""What README and docs show works."""

import re
from pathlib import Path

import mindvlm
from mindvlm.api import load as load_model
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.tiny_vary import picture

ROOT = Path(__file__).resolve().parents[1]


def code_blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_quick_start_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (quick_start,) = code_blocks("README.md", "python")

    exec(compile(quick_start, "README.md", "exec"), {})

    *read, measures = capsys.readouterr().out.splitlines()
    assert read == ["Hello, MindSpore!", "It is 9:45."] * 2
    assert re.fullmatch(r"stop_token [1-9]\d* tokens/s", measures)


def test_the_quick_start_of_tinyllava_runs(monkeypatch, capsys, tmp_path):
    """With random weights and answers of two tokens."""
    write_tiny_tinyllava(tmp_path).rename(tmp_path / "TinyLLaVA-1.5B")
    for number, name in enumerate(("ironing.jpg", "waterview.jpg")):
        picture(number).save(tmp_path / name)
    loaded, encoded = [], []

    def load(folder):
        model = load_model(folder, mode="pynative")
        model.config.generation.max_new_tokens = 2
        encode = model.engine.encode_images
        monkeypatch.setattr(model.engine, "encode_images", lambda *pixels: encoded.append(pixels) or encode(*pixels))
        loaded.append(model)
        return model

    monkeypatch.setattr(mindvlm, "load", load)
    monkeypatch.chdir(tmp_path)
    (quick_start,) = code_blocks("docs/tinyllava.md", "python")

    exec(compile(quick_start, "docs/tinyllava.md", "exec"), {})

    assert len(loaded) == 1 and len(encoded) == 2
    assert capsys.readouterr().out.count(" max_new_tokens\n") == 3


def test_both_languages_show_the_same_code_and_figures():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md"))

    assert code_blocks("README.md", "python") == code_blocks("README_CN.md", "python")
    assert re.findall(r"\d+\.\d+ ?%", english) == re.findall(r"\d+\.\d+ ?%", chinese)
    assert re.findall(r"^ {4}(m\S+.*?)(?: {2,}|$)", english, flags=re.M) == re.findall(
        r"^ {4}(m\S+.*?)(?: {2,}|$)", chinese, flags=re.M
    )


def test_linked_files_exist():
    for name in ("README.md", "README_CN.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))):
        page = ROOT / name
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name} links to {target}"
