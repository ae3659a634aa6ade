"""Runs VLMEvalKit on a model: `mindvlm-vlmevalkit --config_path YAML -- --data MMBench_DEV_EN`."""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from mindvlm.core.errors import Parser, UserError
from mindvlm.tools import cli
from mindvlm.tools.evaluate import add_runtime_options, runtime_overrides

# options of VLMEvalKit that name the model, which this command does
OWN = ("--model", "--config", "--base-url", "--api-mode")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the options before `--`."""
    parser = Parser(
        prog="mindvlm-vlmevalkit",
        usage="mindvlm-vlmevalkit [options] -- [options of VLMEvalKit's run.py]",
        description="Evaluate a model with VLMEvalKit, which reads the options behind --, such as --data and "
        "--work-dir. It needs the package ms-vlmeval. Exit status 0: everything was answered and scored; 1: some was "
        "not; 2: nothing could be done.",
    )
    parser.add_argument(
        "--config_path", type=os.path.expanduser, metavar="PATH", help="the model: a YAML or a checkpoint folder"
    )
    parser.add_argument("--name", help="of the model in VLMEvalKit's results (default: mindvlm- and that of the YAML)")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="of an answer (default: that of the YAML)")
    add_runtime_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `mindvlm-vlmevalkit`; returns the exit status."""
    return cli.run(evaluate, argv)


def evaluate(argv: list[str] | None) -> int:
    given = sys.argv[1:] if argv is None else argv
    place = given.index("--") if "--" in given else len(given)
    arguments, rest = build_parser().parse_args(given[:place]), given[place + 1 :]
    if not arguments.config_path:
        raise UserError("--config_path is missing; give a YAML or a checkpoint folder")
    if "--data" not in rest:
        raise UserError("-- --data is missing; name benchmarks of VLMEvalKit behind --, such as -- --data POPE")
    if taken := next((option for option in rest if option.split("=")[0] in OWN), None):
        raise UserError(f"{taken} behind --: this command chooses the model; give --config_path before -- instead")
    if find_spec("vlmeval") is None:
        raise UserError(
            "VLMEvalKit is not installed; in an environment of its own, run: pip install ms-vlmeval 'pyarrow<26'"
        )
    cli.import_library()
    import mindvlm

    model = mindvlm.load(arguments.config_path, **runtime_overrides(arguments))
    if not hasattr(model, "chat"):
        raise UserError(f"{arguments.config_path} generates pictures; choose a model that answers with text")
    import vlmeval.run
    from vlmeval.config import supported_VLM
    from vlmeval.smp import collect_run_benchmark_report

    from mindvlm.evaluation.frameworks.vlmevalkit_model import VlmEvalKitModel

    name = arguments.name or f"mindvlm-{model.config.name}"
    supported_VLM[name] = lambda **options: VlmEvalKitModel(model, arguments.max_new_tokens)
    sys.argv = ["run.py", "--model", name, *rest]
    vlmeval.run.main()
    options = vlmeval.run.parse_args()
    folder = Path(os.environ.get("MMEVAL_ROOT", options.work_dir)) / name
    rows = collect_run_benchmark_report(folder)
    return report([row for row in rows if row["benchmark"] in options.data])


def report(rows: list[dict]) -> int:
    """Prints what VLMEvalKit could not answer or score, which its own exit status hides; returns the exit status.

    Args:
        rows: its report, one row for each benchmark.
    """
    found = []
    for row in rows:
        name = row["benchmark"]
        for key, what in (("infer", "answered"), ("judge", "judged")):
            if row[f"{key}_failed"]:
                found.append(f"{name}: {row[f'{key}_failed']} of {row[f'{key}_total']} could not be {what}")
        if cause := row["eval_error"] or row["skip_reason"]:
            found.append(f"{name} has no score: {cause}")
    for line in found:
        cli.say(f"warning: {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
