"""Random rule tables over random state dicts: there and back is exact, and any single mistake is found and named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mindvlm.checkpoint import MemorySource, RawTensor, TensorInfo
from mindvlm.checkpoint.dtypes import is_float
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.naming import choose_table
from mindvlm.weights.rules.operations import Concat, Drop, Rename, Rule, Split, Tie
from mindvlm.weights.rules.planning import make_plan
from mindvlm.weights.rules.table import Part, RuleTable
from tests.weights.rules.random_tables import aliases, cases, infos_of, patterns

quick = settings(max_examples=60)


def assert_same(actual, tensors: dict[str, RawTensor]) -> None:
    assert dict(actual.infos) == infos_of(tensors)
    for name, tensor in tensors.items():
        assert actual.read(name).data.tobytes() == tensor.data.tobytes(), name


@quick
@given(cases(), st.integers(1, 40))
def test_there_and_back(case, chunk_bytes):
    there = case.apply()
    back = make_plan(there.plan.reverse_table(), there.infos).view(there)
    kept = {name: case.tensors[name] for name in case.kept}
    assert_same(back, kept)
    for name, tensor in kept.items():
        assert b"".join(chunk.tobytes() for chunk in back.chunks(name, chunk_bytes)) == tensor.data.tobytes()
    assert set(there.plan.dropped) == set(case.tensors) - set(kept)


@quick
@given(cases())
def test_every_source_byte_arrives_once(case):
    there = case.apply()
    num_bytes = {name: case.infos[name].num_bytes for name in case.kept}
    tied = {alias for names in there.plan.ties.values() for alias in names}
    assert sum(info.num_bytes for info in there.infos.values()) == sum(
        size for name, size in num_bytes.items() if name not in tied
    )
    for name in case.kept:
        assert all(name in there.plan.sources_of(target) for target in there.plan.targets_of(name))
        assert there.plan.targets_of(name)


@quick
@given(cases())
def test_reversing_twice_is_the_table(case):
    assert case.table.reverse().reverse().rules == tuple(rule for rule in case.table.rules if rule.targets)


@quick
@given(cases())
def test_converting_twice_is_converting_once(case):
    once = case.apply()
    identity = case.table.identity("native")
    plan = make_plan(identity, once.infos)
    assert plan.is_identity
    assert_same(plan.view(once), {name: once.read(name) for name in once.infos})
    assert choose_table((identity, case.table), once.infos, model="test") is identity


@quick
@given(cases(), st.data(), st.booleans())
def test_any_missing_key_is_named(case, data, partial):
    plan = make_plan(case.table, case.infos)
    targets = plan.infos
    needed = [name for name in case.kept if name not in aliases(case)]
    name = data.draw(st.sampled_from(needed))
    rest = {key: info for key, info in case.infos.items() if key != name}
    part = case.table.part_of(plan.targets_of(name)[0])
    left = [key for key in rest if case.rule_of(key) in part.rules and case.rule_of(key).targets]
    if partial and not left:
        assert part.name in make_plan(case.table, rest, targets, partial=True).absent_parts
        return
    with pytest.raises(ConversionError) as caught:
        make_plan(case.table, rest, targets, partial=partial)
    assert [(finding.status, finding.name) for finding in caught.value.findings] == [("missing", name)]
    assert name in str(caught.value)


@quick
@given(cases(), st.data())
def test_a_missing_alias_is_named_or_no_longer_expected(case, data):
    there = sorted(aliases(case))
    assume(there)
    name = data.draw(st.sampled_from(there))
    rest = {key: tensor for key, tensor in case.tensors.items() if key != name}
    pattern = next(p.text for p in case.rule_of(name).source_patterns if p.match(name) is not None)
    others = [key for key in rest if any(p.text == pattern and p.match(key) is not None for p in patterns(case))]
    if others:
        with pytest.raises(ConversionError):
            make_plan(case.table, infos_of(rest))
    else:
        plan = make_plan(case.table, infos_of(rest))
        assert pattern not in plan.aliases
        kept = {key: info for key, info in infos_of(rest).items() if case.rule_of(key).targets}
        assert make_plan(plan.reverse_table(), plan.infos).infos == kept


@quick
@given(cases(), st.data(), st.booleans())
def test_any_extra_key_is_named(case, data, with_targets):
    name = data.draw(st.sampled_from(sorted(case.tensors)))
    name += data.draw(st.sampled_from([".extra", "_scale", "0", ".0", "\n"]))
    assume(not case.table.claims(name))
    targets = make_plan(case.table, case.infos).infos if with_targets else None
    with pytest.raises(ConversionError) as caught:
        make_plan(case.table, {**case.infos, name: TensorInfo(name, "float32", (1,))}, targets)
    assert [(finding.status, finding.name) for finding in caught.value.findings] == [("unexpected", name)]


@quick
@given(cases(), st.data(), st.integers(5, 10**6 - 1))
def test_a_key_of_a_layer_too_many_is_named(case, data, layer):
    layered = [name for name in case.kept if ".h." in name]
    assume(layered)
    name = data.draw(st.sampled_from(layered))
    extra = name.replace(f".h.{name.split('.')[2]}.", f".h.{layer}.")
    info = replace(case.infos[name], name=extra)
    with pytest.raises(ConversionError) as caught:
        make_plan(case.table, {**case.infos, extra: info}, make_plan(case.table, case.infos).infos)
    assert [(finding.status, finding.name) for finding in caught.value.findings] == [("unexpected", extra)]


@quick
@given(cases(), st.data(), st.sampled_from(["longer", "deeper", "shallower"]))
def test_any_misshapen_key_is_named(case, data, change):
    targets = make_plan(case.table, case.infos).infos
    name = data.draw(st.sampled_from(case.kept))
    info = case.infos[name]
    first = info.shape[0]
    shape = {"longer": (7 * first, *info.shape[1:]), "deeper": (*info.shape, 2), "shallower": info.shape[1:]}[change]
    with pytest.raises(ConversionError) as caught:
        make_plan(case.table, {**case.infos, name: replace(info, shape=shape)}, targets)
    assert {finding.status for finding in caught.value.findings} == {"shape"}
    assert name in {finding.name for finding in caught.value.findings} <= case.siblings(name)


@quick
@given(cases(), st.data())
def test_any_key_of_another_kind_of_numbers_is_named(case, data):
    targets = make_plan(case.table, case.infos).infos
    name = data.draw(st.sampled_from(case.kept))
    info = case.infos[name]
    other = replace(info, dtype="int64" if is_float(info.dtype) else "float32")
    with pytest.raises(ConversionError) as caught:
        make_plan(case.table, {**case.infos, name: other}, targets)
    assert {finding.status for finding in caught.value.findings} == {"dtype"}
    assert name in {finding.name for finding in caught.value.findings} <= case.siblings(name)


@quick
@given(cases(), st.data())
def test_a_key_under_a_second_spelling_is_named(case, data):
    """Two keys that lead to one target: one of the other naming, or of the native one, among those of the first."""
    other = RuleTable("other", "test", tuple(respelled(part) for part in case.table.parts))
    native = case.table.identity("native")
    plan = make_plan(case.table, case.infos)
    name = data.draw(st.sampled_from(case.kept))
    if data.draw(st.booleans()):
        extra = data.draw(st.sampled_from(plan.targets_of(name)))
    else:
        rule, index, layers = case.table.claims(name)[0]
        extra = "second." + rule.source_patterns[index].fill(layers)
    assume(extra not in case.tensors)
    mixed = {**case.infos, extra: replace(case.infos[name], name=extra)}
    with pytest.raises(ConversionError) as caught:
        choose_table((case.table, other, native), mixed, model="test")
    assert [(finding.status, finding.name) for finding in caught.value.findings] == [("duplicate", extra)]
    with pytest.raises(ConversionError) as caught:
        both = replace(case.table, parts=(*case.table.parts, *(other.parts if "second" in extra else native.parts)))
        make_plan(both, {**mixed, **{other: replace(mixed[extra], name=other) for other in whole_group(both, extra)}})
    assert any(finding.status == "duplicate" for finding in caught.value.findings)


@quick
@given(cases(), st.data())
def test_an_alias_of_other_bits_is_named(case, data):
    there = sorted(name for name in aliases(case) if case.infos[name].num_elements)
    assume(there)
    name = data.draw(st.sampled_from(there))
    tensor = case.tensors[name]
    flipped = bytearray(tensor.data.tobytes())
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1
    wrong = np.frombuffer(bytes(flipped), tensor.data.dtype).reshape(tensor.shape)
    source = MemorySource({**case.tensors, name: RawTensor(tensor.dtype, tensor.shape, wrong)})
    view = make_plan(case.table, source.infos).view(source)
    with pytest.raises(UserError, match="different values") as caught:
        for target in view.infos:
            view.read(target)
    assert name in str(caught.value) and case.table.claims(name)


def whole_group(table: RuleTable, name: str) -> list[str]:
    """The names that the rule of `name` needs besides it."""
    rule, _, layers = table.claims(name)[-1]
    return [pattern.fill(layers) for pattern in rule.needed_patterns]


def respelled(part: Part) -> Part:
    """The part with other source names and the same targets."""
    return replace(part, rules=tuple(_respelled(rule) for rule in part.rules))


def _respelled(rule: Rule) -> Rule:
    names = tuple("second." + name for name in rule.sources)
    match rule:
        case Concat():
            return Concat(names, rule.target)
        case Split():
            return Split(names[0], rule.target)
        case Tie():
            return Tie(names, rule.target)
        case Drop():
            return Drop(names[0], rule.reason)
        case _:
            return Rename(names[0], rule.targets[0])
