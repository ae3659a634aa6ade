"""The command line of the trainer."""

import subprocess
import sys

import pytest

from mindvlm.tools.train import main
from tests.training.small_job import write_job
from tests.training.test_trainer import ROOT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "config missing.yaml does not exist"),
        (["--set", "optimizer.learning_rat=1"], "did you mean 'learning_rate'"),
        (["--set", "optimizer"], "expected KEY=VALUE"),
        (["--set", "data.datasets=pages"], "unknown data set 'pages'"),
        (["--set", "parallel.dp=2"], "2 processes but only 1 is running"),
        (["--set", "init.weights=[absent]"], "absent"),
        (["--set", "model_changes.processor.template=v1"], "template 'v1' closes an answer with '</s>'"),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path, capsys, arguments, message):
    path = write_job(tmp_path) if arguments else "missing.yaml"
    assert main(["--config_path", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_syntax_errors_of_annotations_name_the_line(tmp_path, capsys):
    path = write_job(tmp_path)
    (tmp_path / "words.json").write_text('[\n{"conversations": []},\n{"conversations": [}\n]')
    assert main(["--config_path", str(path)]) == 2
    error = capsys.readouterr().err
    assert "words.json" in error and "line 3" in error and error.count("\n") == 1


HELP = """
import sys
from mindvlm.tools import train
try:
    train.main(["--help"])
except SystemExit:
    assert "mindspore" not in sys.modules
"""


def test_help_needs_no_mindspore():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--accept_changes" in done.stdout, done.stderr
