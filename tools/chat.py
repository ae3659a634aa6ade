"""The chat of `mindvlm-predict --chat_mode`."""

import re
import sys
from pathlib import Path

from mindvlm.core.errors import UserError
from mindvlm.core.interruption import interruptible
from mindvlm.processing.images.picture import Picture
from mindvlm.sessions.conversation import Conversation
from mindvlm.tools import cli

HELP = "commands: /image FILE  /reset  /help  /exit   (Ctrl-C stops an answer)"


def chat(model, images: list[str], options: dict) -> int:
    """Reads questions until /exit or the end of input. Pictures belong to the next question.

    Args:
        model: a loaded `VisionLanguageModel`.
        images: pictures of the first question.
        options: generation options.

    Raises:
        UserError: one of `images` cannot be used.
    """
    conversation = Conversation(model)
    waiting = model.pictures(images)
    model.encode_images(waiting)
    cli.say(HELP)
    while True:
        try:
            with interruptible():
                line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            cli.say("\n/exit leaves")
            continue
        except UnicodeDecodeError as error:
            cli.say(f"error: the line is not {error.encoding} text")
            continue
        command, _, argument = line.partition(" ")
        if command in ("/exit", "/quit") or line == "exit":
            return 0
        if command == "/reset":
            conversation.reset()
            waiting = []
            cli.say("forgot all turns and pictures")
        elif command == "/image":
            add_image(model, waiting, argument.strip())
        elif command == "/help":
            cli.say(HELP)
        elif re.fullmatch(r"/\w*", command):
            cli.say(f"unknown command {command}; {HELP}")
        elif line and answer(conversation, line, waiting, options):
            waiting = []


def add_image(model, waiting: list[Picture], path: str) -> None:
    """Adds a picture to the next question; decodes it now to refuse a bad one."""
    if not path:
        cli.say("/image needs the path of a picture")
        return
    try:
        with interruptible():
            pictures = model.pictures(path)
            model.encode_images(pictures)
    except UserError as error:
        cli.say(f"error: {error}")
        return
    except KeyboardInterrupt:
        cli.say(" [stopped]")
        return
    waiting += pictures
    cli.say(f"{Path(path).name} goes with the next question")


def answer(conversation: Conversation, query: str, images: list[Picture], options: dict) -> bool:
    """Streams one answer; False if the question could not be asked."""
    try:
        with interruptible():
            stream = conversation.ask(query, images, stream=True, **options)
    except UserError as error:
        cli.say(f"error: {error}")
        if "context" in str(error):
            cli.say("the context is full; /reset begins a new conversation")
        return False
    except KeyboardInterrupt:
        cli.say(" [stopped]")
        return False
    try:
        with interruptible():
            for piece in stream:
                print(piece, end="", flush=True)
    except UserError as error:
        cli.say(f"error: {error}")
        return False
    except KeyboardInterrupt:
        cli.say(" [stopped]")
    print(flush=True)
    if stream.close().stop_reason == "context_full":
        cli.say("the context is full; /reset begins a new conversation")
    return True
