"""A digest of everything that shapes a compiled graph.

Two Cells with equal digests compile to the same graph: `graph_key` covers what a Cell holds (sizes, scales, constant
tensors, operators, names and shapes of parameters), the code of its class and of everything that this code names, the
source files of that code, the shapes of the inputs, and versions and settings of MindSpore. Values of parameters are no
part of a graph and not covered. An object that the digest cannot cover raises `NoKeyError`.
"""

import ctypes
import enum
import functools
import hashlib
import os
import platform
import sys
import types
from collections import deque
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

PLAIN = {type(None), bool, int, float, complex, str, bytes, type(...), range, slice}
SCALARS = (*PLAIN, np.generic, np.dtype, enum.Enum)
SETTINGS = ("device_target", "jit_level", "jit_syntax_level", "deterministic", "enable_graph_kernel")
FOREIGN = {*sys.stdlib_module_names, "mindspore", "numpy"}
# Attributes of every Cell that differ between processes or change when it is compiled, and shape no graph.
VOLATILE = {
    *("_create_time", "_id", "_compile_phase", "_compile_cache", "_phase_cache", "_compiled", "_init_flag"),
    *("_exist_objs", "_exist_names", "_scope", "_param_prefix", "_jit_graph_name", "_is_check_and_refresh"),
    *("arguments_key", "cls_name", "is_top_cell", "_mutable_flags", "_has_mutable_args_list", "__parse_method__"),
    *("__compile_cell_hook__", "current_phase", "sequence_modified"),
}


class NoKeyError(Exception):
    """The digest cannot cover an object. The text names its type."""


def graph_key(graph: nn.Cell, inputs: tuple[Tensor, ...]) -> str:
    """Returns the digest of the graph that a Cell compiles to for inputs of these shapes and dtypes.

    Raises:
        NoKeyError: the digest cannot cover something that the Cell holds.
    """
    key = _Key()
    key.add(environment())
    key.add(graph)
    for value in inputs:
        if type(value) is not Tensor or value.const_arg:
            raise NoKeyError(f"an input of type {type(value).__name__}")
        key.add((value.shape, str(value.dtype)))
    key.add_code()
    if key.parameters.keys() - {id(value) for value in graph.get_parameters()}:
        raise NoKeyError("a Parameter outside of the Cells")
    return key.hexdigest()


def environment() -> tuple:
    """Returns versions, settings and environment variables that may change a graph."""
    settings = tuple(str(ms.get_context(name)) for name in SETTINGS)
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith("MS_"))
    return (ms.__version__, np.__version__, sys.version, platform.machine(), settings, tuple(variables))


