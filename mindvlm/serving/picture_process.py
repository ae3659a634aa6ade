"""A process that decodes and encodes pictures, while the process of the server generates answers.

It is a fork of the server's process, so both share the memory of the weights. Threads would not help: MindSpore runs
graphs of one process one after the other, and Python runs one thread at a time.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import pickle
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from mindvlm.core.errors import UserError
from mindvlm.core.host_cpus import num_threads
from mindvlm.core.processes import die_with_parent
from mindvlm.native.library import open_library
from mindvlm.processing.images.picture import Picture
from mindvlm.serving.pictures import LargePictureError, decode_picture
from mindvlm.serving.warming import warm_pictures
from mindvlm.sessions.vision_language_model import VisionLanguageModel

logger = logging.getLogger(__name__)

READY = b"R"

READY_SECONDS = 180
"""Time for the start of the process beyond that of the server."""

SILENT_SECONDS = 300
"""A process that gives no result for this time is ended."""

MAX_TOGETHER, TOGETHER_SECONDS = 8, 0.05
"""Files that the process encodes together at most, and the time after which it takes no other one."""

MINDSPORE_THREADS = "ActorThread"
"""Name of the threads that run operators and graphs."""

FILE = struct.Struct("<QQ??")
"""Before the content of a file: its number and size, whether it may be large, whether answers are generated."""

RESULTS = struct.Struct("<Q")
"""Before pickled results: their size."""

Result = Picture | UserError | LargePictureError | None
"""None for a picture that the process could not encode for another reason than its file."""


class SilenceError(Exception):
    """The process gives no results."""


class PictureProcess:
    """The process as the server sees it.

    Args:
        pid: of the process.
        connection: to it.

    Attributes:
        has_ended: whether it gives no pictures any more.
    """

    def __init__(self, pid: int, connection: socket.socket):
        self.pid, self.connection, self.has_ended = pid, connection, False
        self.numbers = itertools.count()
        self.expected: dict[int, asyncio.Future[Result]] = {}
        self.receiving: asyncio.Task | None = None
        self.sending = asyncio.Lock()
        self.ending, self.is_reaped = threading.Lock(), False

    def wait_until_ready(self) -> bool:
        """Returns whether the process has compiled its graphs; if not, it is ended."""
        self.connection.settimeout(READY_SECONDS)
        with contextlib.suppress(OSError):
            if self.connection.recv(1) == READY:
                return True
        self.end()
        return False

    async def picture(self, content: bytes, *, takes_large: bool, is_busy: bool) -> Picture | None:
        """Returns the encoded picture of a file; None if the process cannot give it. Errors as in `decode_picture`.

        Args:
            is_busy: whether answers are generated, to which the process then leaves half of the CPUs.
        """
        number = next(self.numbers)
        self.expected[number] = future = asyncio.get_running_loop().create_future()
        try:
            # one after the other, so that at most one file is in the buffer of the connection
            async with self.sending:
                await self.connect()
                if self.has_ended:
                    return None
                with contextlib.suppress(ConnectionError):
                    self.writer.write(FILE.pack(number, len(content), takes_large, is_busy))
                    self.writer.write(content)
                    await self.writer.drain()
            result = await future
        finally:
            self.expected.pop(number, None)
        if isinstance(result, Exception):
            raise result
        return result

    async def connect(self) -> None:
        """Opens the connection in the event loop at the first use."""
        if self.receiving is None and not self.has_ended:
            reader, self.writer = await asyncio.open_connection(sock=self.connection)
            self.receiving = asyncio.create_task(self.receive(reader))

    async def receive(self, reader: asyncio.StreamReader) -> None:
        """Hands out results until the process ends."""
        try:
            while True:
                (size,) = RESULTS.unpack(await self.unless_silent(reader.readexactly(RESULTS.size)))
                for number, result in pickle.loads(await reader.readexactly(size)):
                    self.hand_out(number, result)
        except Exception as error:  # the connection is closed, or a killed process has sent a part of something
            if not self.has_ended:
                what = "is silent" if isinstance(error, SilenceError) else "has ended"
                logger.error("the picture process %s; the process of the server encodes pictures from now on", what)
        finally:
            self.end()
            self.writer.transport.abort()
            for number in list(self.expected):
                self.hand_out(number, None)

    async def unless_silent(self, reading: Coroutine[Any, Any, bytes]) -> bytes:
        """Returns what is read. Raises SilenceError if a picture is expected for a long time."""
        task = asyncio.ensure_future(reading)
        try:
            while not task.done():
                expected = set(self.expected)
                await asyncio.wait([task], timeout=SILENT_SECONDS)
                if not task.done() and expected & set(self.expected):
                    raise SilenceError
            return task.result()
        finally:
            task.cancel()

    def hand_out(self, number: int, result: Result) -> None:
        future = self.expected.get(number)
        if future and not future.done():
            future.set_result(result)

    def end(self) -> None:
        """Ends the process. May be called from any thread, and again."""
        self.has_ended = True
        with self.ending:
            # afterwards another process may have its number
            if not self.is_reaped:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.is_reaped = True


def start_picture_process(model: VisionLanguageModel) -> PictureProcess | None:
    """Returns a process with a model that was just loaded; None where it has no use or is not possible."""
    engine = model.engine
    # without the kernels, features of pictures that are encoded together differ from those of single ones
    if not (sys.platform == "linux" and engine.is_exact and engine.runner.graph_mode) or num_threads() < 2:
        return None
    if has_mindspore_threads():
        logger.error("MindSpore has started its threads too early; the process of the server encodes pictures")
        return None
    ours, theirs = socket.socketpair()
    try:
        pid = os.fork()
    except OSError as error:
        logger.error("no picture process can be started (%s); the process of the server encodes pictures", error)
        return None
    if pid == 0:
        serve_pictures(model, theirs)
    theirs.close()
    logger.info("a process of its own encodes pictures")
    return PictureProcess(pid, ours)


def has_mindspore_threads() -> bool:
    """Whether MindSpore has run an operator or a graph. A fork would wait for ever for threads of its parent."""
    for number in os.listdir("/proc/self/task"):
        # a thread may end meanwhile
        with contextlib.suppress(OSError):
            if Path(f"/proc/self/task/{number}/comm").read_text().startswith(MINDSPORE_THREADS):
                return True
    return False


def serve_pictures(model: VisionLanguageModel, connection: socket.socket) -> NoReturn:
    """Reads the pictures that come over a connection, until its other end is closed."""
    try:
        leave_server(connection)
        warm_pictures(model)
        connection.sendall(READY)
        PictureWorker(model, connection).run()
    except BaseException:
        logger.exception("the picture process fails")
    finally:
        # not the ends of the server, such as the removal of its temporary folders
        os._exit(1)


def leave_server(connection: socket.socket) -> None:
    """Gives up what a fork of the server shares with it."""
    die_with_parent()
    # a collection would copy the memory of all objects
    gc.freeze()
    signal.set_wakeup_fd(-1)
    # the server ends after the answers that are under way
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # clients would wait for the end of connections that the server has closed
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) != connection.fileno() and stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.close(int(name))


@dataclass
class Task:
    """A file to read.

    Attributes:
        is_decoded: whether a thread has decoded it, because it is large.
        result: that of the thread.
    """

    number: int
    content: bytearray
    takes_large: bool
    is_busy: bool
    is_decoded: bool = False
    result: Result = None


class PictureWorker:
    """The process: decodes and encodes the files that have come, several at a time.

    Args:
        model: encodes them; its encoder keeps recent features.
        connection: brings files and takes pictures.
    """

    def __init__(self, model: VisionLanguageModel, connection: socket.socket):
        self.model, self.connection = model, connection
        self.all_threads = self.used_threads = num_threads()
        self.for_large = ThreadPoolExecutor(1, "large picture")
        self.large: SimpleQueue[Task] = SimpleQueue()
        # a byte for each task in `large`
        self.bell, self.ring = socket.socketpair()

    def run(self) -> NoReturn:
        while True:
            results = pickle.dumps(self.next_results(), pickle.HIGHEST_PROTOCOL)
            self.connection.sendall(RESULTS.pack(len(results)))
            self.connection.sendall(results)

    def next_results(self) -> list[tuple[int, Result]]:
        """Waits for a file, and returns the numbers and results of those that have come."""
        start, results, task = time.monotonic(), {}, None
        while task is None or (
            len(results) < MAX_TOGETHER and time.monotonic() - start < TOGETHER_SECONDS and self.readable(0)
        ):
            task = self.next_task()
            if task.is_decoded:
                results[task.number] = task.result
            elif task.takes_large:
                self.for_large.submit(self.decode_large, task)
            else:
                results[task.number] = self.decoded(task)
        self.use_threads(max(1, self.all_threads // 2) if task.is_busy else self.all_threads)
        self.encode(results)
        return list(results.items())

    def readable(self, seconds: float | None) -> list[socket.socket]:
        """Returns the sockets that have something to read; waits for one for a time, None for ever."""
        return select.select([self.connection, self.bell], [], [], seconds)[0]

    def next_task(self) -> Task:
        """Returns the next file, or the next large one that is decoded."""
        if self.bell in self.readable(None):
            self.bell.recv(1)
            return self.large.get()
        number, size, takes_large, is_busy = FILE.unpack(self.received(FILE.size))
        return Task(number, self.received(size), takes_large, is_busy)

    def received(self, size: int) -> bytearray:
        """Returns the next bytes of the connection. The process ends if the server has ended."""
        content = bytearray(size)
        rest = memoryview(content)
        while rest:
            count = self.connection.recv_into(rest)
            if count == 0:
                os._exit(0)
            rest = rest[count:]
        return content

    def use_threads(self, count: int) -> None:
        """Lets the kernels use a number of threads."""
        if count != self.used_threads:
            open_library().call("mindvlm_set_num_threads", count)
            self.used_threads = count

    def encode(self, results: dict[int, Result]) -> None:
        """Encodes the pictures among results."""
        decoded = {number: result for number, result in results.items() if isinstance(result, Picture)}
        try:
            features = self.model.encoder.encode_views(list(decoded.values()))
            for (number, picture), one in zip(decoded.items(), features, strict=True):
                results[number] = Picture((), picture.layout, picture.num_fixed, one.asnumpy())
        except Exception:
            logger.exception("pictures cannot be encoded")
            results |= dict.fromkeys(decoded)

    def decode_large(self, task: Task) -> None:
        """Decodes a file in a thread, and queues it again."""
        task.result, task.is_decoded = self.decoded(task), True
        self.large.put(task)
        self.ring.send(b"R")

    def decoded(self, task: Task) -> Result:
        """Returns the picture of a file, which is not encoded yet."""
        try:
            return decode_picture(self.model.processor, bytes(task.content), takes_large=task.takes_large)
        except (UserError, LargePictureError) as error:
            return error
        except Exception:
            logger.exception("a picture cannot be decoded")
            return None
