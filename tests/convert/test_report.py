"""The record of a conversion: complete, valid JSON, and true to the plans that it is built from."""

import hashlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource, write_checkpoint
from mindvlm.convert.conversion import ConversionRequest, convert
from mindvlm.convert.random_weights import RandomSource
from mindvlm.convert.report import (
    Step,
    add_origins,
    carry_origins,
    file_record,
    report_of,
    rule_records,
    tensor_records,
    totals,
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


@pytest.fixture(scope="module")
def account() -> SimpleNamespace:
    """Two sources and an adapter, converted to native names and from there to other ones."""
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
    steps = [Step(0, plans[0], base.infos), Step(1, plans[1], layer.infos), Step(None, back, native.infos)]
    return SimpleNamespace(steps=steps, infos=out.infos, origins=carry_origins(merged, back), statistics=tap.statistics)


def test_the_rules_are_in_it(account):
    report = rule_records(account.steps)
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
    assert report["identities"] == [{"source": source, "names": ("kept",)} for source in (0, 1, None)]
    assert report["dropped"] == [{"source": 0, "name": "mask", "reason": "a buffer", "dtype": "bool", "shape": [5, 5]}]


def test_totals(account):
    assert totals(account.infos.values()) == {
        "tensors": 4,
        "parameters": 23,
        "bytes": 96,
        "by_dtype": {
            "float32": {"tensors": 2, "parameters": 16, "bytes": 64},
            "int64": {"tensors": 1, "parameters": 3, "bytes": 24},
            "float16": {"tensors": 1, "parameters": 4, "bytes": 8},
        },
    }


def test_each_tensor_with_its_origin_and_statistics(account):
    records = tensor_records(account.infos, account.origins, account.statistics)
    tensors = {tensor["name"]: tensor for tensor in records}
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
    without = tensor_records(account.infos, account.origins, {})
    assert {tensor["statistics"] for tensor in without} == {None}


def write_base(folder: Path) -> Path:
    """A Vary-toy's projector, which is the least that converts."""
    shapes = {
        f"transformer.mm_projector.{name}": shape for name, shape in (("weight", (1024, 1024)), ("bias", (1024,)))
    }
    shapes |= {name.replace("projector", "projector_vary"): shape for name, shape in shapes.items()}
    write_checkpoint(folder / "base.bin", RandomSource(shapes, 0))
    return folder / "base.bin"


def test_everything_is_in_it(tmp_path):
    """The record of a conversion, written and dry."""
    base = write_base(tmp_path)
    reports = []
    for dry_run in (False, True):
        request = ConversionRequest(
            sources=(base,), target=tmp_path / "out.ckpt", dry_run=dry_run, statistics=not dry_run
        )
        convert(request, record=lambda conversion: reports.append(report_of(conversion)))
    report, dry = reports
    assert (report["schema"], report["schema_version"]) == ("mindvlm-conversion", 1)
    assert (report["model"], report["family"], report["options"]["dtype"]) == ("vary_toy", "vary", "keep")
    (source,) = report["sources"]
    assert (source["role"], source["format"], source["naming"]) == ("base", "PyTorch", "Hugging Face")
    assert source["files"] == [file_record(base)]
    assert report["totals"]["tensors"] == len(report["tensors"]) == 4 and report["tensors"][0]["statistics"]
    assert "CLIP tower" in report["absent_parts"] and report["verification"] is None
    assert report["outputs"] == [file_record(tmp_path / "out.ckpt")]
    assert 0 <= report["seconds"] == round(report["seconds"], 3) and report["peak_memory_bytes"] > 1 << 20
    assert set(report["versions"]) == {"python", "mindvlm", "numpy", "platform"}
    assert {tensor["statistics"] for tensor in dry["tensors"]} == {None} and dry["outputs"] == []
    assert list(dry) == list(report)


def test_the_file_is_json_for_any_reader(tmp_path):
    def no_literal(text):
        raise AssertionError(text)

    path = tmp_path / "report.json"
    record = {
        "options": {"odd name": "\udc80 \x1b ü"},
        "verification": {"worst": math.nan, "all": [math.inf, -math.inf], "file": tmp_path},
        "tensors": ({"name": "b"}, {"name": "a"}),
    }
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
