"""Results of rules, and the errors of tables that do not fit."""

import time

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource, TensorInfo
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.operations import Concat, Drop, Pattern, Rename, Split, Tie
from mindvlm.weights.rules.planning import make_plan
from mindvlm.weights.rules.table import Part, RuleTable, rename_all


def table(*rules) -> RuleTable:
    return RuleTable("test", "test", (Part("model", tuple(rules)),))


def infos(**shapes) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "float32", tuple(shape)) for name, shape in shapes.items()}


def test_a_gap_in_the_layers_is_named_without_the_model():
    rules = table(*rename_all("h.{}.fc", "layers.{}.fc"), Drop("h.{}.mask", "a mask"))
    shapes = {f"h.{layer}.fc.{ending}": (2,) for layer in range(5) for ending in ("weight", "bias")}
    del shapes["h.2.fc.bias"]
    with pytest.raises(ConversionError, match="1 missing; first: missing h.2.fc.bias"):
        make_plan(rules, infos(**shapes))


def test_two_tensors_for_one_target_are_named():
    rules = table(Rename("a", "x"), Rename("b", "x"))
    with pytest.raises(ConversionError, match=r"1 duplicate; first: duplicate b \(x comes from a already"):
        make_plan(rules, infos(a=(1,), b=(1,)))


def test_a_tensor_claimed_twice_is_named():
    with pytest.raises(ConversionError, match="consumed by 2 rules"):
        make_plan(
            table(Rename("h.{}.w", "x.{}.w"), Rename("h.0.w", "y")), {"h.0.w": TensorInfo("h.0.w", "float32", (1,))}
        )


def test_a_parameter_that_the_model_does_not_have():
    with pytest.raises(ConversionError, match="unexpected a .*no such parameter"):
        make_plan(table(Rename("a", "x")), infos(a=(1,)), {})


def test_kinds_of_numbers_must_agree():
    source = {"a": TensorInfo("a", "int64", (2,))}
    with pytest.raises(ConversionError, match="1 dtype"):
        make_plan(table(Rename("a", "x")), source, infos(x=(2,)))
    half = {"a": TensorInfo("a", "float16", (2,))}
    assert make_plan(table(Rename("a", "x")), half, infos(x=(2,))).infos["x"].dtype == "float16"


def test_shapes_that_do_not_split_or_join():
    with pytest.raises(ConversionError, match=r"\[7, 2\] does not split into 3"):
        make_plan(table(Split("a", ("x", "y", "z"))), infos(a=(7, 2)))
    with pytest.raises(ConversionError, match=r"shape a \(\[2\], joined with \[3\]\)"):
        make_plan(table(Concat(("a", "b"), "x")), infos(a=(2,), b=(3,)))


def test_dropped_tensors_are_told_and_may_be_absent():
    rules = table(Rename("a", "x"), Drop("h.{}.inv_freq", "computed"))
    plan = make_plan(rules, infos(**{"a": (1,), "h.3.inv_freq": (4,)}))
    assert plan.dropped == {"h.3.inv_freq": "computed"} and set(plan.infos) == {"x"}
    assert not make_plan(rules, infos(a=(1,))).dropped


def test_findings_fold_into_one_row_per_pattern():
    rules = table(Rename("embed", "e"), *rename_all("h.{}.fc", "layers.{}.fc"))
    targets = {f"layers.{i}.fc.{e}": (2, 2) for i in range(40) for e in ("weight", "bias")}
    with pytest.raises(ConversionError) as caught:
        make_plan(rules, infos(embed=(1,), strange=(1,)), infos(e=(1,), **targets))
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
    with pytest.raises(ConversionError, match=r"unexpected h.999999.w \(stands for 1000000 tensors"):
        make_plan(table(Rename("h.{}.w", "x.{}.w")), {"h.999999.w": TensorInfo("h.999999.w", "float32", (1,))})


