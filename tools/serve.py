"""Serves models in the format of OpenAI's API: `mindvlm-serve --config_path TinyLLaVA-1.5B`."""

import argparse
import importlib.util
import math
import os
import re
import socket
import stat
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mindvlm.core.config import read_yaml
from mindvlm.core.errors import Parser, UserError
from mindvlm.core.host_memory import limit_freed_memory
from mindvlm.models.registry import require_downloaded
from mindvlm.processing.images.downloads import ascii_host
from mindvlm.serving.listening import bind
from mindvlm.serving.plan import ModelPlan
from mindvlm.serving.settings import MAX_SERVER_SLOTS, MEBIBYTE, ServerSettings
from mindvlm.serving.sites import own_names
from mindvlm.tools import cli

REPLICA = (sys.executable, "-m", "mindvlm.tools.serve_replica")
"""The command that starts a process of a model."""

HOST = r"\*|(\*\.)?[\w-]+(\.[\w-]+)*\.?(:(?P<port>\d{1,5}))?|[0-9a-f.]*:[0-9a-f.]*:[0-9a-f:.]*"
"""An entry of --picture_hosts; the last form is an IPv6 address."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mindvlm-serve",
        description="Answer requests in the format of OpenAI's API. Without --config_path the shipped Vary-nano. Only "
        "this machine is answered, without a key, unless the options say otherwise. Exit status 0 after SIGTERM or "
        "Ctrl-C; 2: the server could not start.",
    )
    parser.add_argument(
        "--config_path",
        type=os.path.expanduser,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="the model: a YAML or a checkpoint folder (default: the shipped Vary-nano). Several models get a process "
        "each, and requests choose one by its name",
    )
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="processes of each model, such as one a card (default 1)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free port (default: %(default)s)")
    parser.add_argument("--model_name", metavar="NAME", help="name for clients (default: the name in the config)")
    parser.add_argument("--any_model", action="store_true", help="accept any model name in requests")
    parser.add_argument(
        "--no_prompt_reuse",
        action="store_true",
        help="compute every prompt whole, also where its beginning is in the cache",
    )
    parser.add_argument(
        "--no_picture_process",
        action="store_true",
        help="encode pictures in the process that generates answers, which stop meanwhile. So it is without the "
        "kernels, or with one thread for each process",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--slots", type=int, default=8, metavar="N", help="answers at the same time (default 8)")
    limits.add_argument("--max_waiting", type=int, default=64, metavar="N", help="answers that wait (default 64)")
    limits.add_argument("--max_seconds", type=float, default=1800, metavar="S", help="for an answer (default 1800)")
    limits.add_argument("--max_body_mib", type=float, default=64, metavar="M", help="of a request (default 64)")
    limits.add_argument(
        "--picture_cache_mib",
        type=float,
        default=256,
        metavar="M",
        help="of pictures to keep (default 256)",
    )
    limits.add_argument("--max_pictures", type=int, default=16, metavar="N", help="of a request (default 16)")
    limits.add_argument("--max_pixels", type=int, default=50_000_000, metavar="N", help="of a picture (default 50 M)")
    access = parser.add_argument_group("access")
    access.add_argument("--api_key_file", type=os.path.expanduser, metavar="FILE", help="accepted keys, one a line")
    access.add_argument("--cors_origins", nargs="+", default=[], metavar="ORIGIN", help="web pages that may ask")
    access.add_argument(
        "--picture_hosts", nargs="+", default=[], metavar="HOST", help="public hosts whose pictures may be fetched"
    )
    access.add_argument("--media_path", type=os.path.expanduser, metavar="FOLDER", help="for file:// pictures")
    runtime = parser.add_argument_group("runtime (override the YAML)")
    runtime.add_argument("--checkpoint", type=os.path.expanduser, metavar="FILE", help="weights")
    runtime.add_argument("--no_cache", action="store_true", help="do not cache converted weights and compiled graphs")
    runtime.add_argument("--device", choices=["auto", "cpu", "ascend"])
    runtime.add_argument("--mode", choices=["graph", "pynative"])
    runtime.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    cli.add_weights_option(runtime)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `mindvlm-serve`; returns the exit status."""
    return cli.run(serve, argv)


