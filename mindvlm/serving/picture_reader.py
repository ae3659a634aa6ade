"""Reading of the pictures of requests: from the cache, in the picture process, or in threads."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Sequence

from mindvlm.core.errors import UserError
from mindvlm.processing.chat_processor import ChatProcessor
from mindvlm.processing.images.picture import Picture
from mindvlm.serving.errors import bad_field
from mindvlm.serving.messages import PictureUrl
from mindvlm.serving.picture_process import PictureProcess
from mindvlm.serving.pictures import MAX_SMALL_URL, LargePictureError, decode_picture
from mindvlm.serving.prompts import picture_bytes
from mindvlm.serving.responses import uncancelled
from mindvlm.serving.scheduler import Scheduler

MAX_DECODED = 2
"""Requests whose pictures are decoded in threads at the same time, which limits the memory for them."""

MAX_ENCODED = 8
"""Requests whose pictures the picture process has at the same time."""

File = tuple[PictureUrl, bytes]


class PictureReader:
    """Reads the pictures of requests, and keeps recent ones.

    Args:
        scheduler: has the model and its picture process.
        max_bytes: limit of the pictures that are kept.
    """

    def __init__(self, scheduler: Scheduler, max_bytes: int):
        self.scheduler, self.cache = scheduler, PictureCache(max_bytes)
        self.decoding, self.encoding = asyncio.Semaphore(MAX_DECODED), asyncio.Semaphore(MAX_ENCODED)
        self.large = asyncio.Semaphore(1)

    @property
    def process(self) -> PictureProcess | None:
        """The picture process, unless it has ended."""
        process = self.scheduler.picture_process
        return process if process and not process.has_ended else None

    async def read(self, files: Sequence[File]) -> list[Picture]:
        """Returns the pictures of a request; they are encoded if there is a picture process.

        Raises:
            ApiError: a picture cannot be read or exceeds a limit.
        """
        digests = [await digest_of_file(content) for _, content in files]
        kept = [self.cache.get(digest) for digest in digests]
        missing: dict[bytes, File] = {}
        for digest, file, one in zip(digests, files, kept, strict=True):
            if one is None:
                missing.setdefault(digest, file)
        if not missing:
            return kept
        read = dict(zip(missing, await self.read_missing(list(missing.values())), strict=True))
        for digest, picture in read.items():
            self.cache.keep(digest, picture)
        return [read[digest] if one is None else one for digest, one in zip(digests, kept, strict=True)]

    async def read_missing(self, files: Sequence[File]) -> list[Picture]:
        """Returns the pictures of files that are not in the cache."""
        places = self.encoding if self.process else self.decoding
        try:
            async with places:
                return await uncancelled(self.read_all(files, takes_large=False))
        except LargePictureError:
            # one after the other, so that small pictures never wait for several
            async with self.large, places:
                return await uncancelled(self.read_all(files, takes_large=True))

    async def read_all(self, files: Sequence[File], *, takes_large: bool) -> list[Picture]:
        """Returns the pictures of files. Raises ApiError, or LargePictureError as `decode_picture` does."""
        pictures: list[Picture | None] = [None] * len(files)
        if process := self.process:
            is_busy = bool(self.scheduler.running)
            answers = (process.picture(content, takes_large=takes_large, is_busy=is_busy) for _, content in files)
            # all are waited for, so that the process has none of a request that has ended
            results = await asyncio.gather(*map(named_errors, files, answers), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            pictures = list(results)
        processor = self.scheduler.model.processor
        for number, (file, picture) in enumerate(zip(files, pictures, strict=True)):
            if picture is None:
                reading = asyncio.to_thread(decode_here, processor, file[1], takes_large=takes_large)
                pictures[number] = await named_errors(file, reading)
        return pictures


class PictureCache:
    """Recently read pictures by the digest of their files.

    Args:
        max_bytes: limit of what is kept.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.pictures: OrderedDict[bytes, Picture] = OrderedDict()

    def get(self, digest: bytes) -> Picture | None:
        """Returns the picture of a file if it is kept."""
        if digest in self.pictures:
            self.pictures.move_to_end(digest)
        return self.pictures.get(digest)

    def keep(self, digest: bytes, picture: Picture) -> None:
        """Keeps a picture, and drops the least recently used ones beyond the limit."""
        if digest not in self.pictures:
            self.pictures[digest] = picture
            self.num_bytes += picture_bytes(picture)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= picture_bytes(self.pictures.popitem(last=False)[1])


async def digest_of_file(content: bytes) -> bytes:
    """Returns the SHA-256 of a file. A large file does not delay other requests."""
    if len(content) > MAX_SMALL_URL:
        return await asyncio.to_thread(digest, content)
    return digest(content)


def digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def decode_here(processor: ChatProcessor, content: bytes, *, takes_large: bool) -> Picture:
    """Returns a picture that the scheduler encodes; arguments and errors as in `decode_picture`."""
    picture = decode_picture(processor, content, takes_large=takes_large)
    # computed here, because the scheduler needs them while other answers wait
    _ = picture.digests
    return picture


async def named_errors(file: File, reading: Awaitable[Picture | None]) -> Picture | None:
    """Returns the result of a coroutine. Raises ApiError with the place of the picture in the request if it fails."""
    try:
        return await reading
    except UserError as error:
        raise bad_field(file[0].param, str(error).removeprefix("the image: ")) from None