def floats(*names, shape=(2, 2)) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "float32", shape) for name in names}


class TestPartialPlans:
    TABLE = RuleTable(
        "test",
        "test",
        (
            Part("body", rename_all("h.{}.fc", "layers.{}.fc"), "body"),
            Part("head", (Rename("out", "head"),), "head"),
            Part("extras", (Drop("mask", "a mask"), Rename("extra", "extra")), "head"),
        ),
    )
    TARGETS = floats("layers.0.fc.weight", "layers.0.fc.bias", "layers.1.fc.weight", "layers.1.fc.bias", "head")

    def test_absent_parts_are_told_and_not_required(self):
        plan = make_plan(self.TABLE, floats("out", "mask"), self.TARGETS, partial=True)
        assert plan.absent_parts == ("body", "extras") and set(plan.infos) == {"head"}

    def test_a_part_that_is_there_must_be_complete(self):
        with pytest.raises(ConversionError, match="2 missing; first: missing h.1.fc.weight "):
            make_plan(self.TABLE, floats("h.0.fc.weight", "h.0.fc.bias"), self.TARGETS, partial=True)

    def test_everything_is_required_otherwise(self):
        with pytest.raises(ConversionError, match="4 missing"):
            make_plan(self.TABLE, floats("out"), self.TARGETS)

    def test_targets_that_the_table_cannot_make_are_not_required(self):
        targets = {**self.TARGETS, **floats("other")}
        assert make_plan(self.TABLE, floats("out"), targets, partial=True).infos.keys() == {"head"}
        with pytest.raises(ConversionError, match="missing other"):
            make_plan(
                self.TABLE, floats("out", *(f"h.{i}.fc.{e}" for i in range(2) for e in ("weight", "bias"))), targets
            )

    def test_which_part_a_target_belongs_to(self):
        assert self.TABLE.part_of("layers.7.fc.bias").key == "body"
        assert self.TABLE.part_of("layers.7.fc") is None
        assert self.TABLE.parts[0].produces("layers.0.fc.weight") and not self.TABLE.parts[1].produces("out")


class TestTies:
    TABLE = table(Tie(("embed", "lm_head", "copy"), "embeddings"), Rename("norm", "norm"))

    def test_aliases_may_be_there(self):
        for aliases in [(), ("lm_head",), ("copy",), ("lm_head", "copy")]:
            source = floats(*aliases, "embed", "norm")
            plan = make_plan(self.TABLE, source, floats("embeddings", "norm"))
            assert plan.aliases == aliases and set(plan.infos) == {"embeddings", "norm"}
            assert plan.sources_of("embeddings") == ("embed", *aliases)
            assert make_plan(plan.reverse_table(), plan.infos).infos == source

    def test_the_first_name_must_be_there(self):
        with pytest.raises(ConversionError, match="1 missing; first: missing embed "):
            make_plan(self.TABLE, floats("lm_head", "norm"))

    def test_an_alias_in_a_layer_without_the_first_name_is_not_lost(self):
        rules = table(Tie(("h.{}.a", "h.{}.b"), "x.{}"))
        with pytest.raises(ConversionError, match="1 missing; first: missing h.5.a"):
            make_plan(rules, floats("h.0.a", "h.0.b", "h.5.b"))

    def test_a_table_without_aliases(self):
        rules = self.TABLE.without(["lm_head"]).rules
        assert rules == (Tie(("embed", "copy"), "embeddings"), Rename("norm", "norm"))
        assert self.TABLE.without(["lm_head", "copy"]).rules[0] == Rename("embed", "embeddings")
        assert self.TABLE.aliases == ("lm_head", "copy")

    def test_shapes_and_dtypes_must_be_equal(self):
        source = {**floats("embed", "norm"), **floats("lm_head", shape=(3, 2))}
        with pytest.raises(ConversionError, match="2 shape") as caught:
            make_plan(self.TABLE, source)
        assert [f.name for f in caught.value.findings] == ["embed", "lm_head"]
        source["lm_head"] = TensorInfo("lm_head", "float16", (2, 2))
        with pytest.raises(ConversionError, match="2 dtype; first: dtype .*float"):
            make_plan(self.TABLE, source)

    @pytest.mark.parametrize("start", [0, 3])
    def test_other_values_are_found_when_they_are_read(self, start):
        values = np.arange(4, dtype=np.float32).reshape(2, 2)
        other = values.copy()
        other[1, 1] = -0.0
        source = MemorySource({"embed": values, "lm_head": other, "norm": values}, "file.bin")
        view = make_plan(self.TABLE, source.infos).view(source)
        assert view.read_range("embeddings", 0, 3).tolist() == [0, 1, 2]
        with pytest.raises(UserError, match="file.bin: embed and lm_head are one tensor") as caught:
            view.read_range("embeddings", start, 4)
        assert "\n" not in str(caught.value)

    def test_an_alias_is_there_in_all_layers_or_in_none(self):
        rules = table(Tie(("h.{}.a", "h.{}.b"), "x.{}"))
        first = [f"h.{layer}.a" for layer in range(4)]
        assert make_plan(rules, floats(*first)).aliases == ()
        assert make_plan(rules, floats(*first, *(f"h.{layer}.b" for layer in range(4)))).aliases == ("h.{}.b",)
        with pytest.raises(ConversionError, match="1 missing; first: missing h.2.b"):
            make_plan(rules, floats(*first, "h.0.b", "h.1.b", "h.3.b"))
        with pytest.raises(ConversionError, match="1 unexpected; first: unexpected h.2.b"):
            make_plan(rules, floats(*first, "h.2.b"))


