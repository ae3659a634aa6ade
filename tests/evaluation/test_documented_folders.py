"""The smallest files in docs/evaluation.md are a folder that each benchmark reads."""

import base64
import json
import pickle
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import pytest

from mindvlm.evaluation.benchmarks import benchmarks, get_benchmark
from mindvlm.tools.evaluate import build_parser
from tests.evaluation.official_folders import encoded_picture

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
BLOCK = (ROOT / "docs" / "evaluation.md").read_text().split("<!-- examples:")[1].split("```text\n")[1].split("```")[0]
for line in BLOCK.splitlines():
    name, path, content = line.split(" ", 2)
    EXAMPLES[name][path].append(content)


def write(file: Path, contents: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".p":
        file.write_bytes(pickle.dumps(json.loads(contents[0])))
    elif file.suffix == ".tsv":
        rows = json.loads(contents[0].replace("BASE64", base64.b64encode(encoded_picture()).decode()))
        lines = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
        file.write_text("".join("\t".join(line) + "\n" for line in lines))
    elif file.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        rows = json.loads(contents[0])
        for row in rows:
            row["image_1"]["bytes"] = encoded_picture()
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(f"{content}\n" for content in contents))


def test_every_benchmark_of_published_questions_has_an_example():
    drawn = {name for name in benchmarks() if name.startswith("delvm") or name == "scenes"}
    assert EXAMPLES.keys() == benchmarks().keys() - drawn


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_benchmark_reads_and_scores_its_example(name, tmp_path):
    for path, contents in EXAMPLES[name].items():
        write(tmp_path / "data" / path, contents)
    arguments: Namespace = build_parser(name).parse_args(["--benchmark", name, "--score", "x"])
    questions = get_benchmark(name).open(tmp_path / "data", arguments)
    answers = dict(
        questions.parse({"question_id": one.id, **one.written, "prompt": one.prompt, "text": "A"})
        for one in questions.questions.values()
    )
    assert list(answers) == questions.ids and answers
    (tmp_path / "output").mkdir()
    scores = questions.score(answers, tmp_path, tmp_path / "output")
    assert scores.tables or scores.files or scores.notes