class _Key:
    """Collects one line for everything that is met; a line begins with its kind."""

    def __init__(self):
        self.lines: list[str] = []
        self.numbers: dict[int, int] = {}
        self.alive: list[Any] = []
        self.names: set[str] = set()
        self.parameters: dict[int, Parameter] = {}
        self.code: deque = deque()
        self.files: set[str] = set()

    def hexdigest(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    def write(self, kind: str, value: Any = "") -> None:
        self.lines.append(f"{kind} {value!r}")

    def write_bytes(self, kind: str, data) -> None:
        self.lines.append(f"{kind} {hashlib.sha256(data).hexdigest()}")

    def is_new(self, value: Any) -> bool:
        """Numbers an object; one that is met again is written as its number."""
        number = self.numbers.setdefault(id(value), len(self.numbers))
        if number < len(self.alive):
            self.write("again", number)
            return False
        # an id is unique only while the object lives
        self.alive.append(value)
        return True

    def add(self, value: Any) -> None:
        """Adds a value, with everything that it holds."""
        kind = type(value)
        if kind in PLAIN or isinstance(value, SCALARS):
            self.lines.append(f"{kind.__name__} {value!r}")
        elif isinstance(value, Path):
            self.write("path", str(value))
        elif isinstance(value, types.ModuleType):
            self.write("module", value.__name__)
        elif isinstance(value, type | types.FunctionType | functools._lru_cache_wrapper):
            self.add_later(value)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | np.ufunc):
            self.write("builtin", getattr(value, "__qualname__", value.__name__))
        elif kind.__module__.startswith("mindspore._c_expression.typing"):
            self.write("dtype", str(value))
        elif self.is_new(value):
            self.add_object(value)

    def add_object(self, value: Any) -> None:
        kind = type(value)
        self.write("object", kind.__name__)
        if isinstance(value, list | tuple | deque):
            self.write("length", len(value))
            for item in value:
                self.add(item)
        elif isinstance(value, dict | types.MappingProxyType):
            self.add_mapping(value.items())
        elif isinstance(value, set | frozenset):
            self.write("set", sorted(map(repr, value)))
        elif isinstance(value, Parameter):
            self.add_parameter(value)
        elif isinstance(value, np.ndarray):
            self.add_array(value)
        elif isinstance(value, Tensor):
            self.add_tensor(value)
        elif isinstance(value, nn.Cell):
            self.add_later(kind)
            self.add_mapping(sorted(held_by(value).items()))
        elif isinstance(value, ops.Primitive):
            self.add_later(kind)
            self.write("primitive", value.name)
            self.add_mapping(sorted(value.get_attr_dict().items()))
            self.add_mapping(sorted(vars(value).items()))
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, functools.partial):
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, property | staticmethod | classmethod):
            self.add([getattr(value, name, None) for name in ("fget", "fset", "fdel", "__func__")])
        elif isinstance(value, ctypes.CDLL):
            self.write("library", value._name)
        elif hasattr(kind, "graph_key"):
            self.add_later(kind)
            self.add(value.graph_key())
        elif hasattr(value, "__dict__") and not is_foreign(kind):
            self.add_later(kind)
            self.add_mapping(sorted(vars(value).items()))
        else:
            raise NoKeyError(f"{kind.__module__}.{kind.__qualname__}")

    def add_mapping(self, items) -> None:
        for name, item in items:
            self.add(name)
            self.add(item)
        self.write("end")

    def add_parameter(self, value: Parameter) -> None:
        # MindSpore fills a stored graph by the names of parameters
        self.parameters[id(value)] = value
        if value.name in self.names:
            raise NoKeyError(f"two Parameters of the name {value.name}")
        self.names.add(value.name)
        self.write("parameter", (value.name, value.shape, str(value.dtype), value.requires_grad))

    def add_array(self, value: np.ndarray) -> None:
        if value.dtype.hasobject:
            raise NoKeyError("an array of objects")
        self.write("array", (value.shape, value.dtype.str))
        self.write_bytes("values", np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def add_tensor(self, value: Tensor) -> None:
        if value.has_init:
            raise NoKeyError("a Tensor without values")
        self.write("tensor", (str(value.dtype), value.const_arg))
        self.add_array((value.astype(ms.float32) if value.dtype == ms.bfloat16 else value).asnumpy())

    def add_later(self, value: Any) -> None:
        """Adds a class or function; their code is added by `add_code`."""
        if is_foreign(value):
            self.write("foreign", f"{value.__module__}.{value.__qualname__}")
        elif self.is_new(value):
            self.write("code", value.__qualname__)
            self.code.append(value)

    def add_code(self) -> None:
        """Adds the code of all classes and functions, and everything that it names."""
        while self.code:
            value = self.code.popleft()
            if isinstance(value, type):
                self.add_class(value)
            elif isinstance(value, types.FunctionType):
                self.add_function(value)
            else:
                self.add(value.__wrapped__)
        for file in sorted(self.files):
            try:
                self.write_bytes("file", Path(file).read_bytes())
            except OSError:
                raise NoKeyError(f"code without a source file, {file}") from None

    def add_class(self, value: type) -> None:
        for base in value.__bases__:
            self.add(base)
        for name, item in vars(value).items():
            if isinstance(item, types.FunctionType) or not name.startswith("__"):
                self.write("name", name)
                self.add_named(item)

    def add_function(self, value: types.FunctionType) -> None:
        held = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        for item in (*held, *(cell.cell_contents for cell in value.__closure__ or ())):
            self.add_named(item)
        if not value.__code__.co_filename.startswith("<"):
            self.files.add(value.__code__.co_filename)
        for name in self.add_instructions(value.__code__):
            if name in value.__globals__:
                self.add_named(value.__globals__[name])

    def add_instructions(self, code: types.CodeType) -> list[str]:
        """Adds a code object; returns the names that it reads."""
        names = [*code.co_names]
        self.write_bytes("instructions", code.co_code)
        self.write("names", (code.co_names, code.co_varnames, code.co_freevars))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                names += self.add_instructions(constant)
            else:
                self.add(constant)
        return names

    def add_named(self, value: Any) -> None:
        """Adds a value that code names. A graph holds none of a type without a digest, such as a lock or a logger."""
        try:
            self.add(value)
        except NoKeyError:
            self.write("other", type(value).__qualname__)


def is_foreign(value: type | types.FunctionType) -> bool:
    """Whether a class or function belongs to Python, MindSpore or numpy, whose versions are a part of every key."""
    return (getattr(value, "__module__", None) or "").partition(".")[0] in FOREIGN


def held_by(cell: nn.Cell) -> dict[str, Any]:
    """Returns the attributes of a Cell that may shape a graph; of those that every Cell has, only what is set.

    A Cell names in `ONLY_IN_TRAINING` the attributes that its `construct` reads in training alone.
    """
    names = vars(cell).keys() - VOLATILE
    if not cell.training:
        names -= getattr(cell, "ONLY_IN_TRAINING", frozenset())
    unset = {name for name in names & base_attributes() if not vars(cell)[name]}
    return {name: vars(cell)[name] for name in names - unset}


@functools.cache
def base_attributes() -> frozenset[str]:
    return frozenset({*vars(nn.Cell()), "_func_graph_flags"})