class TestWhatAPlanTells:
    TABLE = table(
        Rename("keep", "keep"),
        Split("qkv", ("q", "k")),
        Concat(("a", "b"), "ab"),
        Drop("mask", "a mask"),
        Drop("c", ""),
    )

    def test_where_tensors_go_and_come_from(self):
        plan = make_plan(self.TABLE, floats("keep", "qkv", "a", "b", "mask"))
        assert plan.targets_of("qkv") == ("q", "k") and plan.targets_of("b") == ("ab",)
        assert plan.targets_of("mask") == plan.targets_of("unheard of") == ()
        assert plan.sources_of("ab") == ("a", "b") and plan.sources_of("k") == ("qkv",)
        assert plan.identities == ("keep",) and plan.unused_rules == (Drop("c", ""),)
        assert not plan.is_identity

    def test_a_dropped_tensor_is_no_identity(self):
        assert not make_plan(self.TABLE, floats("mask")).is_identity
        assert make_plan(self.TABLE.identity("native"), floats("keep", "q", "k", "ab")).is_identity

    def test_its_fingerprint_is_what_the_result_consists_of(self):
        names = ("keep", "qkv", "a", "b")

        def fingerprint(*rules, **shapes) -> str:
            return make_plan(table(*rules), infos(**{**dict.fromkeys(names, (4,)), **shapes})).fingerprint

        rules = self.TABLE.rules
        same = fingerprint(*rules)
        assert same == fingerprint(*rules[:3]) == fingerprint(*rules, mask=(1,))
        others = [
            fingerprint(rules[0], Split("qkv", ("k", "q")), rules[2]),
            fingerprint(*rules[:2], Concat(("b", "a"), "ab")),
            fingerprint(Rename("keep", "kept"), *rules[1:]),
            fingerprint(*rules, keep=(5,)),
        ]
        assert len({same, *others}) == 5


def test_an_open_drop_takes_all_names_below_it():
    rules = table(Rename("x", "x"), Drop("text_model.*", "not needed"))
    plan = make_plan(rules, floats("x", "text_model.a", "text_model.layers.0.b"))
    assert plan.dropped == {"text_model.a": "not needed", "text_model.layers.0.b": "not needed"}
    assert plan.uses[rules.rules[1]] == 2
    for name in ("text_model", "text_models.a", "text_model.", "a.text_model.b"):
        with pytest.raises(ConversionError, match="1 unexpected"):
            make_plan(rules, floats("x", name))


