"""Trains a model: python tools/train.py --config_path configs/vary/train_nano.yaml"""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Command line of the trainer. Returns the exit status, see `cli.run`."""
    from mindvlm.tools import cli

    return cli.run(train, argv)


def train(argv: list[str] | None) -> int:
    """Trains until the schedule ends; what was saved before an interruption is where the same command goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config_path", required=True, help="YAML of the training job")
    parser.add_argument("--output_dir", help="folder of state and weights instead of the config's")
    options = parser.parse_args(argv)
    # imported here: the processes that render the pictures start from this file and need no MindSpore
    from mindvlm.tools.cli import say
    from mindvlm.training.config import read_train_config
    from mindvlm.training.trainer import Trainer

    config = read_train_config(options.config_path)
    if options.output_dir:
        config.output_dir = options.output_dir
    Trainer(config, say=say).train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