def serve(argv: list[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    settings = read_settings(arguments)
    plans = read_plans(arguments, settings)
    num_processes = len(plans) * arguments.replicas
    for package in ("fastapi", "prometheus_client", "uvicorn", *(["httpx"] if num_processes > 1 else [])):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; run: pip install fastapi httpx prometheus-client uvicorn")
    for plan in plans:
        check_file(plan)
    listening = bind(arguments.host, arguments.port)
    is_busy = False
    try:
        limit_freed_memory()
        # MindSpore takes seconds to import; help and the errors above come before
        cli.import_library()
        plans = [named_plan(plan) for plan in plans]
        check_names(plans)
        if num_processes == 1:
            say_address(listening)
            is_busy = serve_model(plans[0], listening, on_ready=lambda name: cli.say(f"{name} is ready"))
        else:
            serve_fleet(plans, arguments.replicas, settings, listening)
    except KeyboardInterrupt:  # before the server handles it
        pass
    cli.say("stopped")
    if is_busy:
        os._exit(0)
    return 0


def serve_fleet(plans: list[ModelPlan], num_replicas: int, settings: ServerSettings, listening: socket.socket) -> None:
    """Serves each model in `num_replicas` processes. Raises UserError if one cannot be served."""
    from mindvlm.serving.fleet import Fleet
    from mindvlm.serving.router_server import RouterServer
    from mindvlm.serving.shares import machine_shares

    shares = machine_shares(len(plans) * num_replicas)
    fleet = Fleet(REPLICA, plans, num_replicas, shares, any_model=settings.any_model)
    say_address(listening)
    RouterServer(fleet, settings, listening).run()


def say_address(listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    cli.say(f"listening on http://{address}:{port}/v1")
    cli.say(f"open http://{'localhost' if host in ('0.0.0.0', '::') else address}:{port}/ in a browser")


def read_plans(arguments: argparse.Namespace, settings: ServerSettings) -> list[ModelPlan]:
    """Returns what the processes of each model serve. Raises UserError for options that do not go together."""
    paths = arguments.config_path or [None]
    if arguments.replicas < 1:
        raise UserError(f"--replicas {arguments.replicas}: expected the number of processes of a model, at least 1")
    for option in ("model_name", "checkpoint"):
        if len(paths) > 1 and (value := getattr(arguments, option)) is not None:
            raise UserError(f"--{option} {value}: is for one model, here are {len(paths)}; set it in their YAMLs")
    caches = not arguments.no_cache
    return [
        ModelPlan(config_path=path, overrides=overrides(arguments), caches=caches, settings=settings) for path in paths
    ]


def serve_model(
    plan: ModelPlan, listening: socket.socket, *, on_ready: Callable[[str], None] = lambda name: None
) -> bool:
    """Serves one model in this process.

    Args:
        on_ready: called with the name of the model when it answers.

    Returns:
        whether a graph is still compiled or run, which crashes an interpreter that ends; use `os._exit`.

    Raises:
        UserError: the model cannot be served.
    """
    from mindvlm.serving.server import ModelServer

    name = plan.settings.model_name

    def load():
        import mindvlm

        model = mindvlm.load(plan.config_path, cache=plan.caches, **plan.overrides)
        if model.scope.note:
            cli.say(f"{name}: {model.scope.note}")
        cli.say(f"{name} is loading its graphs")
        return model

    server = ModelServer(load, plan.settings, listening, on_ready=lambda model: on_ready(name))
    server.run()
    return server.is_busy


def check_file(plan: ModelPlan) -> None:
    """Raises UserError if the YAML of a model cannot be read. Does not import MindSpore."""
    if plan.config_path:
        path = Path(plan.config_path)
        require_downloaded(path)
        if path.name != "config.json" and not path.is_dir():
            read_yaml(path)


def named_plan(plan: ModelPlan) -> ModelPlan:
    """Returns the plan with the name of its model, that of its config unless another one is chosen.

    Raises:
        UserError: the config is wrong, its weights are missing, or the model gives no text.
    """
    from mindvlm.api import shipped_config_path
    from mindvlm.models.loading import check_complete
    from mindvlm.models.registry import get_family
    from mindvlm.models.run_config import read_config

    path = plan.config_path or shipped_config_path()
    config = read_config(path, plan.overrides)
    family = get_family(config.family)
    if family.output != "text":
        raise UserError(
            f"{config.name} continues pictures and answers no questions, so it cannot be served; "
            "use mindvlm-predict --prompt_pairs"
        )
    check_complete(config, family, origin=path)
    return replace(plan, settings=replace(plan.settings, model_name=plan.settings.model_name or config.name))


def check_names(plans: Sequence[ModelPlan]) -> None:
    """Raises UserError if two models have the same name."""
    known: dict[str | None, ModelPlan] = {}
    for plan in plans:
        if (other := known.setdefault(plan.settings.model_name, plan)) is not plan:
            raise UserError(
                f"--config_path {other.config_path} and {plan.config_path}: both models are named "
                f"{plan.settings.model_name!r}, and clients choose by name; change the key 'name' of one, or serve one "
                "model with --replicas"
            )


def overrides(arguments: argparse.Namespace) -> dict:
    """Returns the keys of the YAML that the command line replaces."""
    keys = ("checkpoint", "device", "mode", "dtype", "weights")
    found = {key: value for key in keys if (value := getattr(arguments, key)) is not None}
    if "checkpoint" in found:
        found["checkpoint"] = str(Path(found["checkpoint"]).resolve())
    return found


def read_settings(arguments: argparse.Namespace) -> ServerSettings:
    """Returns the settings of the server. Raises UserError for a wrong limit, key file or folder."""
    for option in ("slots", "max_body_mib", "max_pictures", "max_pixels", "max_seconds"):
        if not 0 < getattr(arguments, option) < math.inf:
            raise UserError(f"--{option} {getattr(arguments, option)}: must be more than 0 and finite")
    if arguments.slots > MAX_SERVER_SLOTS:
        raise UserError(f"--slots {arguments.slots}: at most {MAX_SERVER_SLOTS}; for more add --replicas")
    for option in ("max_waiting", "picture_cache_mib"):
        if not 0 <= getattr(arguments, option) < math.inf:
            raise UserError(f"--{option} {getattr(arguments, option)}: must be 0 or more and finite")
    for host in arguments.picture_hosts:
        if not is_picture_host(host):
            raise UserError(
                f"--picture_hosts {host}: expected host, host:port, *.domain, *.domain:port or *, without https:// "
                "and path"
            )
    if arguments.media_path and not os.path.isdir(arguments.media_path):
        raise UserError(f"--media_path {arguments.media_path}: no such folder")
    keys = read_keys(arguments.api_key_file) if arguments.api_key_file else ()
    return ServerSettings(
        num_slots=arguments.slots,
        max_waiting=arguments.max_waiting,
        max_seconds=arguments.max_seconds,
        max_body_bytes=int(arguments.max_body_mib * MEBIBYTE),
        picture_cache_bytes=int(arguments.picture_cache_mib * MEBIBYTE),
        max_pictures=arguments.max_pictures,
        max_pixels=arguments.max_pixels,
        api_keys=keys,
        own_names=() if keys else own_names(arguments.host, arguments.cors_origins),
        cors_origins=tuple(arguments.cors_origins),
        picture_hosts=tuple(arguments.picture_hosts),
        media_path=Path(arguments.media_path) if arguments.media_path else None,
        model_name=arguments.model_name,
        any_model=arguments.any_model,
        reuses_prompts=not arguments.no_prompt_reuse,
        has_picture_process=not arguments.no_picture_process,
    )


def is_picture_host(text: str) -> bool:
    """Whether a URL can match an entry of --picture_hosts."""
    found = re.fullmatch(HOST, text, re.IGNORECASE)
    try:
        return bool(found and ascii_host(text)) and 0 < int(found["port"] or 1) < 65536
    except ValueError:
        return False


def read_keys(path: str) -> tuple[str, ...]:
    """Returns the keys in a file and warns if other users can read it. Raises UserError if it has none."""
    try:
        mode, text = os.stat(path).st_mode, Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"--api_key_file {path}: cannot be read ({reason}); give a file with a key a line") from None
    keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api_key_file {path}: no key in it; write one a line")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        warnings.warn(f"--api_key_file {path}: other users can read the keys; chmod 600 {path}", stacklevel=2)
    return keys


if __name__ == "__main__":
    raise SystemExit(main())
