"""Reads torch pickles without the ability to execute code.

A pickle is a program for a stack machine. This machine has only the instructions that build plain data: a global is an
inert name, a call looks up a short table of functions that return plain data, and everything else is refused. Limits on
the length and number of instructions bound the memory; instructions that allocate memory up front (large memo indices,
byte arrays) are missing.

Source: the instruction set of the Python standard library's `pickletools`, protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from mindvlm.checkpoint.untrusted import quoted

_MAX_BYTES = 16 * 1024 * 1024
_MAX_INSTRUCTIONS = 2_000_000
_MARK = object()


class PickleRefused(Exception):
    """The pickle is damaged or uses a feature that plain tensors do not need; the message names it."""


@dataclass(frozen=True)
class Global:
    """A name of code that the pickle mentions; it is never imported."""

    name: str


class Machine:
    """Runs one pickle from `file`, leaving the file position behind its end.

    `calls` maps the dotted name of a global to the function that handles its calls; `storage` resolves a persistent id.
    Containers become dict, list and tuple; state set on objects is dropped.
    """

    def __init__(
        self, file: BinaryIO, *, calls: Mapping[str, Callable[..., Any]], storage: Callable[[Any], Any], known: set[str]
    ):
        self._file = file
        self._calls = calls
        self._storage = storage
        self._known = known | set(calls)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._left = _MAX_BYTES

    def run(self) -> Any:
        """Returns the object that the pickle describes.

        Raises:
            PickleRefused: damaged, too large, or anything but plain data and tensors.
        """
        try:
            for _ in range(_MAX_INSTRUCTIONS):
                opcode = self._take(1)
                if opcode == b".":
                    return self._pop()
                step = _STEPS.get(opcode)
                if step is None:
                    raise PickleRefused(f"uses the pickle instruction {opcode!r}, which weights do not need")
                step(self)
        except (IndexError, KeyError, TypeError, ValueError, struct.error, RecursionError) as error:
            raise PickleRefused("holds a damaged pickle") from error
        raise PickleRefused(f"holds a pickle of more than {_MAX_INSTRUCTIONS} instructions")

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise PickleRefused(f"holds a pickle of more than {_MAX_BYTES} bytes")
        data = self._file.read(count)
        if len(data) != count:
            raise PickleRefused("ends in the middle of its pickle")
        self._left -= count
        return data

    def _number(self, code: str) -> int:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _line(self) -> str:
        data = self._file.readline(1024)
        if not data.endswith(b"\n"):
            raise PickleRefused("holds a damaged pickle")
        self._left -= len(data)
        return data[:-1].decode("utf-8")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise PickleRefused("holds a damaged pickle")
        return value

    def _pop_to_mark(self) -> list[Any]:
        index = len(self._stack) - 1
        while self._stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise PickleRefused("holds a damaged pickle")
        values = self._stack[index + 1 :]
        del self._stack[index:]
        return values

    def _container(self, kind: type) -> Any:
        value = self._stack[-1]
        if type(value) is not kind:
            raise PickleRefused("holds a damaged pickle")
        return value

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _push_tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    def _push_global(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self._known:
            raise PickleRefused(f"uses {quoted(full)}, which weights do not need")
        self._push(Global(full))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleRefused("holds a damaged pickle")
        self._push_global(module, name)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        answer = self._calls.get(function.name) if isinstance(function, Global) else None
        if answer is None or not isinstance(arguments, tuple):
            raise PickleRefused("calls something that is not a tensor constructor")
        self._push(answer(*arguments))

    def _set_items(self, values: list[Any]) -> None:
        table = self._container(dict)
        # Only flat keys: hashing a deeply nested tuple would overflow the C stack. Only small numbers: large ones can
        # be chosen so that all fall into one slot of the table, which then takes hours to fill.
        if not all(type(key) in (str, bytes) or type(key) is int and abs(key) < 1 << 31 for key in values[::2]):
            raise PickleRefused("uses a table with keys that are not names")
        for index in range(0, len(values), 2):
            table[values[index]] = values[index + 1]

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _append(self) -> None:
        value = self._pop()
        self._container(list).append(value)

    def _append_all(self) -> None:
        values = self._pop_to_mark()
        self._container(list).extend(values)

    def _memoize(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _text(self, code: str) -> None:
        self._push(self._take(self._number(code)).decode("utf-8", "surrogatepass"))

    def _bytes(self, code: str) -> None:
        self._push(self._take(self._number(code)))

    def _long(self, code: str) -> None:
        self._push(int.from_bytes(self._take(self._number(code)), "little", signed=True))


_STEPS: dict[bytes, Callable[[Machine], None]] = {
    b"\x80": lambda m: m._take(1) and None,
    b"\x95": lambda m: m._take(8) and None,
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"J": lambda m: m._push(m._number("i")),
    b"K": lambda m: m._push(m._number("B")),
    b"M": lambda m: m._push(m._number("H")),
    b"\x8a": lambda m: m._long("B"),
    b"\x8b": lambda m: m._long("I"),
    b"G": lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
    b"X": lambda m: m._text("I"),
    b"\x8c": lambda m: m._text("B"),
    b"\x8d": lambda m: m._text("Q"),
    b"B": lambda m: m._bytes("I"),
    b"C": lambda m: m._bytes("B"),
    b"\x8e": lambda m: m._bytes("Q"),
    b"T": lambda m: m._bytes("I"),
    b"U": lambda m: m._bytes("B"),
    b"}": lambda m: m._push({}),
    b"]": lambda m: m._push([]),
    b")": lambda m: m._push(()),
    b"(": lambda m: m._push(_MARK),
    b"t": lambda m: m._push(tuple(m._pop_to_mark())),
    b"\x85": lambda m: m._push_tuple(1),
    b"\x86": lambda m: m._push_tuple(2),
    b"\x87": lambda m: m._push_tuple(3),
    b"l": lambda m: m._push(m._pop_to_mark()),
    b"s": lambda m: m._set_item(),
    b"u": lambda m: m._set_items(m._pop_to_mark()),
    b"a": lambda m: m._append(),
    b"e": lambda m: m._append_all(),
    b"0": lambda m: m._stack.pop() and None,
    b"1": lambda m: m._pop_to_mark() and None,
    b"2": lambda m: m._push(m._stack[-1]),
    b"q": lambda m: m._memoize(m._number("B")),
    b"r": lambda m: m._memoize(m._number("I")),
    b"\x94": lambda m: m._memoize(len(m._memo)),
    b"h": lambda m: m._push(m._memo[m._number("B")]),
    b"j": lambda m: m._push(m._memo[m._number("I")]),
    b"c": lambda m: m._push_global(m._line(), m._line()),
    b"\x93": lambda m: m._stack_global(),
    b"R": lambda m: m._reduce(),
    b"b": lambda m: m._pop() and None,
    b"Q": lambda m: m._push(m._storage(m._pop())),
}
