"""Reads torch pickles without the ability to execute code.

A pickle is a program for a stack machine. This machine has only the instructions that build plain data. A global is an
inert name, and so is its attribute. A call looks up a short table of functions that return plain data; an object of
any other class becomes an `Opaque` without its state. Calls of other functions, and names of the standard library that
are not on a list, are refused: weights do not need them, attacks do. Limits on the length and number of instructions
bound the memory; instructions that allocate memory up front (large memo indices, byte arrays) are missing.

Source: the instruction set of the Python standard library's `pickletools`, protocols 2 to 5.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from mindvlm.checkpoint.untrusted import quoted

_MAX_BYTES = 16 * 1024 * 1024
_MAX_INSTRUCTIONS = 2_000_000
_MAX_NAME = 1024
_MARK = object()
_STANDARD_LIBRARY = sys.stdlib_module_names | {"__builtin__", "copy_reg"}
_BUILTINS = (
    "bool|bytearray|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple|long|unicode|xrange"
    r"|[A-Z]\w*|enumerate|filter|iter|map|reduce|reversed|type|zip"
)
_INERT = re.compile(
    rf"(builtins|__builtin__)\.({_BUILTINS})"
    r"|(copyreg|copy_reg)\._reconstructor|_codecs\.encode|_?functools\.(partial|reduce)"
    r"|types\.(SimpleNamespace|GenericAlias)|typing\.\w+|re\.(_compile|RegexFlag)"
    r"|argparse\.Namespace|collections\.\w+|datetime\.\w+|decimal\.Decimal|fractions\.Fraction|uuid\.UUID"
    r"|pathlib(\._local)?\.\w+|_?io\.(BytesIO|StringIO)|logging\.(Logger|getLogger)|random\.Random"
    r"|operator\.(itemgetter|attrgetter|methodcaller)|itertools\.\w+|array\.(array|_array_reconstructor)|enum\.\w+"
    r"|zoneinfo\.ZoneInfo(\._unpickle)?|time\.struct_time|string\.Template|(dataclasses|inspect|ipaddress)\.\w+"
    r"|(http|urllib\.parse)\.[A-Z]\w*"
    r"|numpy\.(\w*int\d+|float\d+|bool_?|dtype|ndarray|_?core\.(multiarray|numeric)\.(_reconstruct|scalar|_frombuffer))"
    r"|numpy\.random\._pickle\.\w+"
)
"""Names whose calls only build data."""
_NAMED = re.compile(
    r"(builtins|__builtin__)\.(abs|all|any|ascii|bin|callable|chr|unichr|divmod|format|hash|hex|id"
    r"|isinstance|issubclass|len|max|min|next|oct|ord|pow|print|property|repr|round|sorted|sum"
    rf"|({_BUILTINS})\.[a-z]\w*)|(math|operator|_operator)\.\w+"
)
"""Names that may stand in settings and are not called."""
_ATTRIBUTE = ("builtins.getattr", "__builtin__.getattr")


class PickleRefused(Exception):
    """The pickle is damaged or uses a feature that plain tensors do not need; the message names it."""


@dataclass(frozen=True)
class Global:
    """A name of code that the pickle mentions; it is never imported."""

    name: str


@dataclass(slots=True)
class Opaque:
    """An object of a class that this machine does not know.

    Attributes:
        name: name of the class.
        entries: the entries of a kind of dict; lists, sets and attributes are dropped.
    """

    name: str
    entries: dict[Any, Any] = field(default_factory=dict)


class Machine:
    """Runs one pickle from `file`, leaving the file position behind its end.

    Containers become dict, list and tuple. State set on objects is dropped, and so are entries of tables whose keys are
    neither names nor small numbers.

    Args:
        file: contains the pickle.
        calls: dotted name of a global -> the function that handles its calls.
        storage: resolves a persistent id.
        known: names of further globals, which cannot be called.
        reserved: modules of which all other names are refused.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        calls: Mapping[str, Callable[..., Any]],
        storage: Callable[[Any], Any],
        known: set[str],
        reserved: Collection[str],
    ):
        self._file = file
        self._calls = {**calls, **dict.fromkeys(_ATTRIBUTE, self._attribute)}
        self._storage = storage
        self._known = known | set(self._calls)
        self._reserved = reserved
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._left = _MAX_BYTES
        self._is_attribute_read = True

    def run(self) -> Any:
        """Returns the object that the pickle describes.

        Raises:
            PickleRefused: damaged, too large, or anything but plain data and tensors.
        """
        try:
            for _ in range(_MAX_INSTRUCTIONS):
                opcode = self._take(1)
                if opcode == b".":
                    if not self._is_attribute_read:
                        raise PickleRefused(f"uses {quoted(_ATTRIBUTE[0])}, which weights do not need")
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
        """Returns the container on top of the stack, a new one for an `Opaque` whose elements are dropped."""
        value = self._stack[-1]
        if type(value) is Opaque:
            return value.entries if kind is dict else kind()
        if type(value) is not kind:
            raise PickleRefused("holds a damaged pickle")
        return value

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _push_tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    def _global(self, module: str, name: str) -> Global:
        if len(module) + len(name) > _MAX_NAME:
            raise PickleRefused("holds a damaged pickle")
        full = f"{module}.{name}"
        is_reserved = module in self._reserved or module.partition(".")[0] in _STANDARD_LIBRARY
        if is_reserved and full not in self._known and not _INERT.fullmatch(full) and not _NAMED.fullmatch(full):
            raise PickleRefused(f"uses {quoted(full)}, which weights do not need")
        self._is_attribute_read &= full not in _ATTRIBUTE
        return Global(full)

    def _attribute(self, owner: Any = None, name: Any = None) -> Global | Opaque:
        """Returns the name of a nested class or of a method; no attribute is read."""
        if not isinstance(name, str):
            raise PickleRefused(f"calls {quoted(_ATTRIBUTE[0])} with something that is not a name")
        self._is_attribute_read = True
        return self._global(owner.name, name) if isinstance(owner, Global) else Opaque(name)

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleRefused("holds a damaged pickle")
        self._push(self._global(module, name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global | Opaque) or not isinstance(arguments, tuple):
            raise PickleRefused("calls something that is not a tensor constructor")
        self._push(Opaque(function.name) if type(function) is Opaque else self.call(function.name, arguments))

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Returns the result of a known function, or the `Opaque` of a class."""
        known = self._calls.get(name)
        if known is not None:
            return known(*arguments)
        is_class = name.rpartition(".")[2].lstrip("_")[:1].isupper()
        if name in self._known or not (is_class or _INERT.fullmatch(name)):
            raise PickleRefused(f"calls something that is not a tensor constructor, {quoted(name)}")
        return Opaque(name)

    def _new_object(self, num_arguments: int) -> None:
        for _ in range(num_arguments):
            self._pop()
        kind = self._pop()
        if not isinstance(kind, Global) or kind.name in self._known:
            what = quoted(kind.name) if isinstance(kind, Global) else "something"
            raise PickleRefused(f"uses the pickle instruction of a new object for {what}, which is not a class")
        self._push(Opaque(kind.name))

    def set_items(self, table: dict[Any, Any], values: list[Any]) -> None:
        """Adds entries to a table; keys and values alternate."""
        for index in range(0, len(values), 2):
            key = values[index]
            # Only flat keys: hashing a deeply nested tuple would overflow the C stack. Only small numbers: large ones
            # can be chosen so that all fall into one slot of the table, which then takes hours to fill.
            if type(key) in (str, bytes) or type(key) is int and abs(key) < 1 << 31:
                table[key] = values[index + 1]

    def _set_items(self, values: list[Any]) -> None:
        self.set_items(self._container(dict), values)

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
    b"c": lambda m: m._push(m._global(m._line(), m._line())),
    b"\x93": lambda m: m._stack_global(),
    b"R": lambda m: m._reduce(),
    b"\x81": lambda m: m._new_object(1),
    b"\x92": lambda m: m._new_object(2),
    b"\x8f": lambda m: m._push(Opaque("builtins.set")),
    b"\x90": lambda m: m._pop_to_mark() and None,
    b"\x91": lambda m: m._pop_to_mark() and None or m._push(Opaque("builtins.frozenset")),
    b"b": lambda m: m._pop() and None,
    b"Q": lambda m: m._push(m._storage(m._pop())),
}
