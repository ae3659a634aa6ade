"""Measure the character error rate of a model on freshly rendered pictures of words outside its training data.

python tools/evaluate_text.py --seed 7 --num_images 1000
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from mindvlm.core.errors import Parser
from mindvlm.tools import cli

DEFAULT_QUERY = "Provide the ocr results of this image."


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status, see `cli.run`."""
    return cli.run(evaluate, argv)


def evaluate(argv: list[str] | None) -> int:
    """Prints a summary as one JSON line; with `--show_errors`, also a line for each wrong answer."""
    options = parse_arguments(argv)
    import mindvlm
    from mindvlm.datagen.rendered_text import sample
    from mindvlm.processing.text.edit_distance import character_error_rate

    overrides = {"checkpoint": str(Path(options.checkpoint).resolve())} if options.checkpoint else {}
    if options.weights:
        overrides["weights"] = options.weights
    model = mindvlm.load(options.config_path, cache=not options.no_cache, **overrides)
    started = time.perf_counter()
    texts, references = [], []
    for first in range(0, options.num_images, options.batch_size):
        # a last batch of full size avoids another compilation
        shown = [sample(options.seed, first + row, split="evaluation") for row in range(options.batch_size)]
        answers = model.generate([options.query] * len(shown), [one.image for one in shown])
        for one, answer in list(zip(shown, answers, strict=True))[: options.num_images - first]:
            texts.append(str(answer))
            references.append(one.text)
            if options.show_errors and answer != one.text:
                print(json.dumps({"shown": one.text, "read": answer}, ensure_ascii=False))
        cli.say(
            f"{len(texts)} of {options.num_images}: character error rate {character_error_rate(texts, references):.4f}"
        )
    exact = sum(text == reference for text, reference in zip(texts, references, strict=True))
    summary = {
        "seed": options.seed,
        "num_images": len(texts),
        "character_error_rate": round(character_error_rate(texts, references), 5),
        "read_without_error": round(exact / len(texts), 4),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(summary))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config_path", type=os.path.expanduser, metavar="YAML", help="model YAML; default: the shipped Vary-nano"
    )
    parser.add_argument(
        "--checkpoint",
        type=os.path.expanduser,
        metavar="FILE",
        help="weights in place of the YAML's, such as those of a training run",
    )
    parser.add_argument("--weights", metavar="FORMAT", help="how a CPU stores weight matrices, see mindvlm-predict")
    parser.add_argument("--no_cache", action="store_true", help="read and write no cache of weights and graphs")
    parser.add_argument("--seed", type=at_least(0), default=7, help="of the pictures (default 7)")
    parser.add_argument("--num_images", type=at_least(1), default=1000, help="how many (default 1000)")
    parser.add_argument("--batch_size", type=at_least(1), default=20, help="pictures read together (default 20)")
    parser.add_argument("--query", default=DEFAULT_QUERY, help="the question (default: the usual one)")
    parser.add_argument("--show_errors", action="store_true", help="print every wrong reading as a JSON line")
    return parser.parse_args(argv)


def at_least(least: int):
    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return whole_number


if __name__ == "__main__":
    sys.exit(main())
