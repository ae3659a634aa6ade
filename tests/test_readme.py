"""What the README shows works."""

import re
from pathlib import Path

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
