"""The record of a conversion: complete, valid JSON, and true to the plans that it is built from."""

import hashlib
import json
import math
import os

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource
from mindvlm.convert.report import (
    Step,
    add_origins,
    build_report,
    carry_origins,
    file_record,
    write_report,
)
from mindvlm.convert.statistics import StatisticsTap
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.operations import Drop, Rename, Split
from mindvlm.weights.rules.planning import make_plan
from mindvlm.weights.rules.table import Part, RuleTable

TABLE = RuleTable(
    "test",
    "tests",
    (
        Part(
            "model",
            (
                Split("h.{}.qkv", ("layers.{}.q", "layers.{}.k")),
                Rename("kept", "kept"),
                Rename("old", "new"),
                Drop("mask", "a buffer"),
                Drop("h.{}.never", "was never there"),
            ),
        ),
    ),
)


def account(**changes) -> dict:
    """A base with a layer over it and an adapter, led to our names and from there to other ones."""
    base = MemorySource(
        {
            "h.0.qkv": np.ones((4, 2), np.float32),
            "h.1.qkv": np.ones((4, 2), np.float32),
            "kept": np.ones(3, np.int64),
            "old": np.full((2, 2), np.nan, np.float16),
            "mask": np.ones((5, 5), np.bool_),
        }
    )
    layer = MemorySource({"old": np.full((2, 2), 3, np.float32), "kept": np.ones(3, np.int64)})
    plans = [
        make_plan(TABLE, base.infos),
        make_plan(RuleTable("test", "tests", (Part("m", TABLE.rules[1:3]),)), layer.infos),
    ]
    origins = [
        carry_origins({name: {index: [name]} for name in source.infos}, plan)
        for index, (source, plan) in enumerate(zip((base, layer), plans, strict=True))
    ]
    native = plans[0].view(base)
    back = make_plan(TABLE.reverse(), native.infos)
    merged = add_origins({**origins[0], **origins[1]}, {"layers.1.k": ("A", "B")}, 2)
    out = back.view(native)
    tap = StatisticsTap(out)
    for name in out.infos:
        tap.read(name)
    record = {"path": "base.bin", "bytes": 10, "sha256": "ab"}
    source = {"role": "base", "path": "base.bin", "format": "PyTorch", "naming": "test", "files": (record,)}
    fields = {
        "model": "vary_toy",
        "family": "vary",
        "options": {"dtype": "keep"},
        "sources": [source],
        "steps": [Step(0, plans[0], base.infos), Step(1, plans[1], layer.infos), Step(None, back, native.infos)],
        "infos": out.infos,
        "origins": carry_origins(merged, back),
        "statistics": tap.statistics,
        "absent_parts": ("tower",),
        "outputs": [{"path": "out", "bytes": 3, "sha256": "cd"}],
        "verification": {"tensors": 4},
        "seconds": 1.23456,
    }
    return fields | changes


def test_everything_is_in_it():
    report = build_report(**account())
    assert (report["schema"], report["schema_version"]) == ("mindvlm-conversion", 1)
    assert report["sources"][0]["files"] == [{"path": "base.bin", "bytes": 10, "sha256": "ab"}]
    assert report["rules"][0] == {
        "source": 0,
        "kind": "Split",
        "from": ["h.{}.qkv"],
        "to": ["layers.{}.q", "layers.{}.k"],
        "used": 2,
    }
    assert [(rule["source"], rule["kind"], rule["used"]) for rule in report["rules"][1:]] == [
        (0, "Rename", 1),
        (0, "Rename", 1),
        (0, "Drop", 1),
        (1, "Rename", 1),
        (1, "Rename", 1),
        (None, "Concat", 2),
        (None, "Rename", 1),
        (None, "Rename", 1),
    ]
    assert report["unused_rules"] == [{"source": 0, "kind": "Drop", "from": ["h.{}.never"], "to": []}]
    assert report["identities"] == [{"source": source, "names": ["kept"]} for source in (0, 1, None)]
    assert report["dropped"] == [{"source": 0, "name": "mask", "reason": "a buffer", "dtype": "bool", "shape": [5, 5]}]
    assert report["totals"] == {
        "tensors": 4,
        "parameters": 23,
        "bytes": 96,
        "by_dtype": {
            "float32": {"tensors": 2, "parameters": 16, "bytes": 64},
            "int64": {"tensors": 1, "parameters": 3, "bytes": 24},
            "float16": {"tensors": 1, "parameters": 4, "bytes": 8},
        },
    }
    assert report["absent_parts"] == ["tower"] and report["verification"] == {"tensors": 4}
    assert report["outputs"] == [{"path": "out", "bytes": 3, "sha256": "cd"}]
    assert report["seconds"] == 1.235 and report["peak_memory_bytes"] > 1 << 20
    assert set(report["versions"]) == {"python", "mindvlm", "numpy", "platform"}


