"""Files of training programs: weights beside settings, configs and states of any class, which are never imported."""

import argparse
import array
import collections
import dataclasses
import datetime
import enum
import http
import io
import ipaddress
import itertools
import logging
import math
import operator
import pathlib
import random
import re
import sys
import time
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mindvlm.checkpoint import open_checkpoint
from tests.checkpoint.samples import storage
from tests.checkpoint.test_bad_files import refused, torch_zip

WEIGHTS = collections.OrderedDict(
    {"a.weight": torch.arange(6.0).reshape(2, 3).bfloat16(), "a.bias": torch.ones(3, dtype=torch.float16)}
)


def new_named(cls, *, a):
    return object.__new__(cls)


@pytest.fixture
def package(monkeypatch):
    """A package that exists only while files are written."""
    module = types.ModuleType("vanished.config")
    classes = {
        "Config": type("Config", (), {}),
        "Table": type("Table", (dict,), {}),
        "Texts": type("Texts", (list,), {}),
        "Point": collections.namedtuple("Point", "x y"),
        "Strategy": enum.Enum("Strategy", {"NO": "no"}),
        "Named": type("Named", (), {"__getnewargs_ex__": lambda self: ((), {"a": 1}), "__new__": new_named}),
        "Flags": enum.IntFlag("Flags", {"A": 1, "B": 2}),
        "_Private": type("_Private", (), {}),
    }
    for name, kind in classes.items():
        kind.__module__, kind.__qualname__ = module.__name__, name
        setattr(module, name, kind)
    nested = type("Nested", (), {"method": lambda self: None})
    nested.__module__, nested.__qualname__ = module.__name__, "Config.Nested"
    classes["Config"].Nested = nested
    module.function = lambda *_: None
    module.function.__module__, module.function.__qualname__ = module.__name__, "function"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "vanished", types.ModuleType("vanished"))
        patch.setitem(sys.modules, module.__name__, module)
        yield module
    assert module.__name__ not in sys.modules


def state(package) -> dict:
    """The other entries of a file mp_rank_00_model_states.pt, and more."""
    config = package.Config()
    config.nested, config.strategy = package._Private(), package.Strategy.NO
    return {
        "buffer_names": ["a.buffer"],
        "optimizer": None,
        "param_shapes": [collections.OrderedDict((name, t.shape) for name, t in WEIGHTS.items())],
        "shared_params": {},
        "sparse_tensor_module_names": {"a", "b"},
        "ds_config": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        "ds_version": "0.14.0",
        "args": argparse.Namespace(
            lr=1e-4, dtype=torch.bfloat16, device=torch.device("cuda", 0), path=pathlib.Path("x")
        ),
        "config": config,
        "table": package.Table(a=1, b=[config]),
        "texts": package.Texts(["a", "b"]),
        "point": package.Point(1, config),
        "flags": package.Flags.A | package.Flags.B,
        "function": package.function,
        "nested": [package.Config.Nested(), package.Config.Nested, package.Config.Nested().method],
        "named": package.Named(a=1),
        "types": [type(None), type(...), ..., NotImplemented, list[int], int | None, type, re.RegexFlag],
        "functions": [len, max, print, sorted, math.sqrt, operator.add, str.lower, "a".upper, torch.tanh],
        "getters": [operator.itemgetter(1), operator.attrgetter("a.b"), operator.methodcaller("a", 1)],
        "iterators": [iter([1]), reversed([1]), zip([1]), map(len, [1]), itertools.count(), array.array("i", [1])],
        "errors": [ValueError("a"), Exception(), KeyboardInterrupt()],
        "settings": [re.I, http.HTTPStatus.OK, dataclasses.MISSING, ipaddress.ip_address("::1"), time.gmtime(0)],
        "keys": {package.Strategy.NO: 1, None: 2, (1, 2): 3, 0.5: 4, True: 5, 2**70: 6, torch.float16: 7},
        "counts": collections.Counter("aab"),
        "defaults": collections.defaultdict(list, {"a": [1]}),
        "losses": collections.deque([1.0, float("nan")], maxlen=4),
        "numbers": [1 + 2j, Fraction(1, 3), frozenset({1}), range(3), slice(1, 2), bytearray(b"ab"), 10**30],
        "numpy": [np.arange(3), np.float32(1), np.int64(2), np.dtype("float16"), np.random.default_rng(0)],
        "random": (torch.get_rng_state(), np.random.get_state()),
        "files": [io.BytesIO(b"state"), logging.getLogger("a"), re.compile("a+"), random.Random(0)],
        "modules": [torch.nn.Linear(2, 2), torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])],
        "dates": [datetime.datetime(2024, 1, 2), datetime.timedelta(1), types.SimpleNamespace(a=1)],
        "dtypes": [torch.complex64, torch.float8_e4m3fn, torch.strided, torch.__version__],
        "module": WEIGHTS,
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_the_weights_come_out_and_nothing_is_imported(package, legacy, protocol, tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
    torch.save(state(package), path, **options)
    del sys.modules[package.__name__]
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.infos) == list(WEIGHTS)
        for name, tensor in WEIGHTS.items():
            assert np.array_equal(checkpoint.read(name).data, storage(tensor))
    assert package.__name__ not in sys.modules


def test_weights_in_an_unknown_kind_of_dict(package, tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"epoch": 1, "state_dict": package.Table(WEIGHTS)}, path)
    assert list(open_checkpoint(path).infos) == list(WEIGHTS)
    torch.save(package.Table(WEIGHTS), path)
    assert list(open_checkpoint(path).infos) == list(WEIGHTS)


