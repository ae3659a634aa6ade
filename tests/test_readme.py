"""The code, paths, options and links in README and docs work."""

import pkgutil
import re
from pathlib import Path

import pytest

import mindvlm
from mindvlm.api import load as load_model
from mindvlm.evaluation.benchmarks import benchmarks
from mindvlm.models.registry import made_data
from tests.tiny_tinyllava import write_tiny_tinyllava
from tests.tiny_vary import picture

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "README_CN.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
# the user lists data sets in these
WRITTEN_BY_USERS = {"configs/slime/data", "configs/vary/datasets.yaml", "configs/tinyllava/datasets.yaml"}
MSRUN_OPTIONS = {
    *("--worker_num", "--local_worker_num", "--join", "--log_dir", "--node_rank"),
    *("--master_addr", "--master_port", "--cluster_time_out", "--rank_table_file"),
}
# of pip, tar, lmms-eval, VLMEvalKit and the load test of the server
OTHER_OPTIONS = {
    *("--no", "--strip", "--force_simple", "--model_args", "--output_path", "--base", "--key", "--max"),
    *("--images", "--local", "--max_tokens", "--pid", "--soak"),
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
    """Runs with random weights and answers of two tokens."""
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


def test_the_example_document_is_read():
    pytest.importorskip("pypdfium2")
    (code,) = code_blocks("docs/documents.md", "py")
    path = re.search(r'read_document\("(.+?)"', code)[1]
    texts = [page.text for page in load_model(mode="pynative").read_document(ROOT / path)]
    assert texts == ["Invoice No. 4821\nDue: 12 May", "Total: 48.50\nPaid by card."]
    shown = "\n".join(f"{path}, page {number}: {text}" for number, text in enumerate(texts, 1))
    assert "\n" + "".join(f"    {line}\n" for line in shown.splitlines()) in text_of("docs/documents.md")


def test_both_languages_show_the_same_code_and_figures():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md"))

    assert code_blocks("README.md", "python") == code_blocks("README_CN.md", "python")
    assert re.findall(r"\d+\.\d+ ?%", english) == re.findall(r"\d+\.\d+ ?%", chinese)
    assert re.findall(r"^ {4}(m\S+.*?)(?: {2,}|$)", english, flags=re.M) == re.findall(
        r"^ {4}(m\S+.*?)(?: {2,}|$)", chinese, flags=re.M
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text_of(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    text = text_of(page)
    named = re.findall(r"(?<![\w/.>])(?:mindvlm|convert|tools|configs|examples|tests|docs)/[\w./-]*", text)
    missing = {name for name in named if not name.endswith(".safetensors") and not (ROOT / name).exists()}
    assert not missing - WRITTEN_BY_USERS, page

    for name, file in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text):
        assert re.search(rf"\b{name}\b", text_of(file)), f"{page}: {name} is not in {file}"

    for job in re.findall(r"\btrain_\w+\.yaml", text):
        assert list(ROOT.glob(f"configs/*/{job}")), f"{page}: {job} is in no folder of configs"
    for name in re.findall(r"`(mindvlm(?:\.\w+)+)", text):
        pkgutil.resolve_name(name)


def documented_options(text: str) -> set[tuple[str, str]]:
    """Returns the pairs of command and option in the commands of a page; other options have the command ""."""
    pairs = set()
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = line.replace("tools/train.py", "mindvlm-train")
        before, *commands = re.split(r"(?<![\w-])(?=mindvlm-|msrun)", line)
        for part in ("", before), *(re.match(r"([\w-]+)(.*)", command).groups() for command in commands):
            pairs |= {(part[0], option) for option in re.findall(r"(?<![\w-])--\w+", part[1])}
    return pairs


def test_documented_options_exist(capsys):
    options = {}
    for name, function in re.findall(r'^(mindvlm-[\w-]+) = "(.+)"', text_of("pyproject.toml"), re.MULTILINE):
        made = [[f"{family}-{kind}"] for family, kind in made_data()]
        kinds = {
            "mindvlm-make-data": (["pages"], ["charts"], ["scenes"], ["benchmark"], ["slime-arxivqa"], *made),
            "mindvlm-evaluate": [["--benchmark", benchmark] for benchmark in benchmarks()],
        }
        for words in kinds.get(name, ([],)):
            with pytest.raises(SystemExit):
                pkgutil.resolve_name(function)([*words, "--help"])
        options[name] = set(re.findall(r"--\w+", capsys.readouterr().out))

    for page in PAGES:
        for command, option in documented_options(text_of(page)):
            known = options.get(command, set().union(*options.values(), MSRUN_OPTIONS, OTHER_OPTIONS))
            assert option in known, f"{page}: {command} {option}"
