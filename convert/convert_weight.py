"""Convert a PyTorch, Hugging Face or MindOCR checkpoint to the names and the file formats used here.

    mindvlm-convert --torch_ckpt_path vary-toy/ --mindspore_ckpt_path vary_toy.safetensors --dtype float16 --verify

Tensors stream from file to file: memory does not grow with the model. Exit status 0: converted; 1: the checkpoint
does not fit the model (a table says where); 2: anything else that the caller can mend.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mindvlm.checkpoint import (
    CastSource,
    Checkpoint,
    TensorInfo,
    TensorSource,
    check_ending,
    check_writable,
    open_checkpoint,
    write_checkpoint,
)
from mindvlm.convert import vary
from mindvlm.convert.plan import Plan
from mindvlm.convert.report import ConversionError, format_table
from mindvlm.convert.rules import RuleTable
from mindvlm.convert.verify import verify_conversion
from mindvlm.errors import UserError

DTYPES = ("keep", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Model:
    """What converting a model takes: how its names are recognised, and the tensors it must have.

    `target_infos` maps the folder of the source to the model's tensors, or to None if the folder does not say;
    `released_infos` gives the tensors of the released weights.
    """

    detect: Callable[..., RuleTable]
    target_infos: Callable[[Path], Mapping[str, TensorInfo] | None]
    released_infos: Callable[[], Mapping[str, TensorInfo]]


MODELS = {"vary_toy": Model(vary.detect, vary.infos_of_config, vary.released_infos)}


@dataclass(frozen=True)
class Conversion:
    """What was done.

    `dtype` is the option, `sizes` says what the shapes were checked against.
    """

    plan: Plan
    target: Path
    dtype: str
    infos: Mapping[str, TensorInfo]
    sizes: str
    seconds: float
    num_verified: int | None


def convert(
    source_path: str | Path,
    target_path: str | Path,
    *,
    model: str = "vary_toy",
    dtype: str = "keep",
    verify: bool = False,
    show_progress: bool = False,
) -> Conversion:
    """Convert a checkpoint and write it under native names.

    Args:
        source_path: a file or folder that `open_checkpoint` understands.
        target_path: a `.safetensors` or `.ckpt` file; appears when it is complete.
        model: a key of `MODELS`.
        dtype: "keep", or what floating-point tensors become: "float32", "float16", "bfloat16".
        verify: re-open the result and compare every tensor with its source.
        show_progress: draw a progress bar on stderr.

    Raises:
        ConversionError: the checkpoint does not fit the model; nothing is written.
        UserError: unreadable source, unwritable target, values out of the dtype's range, failed verification.
    """
    started = time.monotonic()
    target = Path(target_path)
    _check_choice("--model", model, tuple(MODELS))
    _check_choice("--dtype", dtype, DTYPES)
    check_ending(target)
    check_writable(target)
    with open_checkpoint(source_path) as source:
        _refuse_overwriting(source, target)
        plan, sizes = _plan(source, model)
        planned: TensorSource = plan.view(source)
        cast_to = None if dtype == "keep" else dtype
        if cast_to:
            planned = CastSource(planned, cast_to)
        _check_space(target, planned)
        metadata = {"format": "ms"} if target.suffix == ".safetensors" else None
        with _progress(planned, "writing", show_progress) as bar:
            write_checkpoint(target, planned, metadata=metadata, progress=lambda _, size: bar.update(size))
        num_verified = None
        if verify:
            with _progress(planned, "verifying", show_progress) as bar:
                try:
                    num_verified = verify_conversion(
                        source, plan, target, dtype=cast_to, progress=lambda _, size: bar.update(size)
                    )
                except (UserError, KeyboardInterrupt):
                    target.unlink(missing_ok=True)
                    raise
        return Conversion(plan, target, dtype, planned.infos, sizes, time.monotonic() - started, num_verified)


def summary(conversion: Conversion) -> str:
    """Return a readable account of a conversion: rules with counts, dropped tensors, totals."""
    plan = conversion.plan
    rows = [("rule", "used", "from", "to")]
    for rule, count in plan.uses.items():
        to = _join_names(rule.targets) or getattr(rule, "reason", "")
        rows.append((type(rule).__name__, str(count), _join_names(rule.sources), to))
    infos = conversion.infos.values()
    totals = (
        f"{len(plan.infos)} tensors, {sum(info.num_elements for info in infos):,} parameters, "
        f"{sum(info.num_bytes for info in infos):,} bytes, dtype {conversion.dtype}, {conversion.seconds:.1f} s"
    )
    lines = [f"names: {plan.table.name}" + (" (nothing to rename)" if plan.is_identity else ""), *format_table(rows)]
    if plan.dropped:
        lines.append(f"dropped: {', '.join(plan.dropped)}")
    lines.append(f"sizes: {conversion.sizes}")
    lines.append(f"wrote {conversion.target}: {totals}")
    if conversion.num_verified is not None:
        lines.append(f"verified: all {conversion.num_verified} tensors of the source are in it, bit for bit")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    source = Path(arguments.torch_ckpt_path)
    folder = source if source.is_dir() else source.parent
    target = Path(arguments.mindspore_ckpt_path or folder / f"{arguments.model}.ckpt")
    try:
        conversion = convert(
            source,
            target,
            model=arguments.model,
            dtype=arguments.dtype,
            verify=arguments.verify,
            show_progress=sys.stderr.isatty(),
        )
    except ConversionError as error:
        print(error.table())
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {target} was not written", file=sys.stderr)
        return 130
    print(summary(conversion))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mindvlm-convert", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--torch_ckpt_path",
        required=True,
        help="source: .safetensors, .bin/.pt/.pth, .ckpt, an index of shards, or a folder with one of them",
    )
    parser.add_argument(
        "--mindspore_ckpt_path", help="target, .ckpt or .safetensors by ending (default: MODEL.ckpt beside the source)"
    )
    parser.add_argument("--model", default="vary_toy", help=f"one of: {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--dtype", default="keep", help=f"one of: {', '.join(DTYPES)} (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="re-open the result and compare every tensor")
    return parser


def _join_names(names: Sequence[str]) -> str:
    """Write names that differ in one place once: a.q.b, a.k.b is "a.[q|k].b"."""
    if len(names) < 2:
        return "".join(names)
    start = len(os.path.commonprefix(names))
    rests = [name[start:] for name in names]
    end = len(os.path.commonprefix([rest[::-1] for rest in rests]))
    middles = "|".join(rest[: len(rest) - end] for rest in rests)
    return f"{names[0][:start]}[{middles}]{rests[0][len(rests[0]) - end :]}"


def _check_choice(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{flag} {value!r} is unknown; expected one of: {', '.join(known)}")


def _plan(source: Checkpoint, model: str) -> tuple[Plan, str]:
    """Return the plan of a source, and what its sizes were checked against."""
    entry = MODELS[model]
    origin = str(source.path)
    folder = source.path if source.path.is_dir() else source.path.parent
    target_infos = entry.target_infos(folder)
    plan = entry.detect(source.infos, origin=origin).plan(source.infos, target_infos, origin=origin)
    if target_infos is not None:
        return plan, f"those of {folder / 'config.json'}"
    released = entry.released_infos()
    if {name: info.shape for name, info in plan.infos.items()} == {n: info.shape for n, info in released.items()}:
        return plan, f"those of the released {model}"
    return plan, f"not checked: they are not those of the released {model}, and no config.json lies beside the weights"


def _refuse_overwriting(source: Checkpoint, target: Path) -> None:
    if target.exists() and any(file.samefile(target) for file in source.files):
        raise UserError(f"{target}: is the source itself; give another name with --mindspore_ckpt_path")


def _check_space(target: Path, planned: TensorSource) -> None:
    needed = sum(info.num_bytes for info in planned.infos.values())
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise UserError(f"{target}: needs {needed:,} bytes, the disk has {free:,} free; make room or choose another")


def _progress(source: TensorSource, what: str, show: bool) -> tqdm:
    total = sum(info.num_bytes for info in source.infos.values())
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not show, leave=False)


if __name__ == "__main__":
    sys.exit(main())
