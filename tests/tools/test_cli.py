"""Behaviour that all command-line tools share."""

import argparse
import importlib
import os
import sys
import warnings

import pytest

import mindvlm.core.errors
from mindvlm.convert import conversion
from mindvlm.core.errors import UserError
from mindvlm.tools import cli, make_data, predict_llm


def failing(error: BaseException):
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("no such thing"), 2, "error: no such thing\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            PermissionError(13, "Permission denied", "x"),
            2,
            "error: [Errno 13] Permission denied: 'x'; check the path and its permissions\n",
        ),
    ],
)
def test_statuses(capsys, error, status, message):
    assert cli.run(failing(error)) == status
    assert capsys.readouterr() == ("", message)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(failing(ZeroDivisionError()))


def test_the_commands_own_status_and_arguments(capsys):
    assert cli.run(lambda argv: len(argv), ["a", "b"]) == 2
    assert capsys.readouterr() == ("", "")


def test_text_that_waits_in_the_buffer_of_a_closed_pipe(monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.run(lambda argv: print("answer") or 0) == 1


def test_only_our_own_warnings_are_shown(capsys):
    def command(argv):
        for module in (mindvlm.core.errors, make_data, conversion):
            warnings.warn_explicit("mind this", UserWarning, module.__file__, 1)
        warnings.warn_explicit("not that", UserWarning, "/mindvlm/tools/module.py", 1)
        warnings.warn_explicit("nor that", DeprecationWarning, make_data.__file__, 1)
        return 0

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.run(command) == 0
    assert capsys.readouterr().err == "warning: mind this\n" * 3


def test_yes_and_no():
    assert [cli.yes_or_no(text) for text in ("yes", "True", "1", "no", "FALSE", "0")] == [True] * 3 + [False] * 3
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe' is neither yes nor no"):
        cli.yes_or_no("maybe")


@pytest.mark.parametrize(
    "module, argv, expected",
    [
        ("predict_llm", ["--max_new_tokens", "many"], "'many'; see mindvlm-predict --help"),
        ("check_model", ["--num_images", "x"], "'x'; see mindvlm-check --help"),
        ("plot", ["run"], "--output; see mindvlm-plot --help"),
        ("show_views", ["--image", "a.png"], "--config_path, --output; see mindvlm-show-views --help"),
        ("benchmark", ["--model", "none"], "see mindvlm-benchmark --help"),
        ("make_data", ["pages", "--output", "out"], "--text; see mindvlm-make-data pages --help"),
        ("serve", ["--api_key", "secret"], "unknown option --api_key; did you mean --api_key_file?; see mindvlm-serve"),
        (
            "make_data",
            ["pages", "--text", "a", "--output", "b", "c"],
            "argument c; leave it out; see mindvlm-make-data pages --help",
        ),
        (
            "make_data",
            ["pages", "--text", "a", "--output", "b", "--num_image=9"],
            "unknown option --num_image; did you mean --num_images?; see mindvlm-make-data pages --help",
        ),
        ("train", [], "--config_path; see mindvlm-train --help"),
        ("evaluate_text", ["--seed", "-1"], "-1 is below 0; see "),
    ],
)
def test_wrong_arguments_are_one_line(capsys, module, argv, expected):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"mindvlm.tools.{module}").main(argv)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_the_help_of_make_data_names_the_command(capsys):
    with pytest.raises(SystemExit):
        make_data.main(["--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: mindvlm-make-data ") and "    mindvlm-make-data pages --text" in out
    assert "make_data" not in out


def test_the_help_of_predict_says_what_its_statuses_mean():
    text = " ".join(predict_llm.build_parser().format_help().split())
    assert "1: some of several pages failed" in text


@pytest.mark.parametrize(
    "tool", ["predict_llm", "check_model", "make_data", "plot", "show_views", "train", "convert_weight"]
)
def test_path_options_expand_the_home_folder(tool, monkeypatch):
    """A shell leaves the `~` of `--output=~/x` and of a quoted path alone."""
    monkeypatch.setenv("HOME", "/home/user")
    module = importlib.import_module(f"mindvlm.{'convert' if tool == 'convert_weight' else 'tools'}.{tool}")
    parser = module._parser() if tool == "convert_weight" else module.build_parser()
    groups = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    paths = [
        action
        for one in (parser, *(one for group in groups for one in group))
        for action in one._actions
        if action.metavar in ("PATH", "FILE", "FOLDER", "YAML", "RUN", "FILE.png", "FILE.json")
    ]
    assert paths
    for action in paths:
        assert action.type and action.type("~/x") == "/home/user/x", action.option_strings
