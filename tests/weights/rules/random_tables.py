"""Random rule tables and state dicts that fit them, for property tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from mindvlm.checkpoint import DTYPES, MemorySource, RawTensor, TensorInfo
from mindvlm.checkpoint.dtypes import storage_dtype
from mindvlm.weights.rules.operations import Concat, Drop, Rename, Rule, Split, Tie
from mindvlm.weights.rules.planning import make_plan
from mindvlm.weights.rules.table import Part, RuleTable

KINDS = ("rename", "identity", "split", "concat", "tie", "drop")


@dataclass(frozen=True)
class Case:
    """A random table and a state dict that fits it."""

    table: RuleTable
    tensors: dict[str, RawTensor]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return infos_of(self.tensors)

    @property
    def kept(self) -> list[str]:
        """The tensors that are not dropped."""
        return sorted(name for name in self.tensors if self.rule_of(name).targets)

    def rule_of(self, name: str) -> Rule:
        return self.table.claims(name)[0][0]

    def siblings(self, name: str) -> set[str]:
        """The tensors that go through the same rule in the same layer, itself among them."""
        group = self.table.claims(name)[0][::2]
        return {other for other in self.tensors if self.table.claims(other)[0][::2] == group}

    def apply(self):
        source = MemorySource(self.tensors)
        return make_plan(self.table, source.infos).view(source)


def infos_of(tensors: dict[str, RawTensor]) -> dict[str, TensorInfo]:
    return dict(MemorySource(tensors).infos)


def random_tensor(seed: int, dtype: str, shape: tuple[int, ...]) -> RawTensor:
    """Any bits, NaN and infinities among them."""
    generator = np.random.default_rng(seed)
    if dtype == "bool":
        return RawTensor(dtype, shape, generator.integers(0, 2, shape).astype(bool))
    storage = storage_dtype(dtype)
    size = int(np.prod(shape)) * storage.itemsize
    data = np.frombuffer(generator.bytes(size), storage).reshape(shape)
    return RawTensor(dtype, shape, data)


def make_rule(kind: str, source: str, target: str, num_parts: int) -> Rule:
    parts = tuple(f"{target if kind == 'split' else source}.p{part}" for part in range(num_parts))
    match kind:
        case "rename":
            return Rename(source, target)
        case "identity":
            return Rename(target, target)
        case "split":
            return Split(source, parts)
        case "concat":
            return Concat(parts, target)
        case "tie":
            return Tie((source, *(f"{source}.alias{index}" for index in range(num_parts))), target)
        case _:
            return Drop(source, "not needed")


@st.composite
def cases(draw, prefix: str = "old"):
    seed = draw(st.integers(0, 2**32))
    parts, tensors = [], {}
    for part in range(draw(st.integers(1, 3))):
        counts = (draw(st.integers(1, 4)), draw(st.integers(1, 3)))
        rules = []
        for index, kind in enumerate(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))):
            depth = draw(st.integers(0, 2))
            middle = ("", "h.{}.", "h.{}.e{}.")[depth]
            num_parts = draw(st.integers(1, 3))
            rule = make_rule(kind, f"{prefix}{part}.{middle}r{index}", f"new{part}.{middle}t{index}", num_parts)
            rules.append(rule)
            shape = (num_parts * draw(st.integers(1, 3)), *draw(st.lists(st.integers(0, 3), max_size=2)))
            dtype = draw(st.sampled_from(DTYPES))
            patterns = [p for p in rule.source_patterns if p.text not in rule.optional or draw(st.booleans())]
            if isinstance(rule, Drop) and draw(st.booleans()):
                patterns = []
            for numbers in np.ndindex(counts[:depth]):
                seed += 1
                for pattern in patterns:
                    seed += not isinstance(rule, Tie)
                    tensors[pattern.fill(numbers)] = random_tensor(seed, dtype, shape)
        parts.append(Part(f"part {part}", tuple(rules)))
    order = draw(st.permutations(sorted(tensors)))
    case = Case(RuleTable("random", "test", tuple(parts)), {name: tensors[name] for name in order})
    assume(case.kept)
    return case


def aliases(case: Case) -> set[str]:
    return {
        name for name in case.kept for rule, index, _ in case.table.claims(name) if rule.sources[index] in rule.optional
    }


def patterns(case: Case):
    return [pattern for rule in case.table.rules for pattern in rule.source_patterns]
