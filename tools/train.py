"""Trains a model: python tools/train.py --config_path configs/vary/train_nano.yaml"""

import argparse
import os
import sys

from mindvlm.core.errors import Parser
from mindvlm.core.interruption import uninterrupted


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mindvlm-train",
        description="Train a model. Running the same command again resumes from the newest checkpoint in output_dir.",
    )
    parser.add_argument(
        "--config_path", type=os.path.expanduser, required=True, metavar="YAML", help="the training job"
    )
    parser.add_argument(
        "--output_dir",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="for checkpoints and logs, instead of the config's",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, such as parallel.dp=8 or data.lengths=[64,128]; may be repeated",
    )
    parser.add_argument(
        "--accept_changes", action="store_true", help="resume from a checkpoint although the config has changed"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line of the trainer. Returns the exit status, see `cli.run`."""
    from mindvlm.tools import cli

    return cli.run(train, argv)


def train(argv: list[str] | None) -> int:
    """Trains until the schedule ends; the same command resumes from the last checkpoint after an interruption."""
    options = build_parser().parse_args(argv)
    # imported here: the processes that make samples start from this file and need no MindSpore
    from mindvlm.training.job_file import parse_overrides, read_job

    overrides = parse_overrides(options.set)
    if options.output_dir:
        overrides["output_dir"] = options.output_dir
    job = read_job(options.config_path, overrides)

    # MindSpore ends the process with a traceback when its import is interrupted
    with uninterrupted():
        from mindvlm.training.trainer import Trainer

    Trainer(job, accept_changes=options.accept_changes).train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