def test_a_stray_layer_is_unexpected_not_a_reason_to_miss_all_others():
    rules = table(*rename_all("h.{}.fc", "layers.{}.fc"), Rename("h.{}.ln", "layers.{}.ln"))
    names = [f"h.{layer}.{name}" for layer in range(3) for name in ("fc.weight", "fc.bias", "ln")]
    with pytest.raises(ConversionError, match="1 unexpected; first: unexpected h.40.ln .*ends with layer 2"):
        make_plan(rules, floats(*names, "h.40.ln"))
    with pytest.raises(ConversionError, match="1 missing; first: missing h.2.ln"):
        make_plan(rules, floats(*names[:-1]))


def test_experts_in_layers_must_all_be_there():
    rules = table(Rename("h.{}.e.{}.w", "layers.{}.experts.{}.w"))
    names = [f"h.{layer}.e.{expert}.w" for layer in range(3) for expert in range(4)]
    assert len(make_plan(rules, floats(*names)).infos) == 12
    names.remove("h.1.e.2.w")
    with pytest.raises(ConversionError, match="1 missing; first: missing h.1.e.2.w"):
        make_plan(rules, floats(*names))


@pytest.mark.parametrize("dtype", ["int64", "bool"])
def test_each_kind_of_numbers_is_its_own(dtype):
    for other in ("float32", "bool", "int32"):
        source, targets = {"a": TensorInfo("a", dtype, (2,))}, {"x": TensorInfo("x", other, (2,))}
        if "int" in dtype and "int" in other or dtype == other:
            assert make_plan(table(Rename("a", "x")), source, targets)
        else:
            with pytest.raises(ConversionError, match="1 dtype; first: dtype a"):
                make_plan(table(Rename("a", "x")), source, targets)


def test_of_many_parts_only_the_odd_one_is_named():
    rules = table(Concat(("q", "k", "v"), "qkv"))
    with pytest.raises(ConversionError, match=r"1 shape; first: shape k \(\[3, 2\], joined with \[2, 2\]"):
        make_plan(rules, {**floats("q", "v"), **floats("k", shape=(3, 2))})


def test_planning_thousands_of_tensors_is_fast():
    rules = table(*(Rename(f"h.{{}}.a{index}.weight", f"x.{{}}.b{index}.weight") for index in range(300)))
    source = floats(*(f"h.{layer}.a{index}.weight" for layer in range(20) for index in range(300)))
    started = time.perf_counter()
    plan = make_plan(rules, source)
    assert len(plan.infos) == 6000 and time.perf_counter() - started < 2


def test_all_tensors_below_a_prefix_are_renamed():
    rules = table(Rename("old.{}.*", "new.{}.*"), Rename("head", "last.head"))
    shapes = {"old.3.a.0.weight": (2,), "old.0.b": (3,), "head": (1,)}
    plan = make_plan(rules, infos(**shapes))
    assert {name: plan.sources_of(name) for name in plan.infos} == {
        "new.3.a.0.weight": ("old.3.a.0.weight",),
        "new.0.b": ("old.0.b",),
        "last.head": ("head",),
    }
    back = make_plan(plan.reverse_table(), plan.infos)
    assert {name: info.shape for name, info in back.infos.items()} == shapes
    with pytest.raises(ConversionError, match=r"1 missing; first: missing old.1.c \(needed for new.\{\}.c\)"):
        make_plan(rules, infos(**shapes), {**plan.infos, **infos(**{"new.1.c": (4,)})})
    with pytest.raises(ConversionError, match="unexpected older.0.a"):
        make_plan(rules, infos(**{"older.0.a": (1,)}))
