"""Convert a PyTorch, Hugging Face or MindOCR checkpoint to native names and file formats, or back.

    mindvlm-convert --torch_ckpt_path vary-toy/ --mindspore_ckpt_path vary_toy.safetensors --dtype float16 --verify
    mindvlm-convert --torch_ckpt_path vary_toy.safetensors --mindspore_ckpt_path vary-toy-hf/ --to hf
    mindvlm-convert --torch_ckpt_path vary-toy/ --mindspore_ckpt_path vary-toy-int4/ --quant int4 --verify
    mindvlm-convert --inspect pytorch_model.bin

Tensors stream from file to file: memory does not grow with the model. Exit status 0: done; 2: the checkpoint does not
fit the model (a table shows where), or another error that the caller can fix; 130: interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindvlm.checkpoint import check_writable, open_checkpoint, parse_size
from mindvlm.convert.conversion import DTYPES, NAMINGS, PROOFS, Conversion, ConversionRequest, ParityFailure, convert
from mindvlm.convert.inspection import inspect_table
from mindvlm.convert.report import report_of, write_report
from mindvlm.convert.summary import summary
from mindvlm.core.errors import Parser, UserError
from mindvlm.core.interruption import handled_by
from mindvlm.core.progress import progress_to
from mindvlm.core.weight_formats import PARTS
from mindvlm.models.registry import convertible_models, require_downloaded
from mindvlm.weights.rules.findings import ConversionError

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parse(argv)
    try:
        with handled_by(_interrupt, _SIGNALS):
            if arguments.inspect is not None:
                with open_checkpoint(arguments.inspect) as checkpoint:
                    print(inspect_table(checkpoint))
            else:
                _convert(arguments)
            sys.stdout.flush()
    except UserError as error:
        if isinstance(error, ConversionError):
            print(error.table())
        if isinstance(error, ParityFailure):
            print(error.report.table())
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of the table closed the pipe; keeps the interpreter from failing when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: the output cannot be printed ({error.strerror})", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.inspect is None and not arguments.torch_ckpt_path:
        parser.error("give --torch_ckpt_path with the weights to convert, or --inspect with a file to inspect")
    if arguments.verify_only and arguments.dry_run:
        parser.error("--verify_only reads the whole file, --dry_run reads nothing; give one of them")
    return arguments


def _convert(arguments: argparse.Namespace) -> None:
    report = arguments.report and Path(arguments.report)

    def record(conversion: Conversion) -> None:
        touched = [*conversion.opened.files, *(output.path for output in conversion.outputs), conversion.request.target]
        if any(report.resolve() == path.resolve() for path in touched):
            raise UserError(f"--report {report}: is a source or the target; give the report a name of its own")
        write_report(report, report_of(conversion))

    if report:
        check_writable(report)
    request = ConversionRequest(
        sources=tuple(map(Path, arguments.torch_ckpt_path)),
        target=Path(arguments.mindspore_ckpt_path) if arguments.mindspore_ckpt_path else None,
        model=arguments.model,
        dtype=arguments.dtype,
        to=arguments.to,
        quant=arguments.quant,
        calibrate=Path(arguments.calibrate) if arguments.calibrate else None,
        config_path=Path(arguments.config_path) if arguments.config_path else None,
        only=arguments.only,
        merge_lora=Path(arguments.merge_lora) if arguments.merge_lora else None,
        max_shard_size=parse_size(arguments.max_shard_size) if arguments.max_shard_size else None,
        verify=arguments.verify or ("tensors" if arguments.verify_only else None),
        write=not arguments.verify_only,
        dry_run=arguments.dry_run,
        statistics=bool(arguments.report),
    )
    for source in request.sources:
        require_downloaded(source)
    with progress_to(_print_progress):
        conversion = convert(request, show_progress=sys.stderr.isatty(), record=record if report else None)
    print(summary(conversion))


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _filled(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a value or leave the option out")
    return text


def _path(text: str) -> str:
    return os.path.expanduser(_filled(text))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mindvlm-convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(*names: str, **options: Any) -> None:
        if "action" not in options:
            options["type"] = _path if options.get("metavar") in ("PATH", "FOLDER", "FILE.json") else _filled
        parser.add_argument(*names, **options)

    add(
        "--torch_ckpt_path",
        "--source",
        nargs="+",
        metavar="PATH",
        help="weights: .safetensors, .bin/.pt/.pth, .ckpt, an index of shards, or a folder with one of them; "
        "of several (base, tower, projector ...) later ones override earlier ones",
    )
    add(
        "--mindspore_ckpt_path",
        "--target",
        metavar="PATH",
        help="the file to write, .ckpt, .safetensors or torch's .bin by its ending, or a folder (default: MODEL.ckpt "
        "beside the source)",
    )
    models = ", ".join(model.name for model in convertible_models())
    parts = ", ".join(dict.fromkeys(part.key for model in convertible_models() for part in model.native.parts))
    add("--model", help=f"one of: {models} (default: recognised from the tensors and config.json)")
    add("--dtype", default="keep", help=f"one of: {', '.join(DTYPES)} (default: %(default)s)")
    add("--to", default="native", help=f"names and layout of the target: {', '.join(NAMINGS)} (default: %(default)s)")
    add(
        "--quant",
        metavar="FORMAT",
        help="quantize matrices to int8, int8c, int4 or int4k, for a CPU; PART=FORMAT sets one part, as in "
        f"int4,head=int8 (parts: {', '.join(PARTS)})",
    )
    add(
        "--calibrate",
        metavar="FOLDER",
        help="run the model on the pictures of a folder; the size of its activations weighs the errors of --quant",
    )
    add("--config_path", metavar="PATH", help="YAML or folder of the model, for --calibrate (default: the source)")
    add("--max_shard_size", metavar="SIZE", help="split .safetensors into files of at most this size, such as 2GB")
    add("--only", metavar="PART", help=f"keep one part: {parts}")
    add("--merge_lora", metavar="FOLDER", help="merge a PEFT adapter into the weights")
    add(
        "--verify",
        nargs="?",
        const="tensors",
        metavar="HOW",
        help=f"verify the result: {PROOFS[0]} (the default) reopens it and compares every tensor bit by bit; "
        f"{PROOFS[1]} also runs the torch reference and the MindSpore model on the same inputs; "
        "of quantized weights it compares every block with the source",
    )
    add("--verify_only", action="store_true", help="verify a target that was written earlier; write nothing")
    add("--report", metavar="FILE.json", help="write a report: hashes, rules, origins and statistics of each tensor")
    add("--dry_run", action="store_true", help="do everything except writing, from headers alone")
    add("--inspect", metavar="PATH", help="print the contents of a file or folder, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