def test_each_tensor_with_its_origin_and_statistics():
    tensors = {tensor["name"]: tensor for tensor in build_report(**account())["tensors"]}
    assert list(tensors) == ["h.0.qkv", "h.1.qkv", "kept", "old"]
    assert tensors["h.0.qkv"]["origin"] == [{"source": 0, "names": ["h.0.qkv"]}]
    assert tensors["h.1.qkv"]["origin"] == [{"source": 0, "names": ["h.1.qkv"]}, {"source": 2, "names": ["A", "B"]}]
    assert tensors["old"]["origin"] == [{"source": 1, "names": ["old"]}]
    assert tensors["h.0.qkv"]["statistics"] == {
        "norm": math.sqrt(8),
        "sum": 8.0,
        "min": 1.0,
        "max": 1.0,
        "num_nonfinite": 0,
    }
    assert tensors["old"]["statistics"]["num_nonfinite"] == 4 and tensors["old"]["statistics"]["min"] is None
    assert (tensors["kept"]["dtype"], tensors["kept"]["shape"]) == ("int64", [3])


def test_a_dry_run_has_no_statistics_and_no_outputs():
    report = build_report(**account(statistics={}, outputs=(), verification=None))
    assert {tensor["statistics"] for tensor in report["tensors"]} == {None}
    assert report["outputs"] == [] and report["verification"] is None


def test_the_file_is_json_for_any_reader(tmp_path):
    def no_literal(text):
        raise AssertionError(text)

    path = tmp_path / "report.json"
    record = build_report(**account(verification={"worst": math.nan, "all": [math.inf, -math.inf], "file": tmp_path}))
    record["options"]["odd name"] = "\udc80 \x1b ü"
    write_report(path, record)
    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_literal)
    assert read["verification"] == {"worst": "NaN", "all": ["Infinity", "-Infinity"], "file": str(tmp_path)}
    assert read["options"]["odd name"] == "\udc80 \x1b ü"
    assert list(read) == list(record)
    assert [tensor["name"] for tensor in read["tensors"]] == [tensor["name"] for tensor in record["tensors"]]
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.json"
    write_report(path, {"a": 1})
    with pytest.raises(TypeError):
        write_report(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["report.json"]
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "none" / "report.json", {})


@pytest.mark.parametrize("size", [0, 1, 5 << 20])
def test_hashes(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    assert file_record(tmp_path / "f") == {
        "path": str(tmp_path / "f"),
        "bytes": size,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        file_record(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        file_record(tmp_path)


def test_origins_of_a_tensor_made_of_several_sources():
    origins = {"q": {0: ["c_attn"]}, "k": {1: ["k"]}, "v": {0: ["c_attn"]}}
    table = RuleTable("t", "t", (Part("p", (Split("c_attn", ("q", "k", "v")),)),)).reverse()
    plan = make_plan(table, MemorySource({name: np.ones(2) for name in origins}).infos)
    assert carry_origins(origins, plan) == {"c_attn": {0: ["c_attn"], 1: ["k"]}}
