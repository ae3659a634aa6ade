"""Reads text from pictures, or talks about them: `mindvlm-predict --image_dir page.png`."""

import argparse
import json
import os
import sys
from pathlib import Path

from mindvlm.core.errors import Parser, UserError
from mindvlm.models.registry import get_family, separate_parts
from mindvlm.parallel.launch import is_launched
from mindvlm.processing.images.sources import IMAGE_ENDINGS, local_path, short_name
from mindvlm.tools import cli

DEFAULT_QUERY = "Provide the ocr results of this image."
OTHER_ENDINGS = {".ai", ".arw", ".cr2", ".cr3", ".djvu", ".dng", ".eps", ".nef", ".pdf", ".ps", ".raf", ".svg"}
GENERATION_OPTIONS = {
    "max_new_tokens": (int, "maximum number of tokens of an answer"),
    "temperature": (float, "above 1 flattens, below 1 sharpens; with --do_sample"),
    "top_k": (int, "sample from the k most likely tokens, 0 for all; with --do_sample"),
    "top_p": (float, "sample from the most likely tokens with this total probability; with --do_sample"),
    "repetition_penalty": (float, "above 1 makes repeated tokens less likely"),
    "no_repeat_ngram_size": (int, "forbid repeated sequences of n tokens, 0 for off"),
    "max_repeated_tokens": (int, "end an answer whose last n tokens repeat one sequence, 0 for off; default 1000"),
    "seed": (int, "of sampling"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mindvlm-predict",
        description="Answer a question about pictures. Without --config_path the shipped Vary-nano reads one or two "
        "lines of printed text. Exit status 0: all answered; 1: some of several pictures failed, with a line for each; "
        "2: nothing could be done; 130: interrupted.",
    )
    parser.add_argument(
        "--image_dir",
        nargs="+",
        type=os.path.expanduser,
        metavar="PATH",
        help="pictures, or folders of them; also file:// and data URLs",
    )
    parser.add_argument(
        "--query",
        default=DEFAULT_QUERY,
        help="the question (default: %(default)s); asked about each picture, or with several <image> marks once about "
        "all of them, one mark for each",
    )
    parser.add_argument(
        "--config_path",
        type=os.path.expanduser,
        metavar="PATH",
        help="the model: a YAML or a checkpoint folder (default: the shipped Vary-nano)",
    )
    parser.add_argument(
        "--chat_mode", nargs="?", const=True, default=False, type=cli.yes_or_no, help="chat over several turns"
    )
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="FILE",
        help="write one JSON line per answer; for a model that generates pictures the PNG, or a folder of them",
    )
    pictures = parser.add_argument_group("models that generate pictures")
    pictures.add_argument(
        "--prompt_pairs",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="examples of the task: pictures NAME_img and their labels NAME_label",
    )
    pictures.add_argument("--grid", action="store_true", help="write examples, query and result as one picture")
    pictures.add_argument(
        "--num_frames", type=int, metavar="N", help="continue the pictures, frames of a video, by N frames"
    )
    runtime = parser.add_argument_group("runtime (override the YAML)")
    runtime.add_argument("--checkpoint", type=os.path.expanduser, metavar="FILE", help="weights")
    for key, text in separate_parts().items():
        runtime.add_argument(f"--{key}", type=os.path.expanduser, metavar="FOLDER", help=text)
    runtime.add_argument(
        "--adapter", type=os.path.expanduser, metavar="FOLDER", help="a PEFT adapter to merge into the weights"
    )
    runtime.add_argument("--no_cache", action="store_true", help="do not cache converted weights and compiled graphs")
    runtime.add_argument("--device", choices=["auto", "cpu", "ascend"])
    runtime.add_argument("--mode", choices=["graph", "pynative"])
    runtime.add_argument(
        "--tensor_parallel",
        type=int,
        metavar="N",
        help="processes that share the weights, started by msrun (default: all that msrun has started)",
    )
    runtime.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    cli.add_weights_option(runtime)
    generation = parser.add_argument_group("generation (override the YAML)")
    generation.add_argument("--do_sample", nargs="?", const=True, type=cli.yes_or_no, help="sample, not greedy")
    for name, (kind, text) in GENERATION_OPTIONS.items():
        generation.add_argument(f"--{name}", type=kind, help=text)
    generation.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeat")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `mindvlm-predict`; returns the exit status."""
    return cli.run(predict, argv)


