"""Reads text from pictures and documents, or talks about them: `mindvlm-predict --image_dir page.png`."""

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from mindvlm.core.errors import Parser, UserError
from mindvlm.models.registry import get_family, separate_parts
from mindvlm.parallel.launch import is_launched
from mindvlm.processing.images.documents import DEFAULT_DPI, DEFAULT_QUERY, page_ranges
from mindvlm.processing.images.sources import local_path
from mindvlm.tools import cli
from mindvlm.tools.pages import PageReader, Question, find_pages
from mindvlm.tools.sources import Source, find_sources, is_web_address

GENERATION_OPTIONS = {
    "max_new_tokens": (int, "maximum number of tokens of an answer"),
    "temperature": (float, "above 1 flattens, below 1 sharpens; with --do_sample"),
    "top_k": (int, "sample from the k most likely tokens, 0 for all; with --do_sample"),
    "top_p": (float, "sample from the most likely tokens with this total probability; with --do_sample"),
    "repetition_penalty": (float, "above 1 makes repeated tokens less likely"),
    "no_repeat_ngram_size": (int, "forbid repeated sequences of n tokens, 0 for off"),
    "max_repeated_tokens": (
        int,
        "end an answer whose last n tokens repeat one sequence, 0 for off; default for pages 700",
    ),
    "seed": (int, "of sampling"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mindvlm-predict",
        description="Answer a question about pictures and pages of documents. Without --config_path the shipped "
        "Vary-nano reads one or two lines of printed text. Exit status 0: all answered; 1: some of several pages "
        "failed, with a line for each; 2: nothing could be done; 130: interrupted.",
        hint="add --image_dir before pictures and documents",
    )
    parser.add_argument(
        "--image_dir",
        nargs="+",
        type=os.path.expanduser,
        metavar="PATH",
        help="pictures, PDFs, TIFF files of several pages, or folders of them; also file:// and data URLs",
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
        help="append one JSON line per answer; the same command goes on after an interruption. For a model that "
        "generates pictures the PNG, or a folder of them",
    )
    documents = parser.add_argument_group("documents")
    documents.add_argument(
        "--pages",
        metavar="RANGES",
        help="of each document, such as 1-3,7 or 5-, in this order and each page once (default: all)",
    )
    documents.add_argument(
        "--dpi", type=int, default=DEFAULT_DPI, help="resolution of the pages of a PDF (default: %(default)s)"
    )
    documents.add_argument("--recursive", action="store_true", help="search folders in folders too")
    documents.add_argument("--allow_urls", action="store_true", help="download http and https URLs")
    documents.add_argument(
        "--output_dir",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="write a text per document, and pages.jsonl, from which the same command goes on after an interruption",
    )
    documents.add_argument(
        "--text_format", choices=["txt", "md"], default="txt", help="of --output_dir (default: %(default)s)"
    )
    documents.add_argument(
        "--batch_size", type=int, default=1, metavar="N", help="pages that are answered together (default: %(default)s)"
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
    with ExitStack() as stack:
        downloads = None
        if arguments.allow_urls:
            downloads = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mindvlm")))
        sources = find_sources(arguments.image_dir or [], recursive=arguments.recursive, downloads=downloads)
        return answer(sources, arguments)


def answer(sources: list[Source], arguments: argparse.Namespace) -> int:
    check(sources, arguments)
    pages = find_pages(sources, page_ranges(arguments.pages) if arguments.pages else None, arguments.dpi)
    # MindSpore takes seconds to import; help and the errors above come before
    cli.import_library()
    import mindvlm
    from mindvlm.sessions.loaded_model import MAX_SLOTS

    if not 1 <= arguments.batch_size <= MAX_SLOTS:
        raise UserError(f"--batch_size is {arguments.batch_size}; expected 1 to {MAX_SLOTS}")
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
        sys.stdout = sys.stderr = open(os.devnull, "w")
    options = {
        key: value for key in (*GENERATION_OPTIONS, "do_sample") if (value := getattr(arguments, key)) is not None
    }
    if arguments.stop:
        options["stop_strings"] = arguments.stop
    model.generation_config(options)
    if get_family(model.config.family).output == "pictures":
        check_pictures_only(arguments)
        arguments.output = arguments.output if model.mesh.is_first else None
        from mindvlm.tools.predict_pictures import predict_pictures

        return predict_pictures(model, [source.file for source in sources], arguments, options)
    for option in ("prompt_pairs", "grid", "num_frames"):
        if getattr(arguments, option):
            raise UserError(f"--{option} is for models that generate pictures; this one answers with text")
    if pages:
        options = model.page_options(options)
    reader = PageReader(arguments.dpi, model.processor.max_pixels)
    if arguments.chat_mode:
        from mindvlm.tools.chat import chat

        return chat(model, [reader.page(page) for page in pages], options)
    is_joint = model.processor.num_markers(arguments.query) > 1
    if is_joint and arguments.output_dir:
        raise UserError("--output_dir writes a text per document, and the query is about several pages; use --output")
    # errors that concern every picture come before the first one
    prompt = model.processor.prompt(arguments.query, num_images=len(pages) if is_joint else min(len(pages), 1))
    model.engine.check_length(len(prompt.input_ids))
    questions = [Question(tuple(pages), is_joint=True)] if is_joint else [Question((page,)) for page in pages]
    questions = questions or [Question(())]
    is_folder = names_folder(arguments)
    if arguments.output or arguments.output_dir or is_folder or len(questions) > 1:
        from mindvlm.tools.read_pages import read_pages

        must_succeed = len(questions) == 1 and not is_folder
        return read_pages(model, questions, arguments, options, must_succeed=must_succeed)
    print_streamed(model.chat(arguments.query, reader.read(questions[0]), stream=True, **options))
    return 0


def check(sources: list[Source], arguments: argparse.Namespace) -> None:
    """Raises UserError if options contradict each other, or a file cannot be written."""
    if not sources and not arguments.chat_mode and arguments.query == DEFAULT_QUERY:
        raise UserError("no picture given; add --image_dir FILE (or a --query that needs none, or --chat_mode)")
    if arguments.output_dir and not sources:
        raise UserError("--output_dir writes a text per document but none is given; add --image_dir FILE")
    if arguments.text_format != "txt" and not arguments.output_dir:
        raise UserError(f"--text_format {arguments.text_format} has no effect without --output_dir; add it")
    for option in ("output", "output_dir"):
        if getattr(arguments, option) and arguments.chat_mode:
            raise UserError(f"--{option} has no effect with --chat_mode; leave one of them out")
    if arguments.chat_mode and is_launched():
        raise UserError("--chat_mode reads a keyboard, which msrun gives to no process; ask with --query")
    # pictures may go to a folder
    if arguments.output and not (arguments.prompt_pairs or arguments.num_frames):
        from mindvlm.tools.answer_log import check_log

        check_log(arguments.output)


def check_pictures_only(arguments: argparse.Namespace) -> None:
    """Raises UserError if options for texts are given."""
    if arguments.chat_mode or arguments.query != DEFAULT_QUERY:
        raise UserError("the model generates pictures and reads no text; leave --query and --chat_mode out")
    for option in ("pages", "output_dir"):
        if getattr(arguments, option):
            raise UserError(f"--{option} is for models that answer with text; this one generates pictures")


def names_folder(arguments: argparse.Namespace) -> bool:
    """Whether an argument is a folder, of which one bad file does not end the command."""
    paths = (path for path in arguments.image_dir or [] if not is_web_address(path))
    return any(os.path.isdir(local_path(path) or "") for path in paths)


def print_streamed(stream) -> None:
    """Prints the text as it arrives, then the statistics on standard error."""
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    cli.say(summary(stream.answer))


def summary(answer) -> str:
    seconds = answer.seconds
    parts = [f"{answer.num_prompt_tokens} prompt tokens", f"{answer.num_new_tokens} new ({answer.stop_reason})"]
    if not answer:
        parts.append("the answer is empty")
    parts += [f"{stage} {seconds[stage]:.2f} s" for stage in ("compile", "vision", "prefill", "decode")]
    if answer.tokens_per_second:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
