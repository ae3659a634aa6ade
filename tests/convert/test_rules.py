"""Rule tables lead there and back without loss, and name every key that does not fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindvlm.checkpoint import MemorySource, TensorInfo
from mindvlm.convert.report import ConversionError
from mindvlm.convert.rules import Concat, Drop, Part, Pattern, Rename, RuleTable, Split, rename_all


def table(*rules) -> RuleTable:
    return RuleTable("test", "test", (Part("model", tuple(rules)),))


def infos(**shapes) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "float32", tuple(shape)) for name, shape in shapes.items()}


@st.composite
def cases(draw):
    """A random table and a state dict that fits it: (table, tensors)."""
    rules, tensors = [], {}
    num_layers = draw(st.integers(1, 12))
    for index, kind in enumerate(draw(st.lists(st.sampled_from(["rename", "split", "concat"]), min_size=1))):
        layered = draw(st.booleans())
        middle = ".{}" if layered else ""
        source, target = f"old{middle}.r{index}", f"new{middle}.t{index}"
        num_parts = draw(st.integers(1, 3))
        parts = tuple(f"{target if kind == 'split' else source}.p{part}" for part in range(num_parts))
        rule = {"rename": Rename(source, target), "split": Split(source, parts), "concat": Concat(parts, target)}[kind]
        rules.append(rule)
        shape = (num_parts * draw(st.integers(1, 3)), *draw(st.lists(st.integers(0, 3), max_size=2)))
        for layer in range(num_layers if layered else 1):
            for pattern in rule.source_patterns:
                name = pattern.fill((layer,) if layered else ())
                tensors[name] = np.random.default_rng(len(tensors)).normal(size=shape).astype(np.float32)
    order = draw(st.permutations(list(tensors)))
    return table(*rules), {name: tensors[name] for name in order}


def read_all(source) -> dict[str, np.ndarray]:
    return {name: source.read(name).data for name in source.infos}


def apply(rules, tensors):
    source = MemorySource(tensors)
    return read_all(rules.plan(source.infos).view(source))


@given(cases(), st.integers(1, 40))
def test_there_and_back(case, chunk_bytes):
    rules, tensors = case
    source = MemorySource(tensors)
    there = rules.plan(source.infos).view(source)
    back = rules.reverse().plan(there.infos).view(there)
    assert set(back.infos) == set(tensors)
    for name, array in tensors.items():
        assert np.array_equal(back.read(name).data, array)
        assert b"".join(chunk.tobytes() for chunk in back.chunks(name, chunk_bytes)) == array.tobytes()


@given(cases())
def test_reversing_twice_is_the_table(case):
    assert case[0].reverse().reverse().rules == case[0].rules


@given(cases())
def test_a_converted_state_dict_is_left_alone(case):
    rules, tensors = case
    once = apply(rules, tensors)
    identity = rules.identity("native")
    plan = identity.plan(MemorySource(once).infos)
    assert plan.is_identity
    twice = apply(identity, once)
    assert all(np.array_equal(once[name], twice[name]) for name in once) and once.keys() == twice.keys()


@given(cases(), st.data())
def test_any_missing_key_is_named(case, data):
    rules, tensors = case
    targets = rules.plan(MemorySource(tensors).infos).infos
    name = data.draw(st.sampled_from(sorted(tensors)))
    rest = MemorySource({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ConversionError) as caught:
        rules.plan(rest.infos, targets)
    assert [(f.status, f.name) for f in caught.value.findings] == [("missing", name)]


def test_a_gap_in_the_layers_is_named_without_the_model():
    rules = table(*rename_all("h.{}.fc", "layers.{}.fc"), Drop("h.{}.mask", "a mask"))
    shapes = {f"h.{layer}.fc.{ending}": (2,) for layer in range(5) for ending in ("weight", "bias")}
    del shapes["h.2.fc.bias"]
    with pytest.raises(ConversionError, match="1 missing; first: missing h.2.fc.bias"):
        rules.plan(infos(**shapes))


@given(cases(), st.data())
def test_any_extra_key_is_named(case, data):
    rules, tensors = case
    name = data.draw(st.sampled_from(sorted(tensors))) + data.draw(st.sampled_from([".extra", "_scale", "0", ".0"]))
    if any(rules.claims(name)):
        return
    with pytest.raises(ConversionError) as caught:
        rules.plan(MemorySource({**tensors, name: np.ones(1)}).infos)
    assert [(f.status, f.name) for f in caught.value.findings] == [("unexpected", name)]


@given(cases(), st.data())
def test_any_misshapen_key_is_named(case, data):
    rules, tensors = case
    targets = rules.plan(MemorySource(tensors).infos).infos
    name = data.draw(st.sampled_from(sorted(tensors)))
    wrong = {**tensors, name: np.ones((*tensors[name].shape, 2), np.float32)}
    with pytest.raises(ConversionError) as caught:
        rules.plan(MemorySource(wrong).infos, targets)
    siblings = {key for key in tensors if rules.claims(key)[0][::2] == rules.claims(name)[0][::2]}
    assert {f.status for f in caught.value.findings} == {"shape"}
    assert {f.name for f in caught.value.findings} <= siblings


def test_two_tensors_for_one_target_are_named():
    rules = table(Rename("a", "x"), Rename("b", "x"))
    with pytest.raises(ConversionError, match=r"1 duplicate; first: duplicate b \(x comes from more than one tensor"):
        rules.plan(infos(a=(1,), b=(1,)))


def test_a_tensor_claimed_twice_is_named():
    with pytest.raises(ConversionError, match="consumed by 2 rules"):
        table(Rename("h.{}.w", "x.{}.w"), Rename("h.0.w", "y")).plan({"h.0.w": TensorInfo("h.0.w", "float32", (1,))})


def test_a_parameter_that_the_model_does_not_have():
    with pytest.raises(ConversionError, match="unexpected a .*no such parameter"):
        table(Rename("a", "x")).plan(infos(a=(1,)), {})


def test_kinds_of_numbers_must_agree():
    source = {"a": TensorInfo("a", "int64", (2,))}
    with pytest.raises(ConversionError, match="1 dtype"):
        table(Rename("a", "x")).plan(source, infos(x=(2,)))
    half = {"a": TensorInfo("a", "float16", (2,))}
    assert table(Rename("a", "x")).plan(half, infos(x=(2,))).infos["x"].dtype == "float16"


def test_shapes_that_do_not_split_or_join():
    with pytest.raises(ConversionError, match=r"\[7, 2\] does not split into 3"):
        table(Split("a", ("x", "y", "z"))).plan(infos(a=(7, 2)))
    with pytest.raises(ConversionError, match=r"\[2\] and \[3\] do not join"):
        table(Concat(("a", "b"), "x")).plan(infos(a=(2,), b=(3,)))


def test_dropped_tensors_are_told_and_may_be_absent():
    rules = table(Rename("a", "x"), Drop("h.{}.inv_freq", "computed"))
    plan = rules.plan(infos(**{"a": (1,), "h.3.inv_freq": (4,)}))
    assert plan.dropped == {"h.3.inv_freq": "computed"} and set(plan.infos) == {"x"}
    assert not rules.plan(infos(a=(1,))).dropped


def test_findings_fold_into_one_row_per_pattern():
    rules = table(Rename("embed", "e"), *rename_all("h.{}.fc", "layers.{}.fc"))
    targets = {f"layers.{i}.fc.{e}": (2, 2) for i in range(40) for e in ("weight", "bias")}
    with pytest.raises(ConversionError) as caught:
        rules.plan(infos(embed=(1,), strange=(1,)), infos(e=(1,), **targets))
    text = str(caught.value)
    assert "\n" not in text and "80 missing, 1 unexpected" in text
    lines = caught.value.table().splitlines()
    assert any("40" in line and "h.{}.fc.weight (0-39)" in line for line in lines)
    assert len(lines) < 10


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("h.0.w", (0,)),
        ("h.12.w", (12,)),
        ("h.01.w", None),
        ("h..w", None),
        ("h.x.w", None),
        ("h.1.w2", None),
        ("xh.1.w", None),
        ("h.1.wx", None),
        ("h-1.w", None),
        ("h.1" + "0" * 5000 + ".w", None),
        ("h.²xw", None),
        ("h.1.w\n", None),
    ],
)
def test_patterns_match_whole_names(name, layers):
    assert Pattern("h.{}.w").match(name) == layers


def test_a_huge_layer_number_does_not_exhaust_memory():
    with pytest.raises(ConversionError, match="highest layer number is 999999"):
        table(Rename("h.{}.w", "x.{}.w")).plan({"h.999999.w": TensorInfo("h.999999.w", "float32", (1,))})
