"""The process of a replica, which `mindvlm-serve` starts: it serves a model on the socket that it inherits."""

import json
import os
import pickle
import socket
import sys
import threading
import warnings

from mindvlm.core.errors import UserError
from mindvlm.core.host_memory import limit_freed_memory
from mindvlm.core.processes import die_with_parent
from mindvlm.core.progress import progress_to
from mindvlm.serving.plan import ModelPlan
from mindvlm.tools import cli
from mindvlm.tools.serve import serve_model


def main(argv: list[str]) -> int:
    """Serves the pickled `ModelPlan` in standard input; returns the exit status.

    Args:
        argv: the number of the listening socket.
    """
    limit_freed_memory()
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # MindSpore prints to standard output
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.showwarning = cli.show_warning

    plan: ModelPlan = pickle.load(sys.stdin.buffer)
    end_with_parent(sys.stdin.fileno())
    try:
        cli.import_library()
        with progress_to(lambda line: cli.say(f"{plan.settings.model_name}: {line}")):
            is_busy = serve_model(plan, socket.socket(fileno=int(argv[0])))
        if is_busy:
            os._exit(0)
        return 0
    except UserError as error:
        print(json.dumps({"problem": str(error)}), file=reports, flush=True)
        return 2


def end_with_parent(pipe: int) -> None:
    """Ends this process as soon as its parent has ended, which closes the pipe of this number."""
    # also while a compilation holds the lock of the interpreter
    die_with_parent()

    def wait() -> None:
        # a lock of Python's file object would disturb the end of this process
        while os.read(pipe, 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