def predict(argv: list[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    images = find_images(arguments.image_dir or [])
    if not images and not arguments.chat_mode and arguments.query == DEFAULT_QUERY:
        raise UserError("no picture given; add --image_dir FILE (or a --query that needs none, or --chat_mode)")
    if arguments.output and arguments.chat_mode:
        raise UserError("--output has no effect with --chat_mode; leave one of them out")
    if arguments.chat_mode and is_launched():
        raise UserError("--chat_mode reads a keyboard, which msrun gives to no process; ask with --query")
    # pictures may go to a folder
    if arguments.output and not (arguments.prompt_pairs or arguments.num_frames):
        from mindvlm.checkpoint import check_writable

        check_writable(arguments.output)

    # MindSpore takes seconds to import; help and the errors above come before
    cli.import_library()
    import mindvlm

    paths = ("checkpoint", *separate_parts(), "adapter")
    overrides = {
        key: value
        for key in (*paths, "device", "mode", "dtype", "weights", "tensor_parallel")
        if (value := getattr(arguments, key)) is not None
    }
    for key in paths:
        if overrides.get(key):
            overrides[key] = str(Path(overrides[key]).resolve())
    model = mindvlm.load(arguments.config_path, cache=not arguments.no_cache, **overrides)
    if not model.mesh.is_first:
        # all processes compute the same answers
        arguments.output, sys.stdout, sys.stderr = None, *[open(os.devnull, "w")] * 2
    options = {
        key: value for key in (*GENERATION_OPTIONS, "do_sample") if (value := getattr(arguments, key)) is not None
    }
    if arguments.stop:
        options["stop_strings"] = arguments.stop
    model.generation_config(options)
    if get_family(model.config.family).output == "pictures":
        if arguments.chat_mode or arguments.query != DEFAULT_QUERY:
            raise UserError("the model generates pictures and reads no text; leave --query and --chat_mode out")
        from mindvlm.tools.predict_pictures import predict_pictures

        return predict_pictures(model, images, arguments, options)
    for option in ("prompt_pairs", "grid", "num_frames"):
        if getattr(arguments, option):
            raise UserError(f"--{option} is for models that generate pictures; this one answers with text")
    if arguments.chat_mode:
        from mindvlm.tools.chat import chat

        return chat(model, images, options)
    is_joint = model.processor.num_markers(arguments.query) > 1
    # errors that concern every picture come before the first one
    prompt = model.processor.prompt(arguments.query, num_images=len(images) if is_joint else min(len(images), 1))
    model.engine.check_length(len(prompt.input_ids))
    asked = [images] if is_joint else images or [None]
    if arguments.output or names_folder(arguments) or len(asked) > 1:
        return answer_all(model, asked, arguments, options)
    print_streamed(model.chat(arguments.query, asked[0], stream=True, **options))
    return 0


def names_folder(arguments: argparse.Namespace) -> bool:
    return any(os.path.isdir(local_path(path) or "") for path in arguments.image_dir or [])


def find_images(paths: list[str]) -> list[str]:
    """Returns the pictures that the arguments name: files and data URLs as given, those of folders in name order.

    Documents and camera files in a folder are named on standard error.

    Raises:
        UserError: a path does not exist, a URL is not local, or a folder holds no picture.
    """
    images = []
    for argument in paths:
        path = local_path(argument)
        if path is None:
            images.append(argument)
        elif Path(path).is_dir():
            images += pictures_of_folder(Path(path))
        elif Path(path).exists():
            images.append(str(Path(path)))
        else:
            raise UserError(f"{path} does not exist; give a picture or a folder of pictures")
    return images


def pictures_of_folder(folder: Path) -> list[str]:
    """Returns the pictures in a folder and names what it leaves out; see `find_images`."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    pictures = [str(path) for path in files if path.suffix.lower() in IMAGE_ENDINGS]
    others = [path.name for path in files if path.suffix.lower() in OTHER_ENDINGS]
    if not pictures:
        found = f" but {others[0]}" if others else ""
        endings = ", ".join(sorted(IMAGE_ENDINGS))
        raise UserError(
            f"folder {folder} holds no pictures{found} ({endings}); convert to one of these, or give another"
        )
    if others:
        cli.say(f"{folder}: left out {', '.join(others)}; convert to PNG to ask about them")
    return pictures


def print_streamed(stream) -> None:
    """Prints the text as it arrives, then the statistics on standard error."""
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    cli.say(summary(stream.answer))


def summary(answer) -> str:
    seconds = answer.seconds
    parts = [f"{answer.num_prompt_tokens} prompt tokens", f"{answer.num_new_tokens} new ({answer.stop_reason})"]
    parts += [f"{stage} {seconds[stage]:.2f} s" for stage in ("compile", "vision", "prefill", "decode")]
    if answer.tokens_per_second:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    return ", ".join(parts)


def answer_all(model, asked: list, arguments: argparse.Namespace, options: dict) -> int:
    """Answers the query for each entry; records a bad picture and continues.

    Args:
        asked: for each answer a picture, a list of pictures that are asked about together, or None.

    Returns:
        0, or 1 when a picture failed.

    Raises:
        UserError: the only answer failed, and its pictures are named as files.
    """
    from tqdm import tqdm

    records, num_failed = [], 0
    load_seconds = model.load_seconds
    bar = tqdm(asked, unit="image", disable=len(asked) == 1 or not sys.stderr.isatty())
    try:
        for image in bar:
            record = {"image": image, "query": arguments.query}
            try:
                answer = model.chat(arguments.query, image, **options)
            except UserError as error:
                if len(asked) == 1 and not names_folder(arguments):
                    raise
                num_failed += 1
                record["error"] = str(error)
                named = f"{image}: " if len(asked) > 1 and str(image) not in str(error) else ""
                tqdm.write(f"error: {named}{error}", file=sys.stderr)
            else:
                record.update(describe(answer, load_seconds))
                load_seconds = 0.0
                tqdm.write(f"{short_name(image)}: {answer}" if len(asked) > 1 else str(answer), file=sys.stdout)
            records.append(record)
    finally:
        if arguments.output and records:
            write_records(arguments.output, records)
    if num_failed and len(asked) > 1:
        cli.say(f"{num_failed} of {len(asked)} pictures failed")
    return 1 if num_failed else 0


def describe(answer, load_seconds: float) -> dict:
    """Returns the fields of a JSON line; the first picture includes the time of loading."""
    return {
        "text": str(answer),
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_new_tokens": answer.num_new_tokens,
        "seconds": {stage: round(t, 4) for stage, t in {"load": load_seconds, **answer.seconds}.items()},
        "tokens_per_second": round(answer.tokens_per_second, 2),
        "stop_reason": answer.stop_reason,
    }


def write_records(path: str, records: list[dict]) -> None:
    from mindvlm.checkpoint import atomic_file

    with atomic_file(path) as file:
        for record in records:
            # file names may contain bytes that are not text
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode(errors="replace"))


if __name__ == "__main__":
    sys.exit(main())
