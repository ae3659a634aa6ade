"""Limits and permissions of the server. The defaults are safe on a machine that others reach."""

from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 2**20
MAX_SERVER_SLOTS = 256
"""A graph has a row for each slot; very many take long to compile and much space on the disk."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the server accepts.

    Attributes:
        num_slots: answers that are generated at the same time, at most `MAX_SERVER_SLOTS`.
        max_waiting: answers that wait for a slot; more are refused with status 429.
        max_seconds: time for an answer, waiting included.
        max_waiting_bytes: features or pixels of the pictures of waiting answers; more are refused with status 429.
        max_body_bytes: size of a request, and of all pictures that are fetched or read for it.
        max_bodies_bytes: size of all requests and files that are read or decoded at the same time; others wait.
        body_seconds: time in which a client must send its request.
        picture_cache_bytes: features or pixels of the pictures that are kept for later requests.
        max_pictures: pictures of a request.
        max_pixels: width x height of a picture.
        max_picture_bytes: size of a picture that the server fetches or reads.
        fetch_seconds: time for fetching a picture.
        api_keys: accepted keys; without any, everybody may ask.
        own_names: names by which clients may call a server without keys, whose web page alone may ask then besides
            those of `cors_origins`, see `mindvlm.serving.sites.own_names`; without any, no request is refused for this.
        cors_origins: origins of web pages that may ask; "*" for all.
        picture_hosts: hosts from which pictures are fetched, "host" or "*.domain", also with ":port"; "*" for all that
            are public.
        media_path: folder of pictures that `file://` URLs may name.
        model_name: name of the model for clients; None for that of its config.
        reuses_prompts: whether keys and values of finished answers are used again for prompts with the same beginning;
            only with an engine that `is_exact`.
        any_model: whether a request may name any model.
        has_picture_process: whether a fork of the server's process encodes pictures, where that is possible; only in a
            process in which MindSpore has run no graph yet.
    """

    num_slots: int = 8
    max_waiting: int = 64
    max_seconds: float = 1800
    max_waiting_bytes: int = 1024 * MEBIBYTE
    max_body_bytes: int = 64 * MEBIBYTE
    max_bodies_bytes: int = 256 * MEBIBYTE
    body_seconds: float = 60
    picture_cache_bytes: int = 256 * MEBIBYTE
    max_pictures: int = 16
    max_pixels: int = 50_000_000
    max_picture_bytes: int = 32 * MEBIBYTE
    fetch_seconds: float = 20
    api_keys: tuple[str, ...] = ()
    own_names: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    picture_hosts: tuple[str, ...] = ()
    media_path: Path | None = None
    model_name: str | None = None
    any_model: bool = False
    reuses_prompts: bool = True
    has_picture_process: bool = False
