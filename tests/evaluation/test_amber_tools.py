"""AMBER's descriptions: with the tools that they need, and without."""

import json
import sys
from types import SimpleNamespace

import pytest

from mindvlm.evaluation.benchmarks import yes_no
from mindvlm.tools import evaluate
from tests.evaluation.official_folders import write_folder

nltk = pytest.importorskip("nltk")
# for words that are the same thing
VECTORS = {"sky": 1, "heaven": 1, "dog": 2, "puppy": 2}


class Word:
    """A text of spaCy's model."""

    def __init__(self, text: str):
        self.text = text

    def similarity(self, other: "Word") -> float:
        return 0.9 if VECTORS.get(self.text, 0) == VECTORS.get(other.text, 1) else 0.8


@pytest.fixture(autouse=True)
def forget_tools():
    tools = (yes_no.missing_tools, yes_no.load_language, yes_no.language_tools)
    for tool in tools:
        tool.cache_clear()
    yield
    for tool in tools:
        tool.cache_clear()


@pytest.fixture
def tools(monkeypatch):
    """Stand-ins for NLTK's data and for spaCy with its model."""
    monkeypatch.setattr(nltk, "word_tokenize", str.split)
    monkeypatch.setattr(nltk, "pos_tag", lambda words: [(word, "NN" if word.islower() else "VB") for word in words])
    lemmatizer = SimpleNamespace(lemmatize=lambda word: word.removesuffix("s"))
    monkeypatch.setattr("nltk.stem.WordNetLemmatizer", lambda: lemmatizer)
    spacy = SimpleNamespace(load=lambda name: {"en_core_web_lg": Word}[name])
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    return spacy


def score(tmp_path, description: str) -> tuple[int, dict]:
    """Scores a description and two answers, one of which is right; returns exit status and results."""
    data = write_folder("amber", tmp_path / "data")
    texts = {1: description, 2: "No", 3: "No"}
    lines = [json.dumps({"question_id": key, "text": text}) + "\n" for key, text in texts.items()]
    (tmp_path / "answers.jsonl").write_text("".join(lines))
    status = evaluate.main(["--benchmark", "amber", "--data", str(data), "--score", str(tmp_path / "answers.jsonl")])
    return status, json.loads((tmp_path / "results.json").read_text())


def test_descriptions_are_scored(tools, tmp_path):
    # the sky is there, dogs are not, "Heaven" is no noun, and "stone" is in no list
    status, results = score(tmp_path, "heavens and a puppy near dogs Heaven stone")
    figures = results["tasks"]["amber"]
    assert status == 0 and figures["generative"]["questions"] == 1
    # two nouns of the lists, one of them hallucinated
    assert figures["generative"]["chair"] == pytest.approx(50, abs=0.1)
    assert figures["generative"]["cover"] == pytest.approx(100, abs=0.1)
    assert figures["generative"]["cog"] == pytest.approx(100, abs=0.1)
    assert figures["AMBER"]["score"] == pytest.approx((100 - 50 + figures["discriminative"]["f1"]) / 2, abs=0.1)


def missing_model(name: str):
    raise OSError(f"[E050] Can't find model '{name}'.")


@pytest.mark.parametrize(
    "change, missing, remedy",
    [
        (lambda patch, spacy: patch.setitem(sys.modules, "spacy", None), "spacy", "pip install spacy"),
        (lambda patch, spacy: patch.setattr(spacy, "load", missing_model), "en_core_web_lg", "spacy download"),
        (lambda patch, spacy: patch.setitem(sys.modules, "nltk", None), "nltk", "pip install nltk"),
    ],
)
def test_without_a_tool_answers_are_still_scored(change, missing, remedy, tools, monkeypatch, tmp_path, capsys):
    change(monkeypatch, tools)
    status, results = score(tmp_path, "the sky")
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert status == 1 and "1 answer of 3 has no score: descriptions need" in warning
    assert missing in warning and remedy in warning
    figures = results["tasks"]["amber"]
    assert figures["discriminative"]["accuracy"] == pytest.approx(50, abs=0.1)
    assert not figures.keys() & {"generative", "AMBER"}
    assert len(json.loads((tmp_path / "amber_responses.json").read_text())) == 3


def test_data_of_nltk_are_named_one_by_one(tools, monkeypatch):
    def lacks_data(words):
        raise LookupError("averaged_perceptron_tagger_eng")

    monkeypatch.setattr(nltk, "pos_tag", lacks_data)
    assert yes_no.missing_tools() == (
        "descriptions need NLTK's averaged_perceptron_tagger_eng "
        "(python -m nltk.downloader averaged_perceptron_tagger_eng)"
    )
