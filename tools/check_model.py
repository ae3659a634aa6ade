"""Checks everything that a run needs before anything heavy starts: `mindvlm-check --config_path vary_toy.yaml`."""

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mindvlm.core.config import kind_of_config, read_yaml
from mindvlm.core.errors import Parser, UserError
from mindvlm.core.progress import silence_progress
from mindvlm.models.registry import separate_parts
from mindvlm.tools import cli, preflight
from mindvlm.tools.preflight import FAILED, SKIPPED, WARNING, Lines, Run
from mindvlm.tools.preflight_memory import check_job_plan, check_memory, check_plan


@dataclass(frozen=True)
class Check:
    """A check: `needs` names attributes of `Run`; `look` yields status and text of its lines."""

    name: str
    needs: tuple[str, ...]
    look: Callable[[Run], Lines]


CHECKS = (
    Check("config", (), preflight.check_config),
    Check("files", ("config",), preflight.check_files),
    Check("tokenizer", ("config", "tokenizer_file"), preflight.check_tokenizer),
    Check("model", ("config",), preflight.check_model),
    Check("weights", ("checkpoint", "model_parameters"), preflight.check_weights),
    Check("device", ("config",), preflight.check_device),
    Check("dtype", ("weights", "device"), preflight.check_dtype),
    Check("memory", ("model_parameters", "device"), check_memory),
    Check("plan", ("model_parameters",), check_plan),
)
JOB_CHECKS = (
    Check("job", (), preflight.check_job),
    Check("plan", ("config",), check_job_plan),
)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mindvlm-check",
        description="Check config, files, tokenizer, weights, dtypes, device and memory of a model in seconds, before "
        "anything is loaded. For a training job, check its keys and plan its memory. Exit status 0 if it can run, 2 if "
        "not.",
    )
    parser.add_argument(
        "--config_path",
        type=os.path.expanduser,
        metavar="PATH",
        help="the model: a YAML or a checkpoint folder (default: the shipped Vary-nano); or the YAML of a training job",
    )
    for key, text in separate_parts().items():
        parser.add_argument(f"--{key}", type=os.path.expanduser, metavar="FOLDER", help=text)
    parser.add_argument("--device", choices=["auto", "cpu", "ascend"], help="instead of the one in the YAML")
    cli.add_weights_option(parser)
    parser.add_argument("--num_images", type=int, default=1, help="pictures in the prompt (default: %(default)s)")
    parser.add_argument(
        "--num_prompt_tokens", type=int, help="length of the prompt with its pictures (default: the usual question)"
    )
    parser.add_argument("--num_slots", type=int, default=1, help="rows of the plan's KV cache (default: %(default)s)")
    parser.add_argument("--max_length", type=int, help="context of the plan, instead of model.max_length")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of a training job; repeat"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `mindvlm-check`; returns the exit status."""
    return cli.run(check, argv)


def check(argv: list[str] | None) -> int:
    """Runs all checks; skips those that need the result of a failed one.

    Raises:
        UserError: at the end, if a check failed.
    """
    arguments = build_parser().parse_args(argv)
    if arguments.num_images < 0:
        raise UserError(f"--num_images is {arguments.num_images}; expected 0 or more")
    for name in ("num_prompt_tokens", "num_slots", "max_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected at least 1")
    is_job = is_training_job(arguments.config_path)
    if arguments.set and not is_job:
        raise UserError("--set changes a training job; give its YAML as --config_path")
    checks = JOB_CHECKS if is_job else CHECKS
    silence_progress()
    with contextlib.ExitStack() as opened:
        run = Run(arguments, opened)
        statuses = {one.name: run_check(one, run) for one in checks}
    failed = [name for name, found in statuses.items() if FAILED in found]
    if failed:
        raise UserError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}; the lines above say why")
    warned = [name for name, found in statuses.items() if WARNING in found]
    print("ready" + (f", with warnings: {', '.join(warned)}" if warned else ""))
    return 0


def is_training_job(path: str | None) -> bool:
    """Whether a path is the YAML of a training job."""
    if path is None or not os.path.isfile(path):
        return False
    with contextlib.suppress(UserError):
        return kind_of_config(read_yaml(Path(path))) == "a training job"
    return False


def run_check(one: Check, run: Run) -> list[str]:
    """Prints the lines of one check and returns their statuses."""
    statuses = []

    def show(status: str, text: str) -> None:
        statuses.append(status)
        print(f"{status:7}  {one.name:9}  {text}", flush=True)

    missing = [name.replace("_", " ") for name in one.needs if getattr(run, name) is None]
    if missing:
        show(SKIPPED, f"needs the {' and the '.join(missing)}")
        return statuses
    try:
        for status, text in one.look(run):
            show(status, text)
    except (UserError, OSError) as error:
        show(FAILED, str(error))
        if hasattr(error, "table"):
            print(textwrap.indent(error.table(), " " * 4), flush=True)
    return statuses


if __name__ == "__main__":
    sys.exit(main())