def test_tensors_with_attributes(tmp_path):
    weight = torch.nn.Parameter(torch.arange(4.0))
    weight.tensor_model_parallel = True
    torch.save({"a": weight, "b": torch.arange(2)}, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        assert checkpoint.read("a").data.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("file", ["file.bin", "file.safetensors"])
def test_an_empty_table(file, tmp_path):
    if file.endswith(".bin"):
        torch.save({}, tmp_path / file)
    else:
        save_file({}, tmp_path / file)
    refused(tmp_path / file, "holds no tensors; it was saved without weights")
    with open_checkpoint(tmp_path / file, may_be_empty=True) as checkpoint:
        assert not checkpoint.infos


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"module": collections.OrderedDict()}, "but an empty one"),
        ({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1}]}, "but the state of an optimizer"),
        ({"optimizer_state_dict": {"a": 1}, "ds_version": "0.14"}, "but the state of an optimizer"),
        ({"optimizer": {"state": {}, "param_groups": []}, "step": 3}, "but the state of an optimizer"),
        (torch.nn.Linear(2, 2), "but an object of the class 'torch.nn.modules.linear.Linear'; save model.state_dict()"),
        (argparse.Namespace(a=1), "but an object of the class 'argparse.Namespace'"),
        ({"epoch": 1, "lr": 0.1}, "but one with 'epoch', 'lr'; save model.state_dict()"),
        ([torch.ones(2)], "but a list"),
        (torch.ones(2), "but a tensor"),
    ],
)
def test_a_file_without_named_tensors_is_described(content, expected, tmp_path):
    torch.save(content, tmp_path / "file.bin")
    assert f"file.bin: holds no table of named tensors {expected}" in refused(tmp_path / "file.bin")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "os system",
            "posix system",
            "nt system",
            "subprocess Popen",
            "builtins eval",
            "__builtin__ exec",
            "runpy _run",
        ),
        *(
            "builtins getattr",
            "builtins setattr",
            "builtins __import__",
            "importlib import_module",
            "pickle loads",
            "types FunctionType",
        ),
        *("shutil rmtree", "socket create_connection", "ctypes CDLL", "torch load", "torch._utils unknown", "sys exit"),
    ],
)
def test_names_of_attacks_are_refused_where_settings_may_stand(name, tmp_path):
    module, function = name.encode().split()
    for use in (b"X\x02\x00\x00\x00ls\x85R", b")\x81", b""):
        pickled = b"\x80\x02}(X\x01\x00\x00\x00bc" + module + b"\n" + function + b"\n" + use + b"u."
        torch_zip(tmp_path / "bad.bin", pickled)
        refused(tmp_path / "bad.bin", f"{module.decode()}.{function.decode()}")


@pytest.mark.parametrize(
    ("owner", "name", "refusal"),
    [
        (b"cbuiltins\nobject\n", b"__subclasses__", "builtins.object.__subclasses__"),
        (b"cbuiltins\nstr\n", b"format", "calls something.*builtins.str.format"),
        (b"cbuiltins\nprint\n", b"__self__", "builtins.print.__self__"),
        (b"coperator\nattrgetter\n", b"__call__", "operator.attrgetter.__call__"),
        (b"cvanished.config\nfunction\n", b"run", "calls something.*vanished.config.function.run"),
        (b"cvanished.config\nfunction\n", b"x" * 2000, "damaged"),
        (b"cvanished.config\nfunction\n", None, "not a name"),
    ],
)
def test_an_attribute_is_a_name_and_is_refused_as_one(owner, name, refusal, tmp_path):
    text = b"K\x01" if name is None else b"X" + len(name).to_bytes(4, "little") + name
    pickled = b"\x80\x02}(X\x01\x00\x00\x00bcbuiltins\ngetattr\n" + owner + text + b"\x86RX\x02\x00\x00\x00ls\x85Ru."
    torch_zip(tmp_path / "bad.bin", pickled)
    refused(tmp_path / "bad.bin", refusal)


def test_quantized_tensors_are_named(tmp_path):
    call = b"(ctorchao.dtypes\nAffineQuantizedTensor\ntR"
    pickled = b"\x80\x02}(X\x01\x00\x00\x00bctorch._utils\n_rebuild_wrapper_subclass\n" + call + b"u."
    torch_zip(tmp_path / "int8.bin", pickled)
    refused(tmp_path / "int8.bin", "quantized .* of 'torchao.dtypes.AffineQuantizedTensor', give the same")


def test_functions_of_other_packages_are_not_called(package, tmp_path):
    for call in (b"X\x02\x00\x00\x00ls\x85R", b"K\x01\x85R"):
        pickled = b"\x80\x02}(X\x01\x00\x00\x00bcvanished.config\nfunction\n" + call + b"u."
        torch_zip(tmp_path / "bad.bin", pickled)
        refused(tmp_path / "bad.bin", "calls something.*vanished.config.function")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda table: {"net": table, "epoch": 3},
        lambda table: {"student": table, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
        lambda table: {"state_dict": {"model": table}},
        lambda table: {"checkpoint": {"state_dict": table}, "args": {"lr": 1}},
    ],
)
def test_a_table_under_other_keys(wrap, tmp_path):
    torch.save(wrap({"a.weight": torch.ones(2)}), tmp_path / "file.bin")
    with open_checkpoint(tmp_path / "file.bin") as checkpoint:
        assert list(checkpoint.infos) == ["a.weight"]


def test_of_two_tables_none_is_chosen(tmp_path):
    torch.save({"params": {"a": torch.ones(2)}, "params_ema": {"a": torch.zeros(2)}}, tmp_path / "file.bin")
    assert "but one with 'params', 'params_ema'" in refused(tmp_path / "file.bin")


def test_a_table_that_holds_itself(tmp_path):
    table: dict = {"epoch": 1}
    table["state_dict"] = table["other"] = table
    torch.save(table, tmp_path / "file.bin")
    refused(tmp_path / "file.bin")
