"""Layers of sources override one another, and a selection keeps the order."""

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource, RawTensor
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.findings import ConversionError
from mindvlm.weights.rules.overlaid import OverlaidSource, SelectedSource


def source(value, *names, shape=(2, 3), dtype=np.float32):
    return MemorySource({name: np.full(shape, value, dtype) for name in names}, f"{value}.bin")


def test_a_later_layer_overrides():
    layered = OverlaidSource(
        [("base", source(0, "a", "b", "c")), ("tower", source(1, "b", "d")), ("projector", source(2, "b", "c"))]
    )
    assert list(layered.infos) == ["a", "b", "c", "d"]
    assert {name: layered.read(name).data[0, 0] for name in layered.infos} == {"a": 0, "b": 2, "c": 2, "d": 1}
    assert layered.origins == {"a": 0, "b": 2, "c": 2, "d": 1}
    assert layered.overridden == [("b", 0), ("b", 1), ("c", 0)]
    assert layered.labels == ("base", "tower", "projector")
    assert [len(chunk) for chunk in layered.chunks("b", 16)] == [4, 2]


def test_dtypes_may_differ_within_a_kind():
    layered = OverlaidSource([("base", source(0, "a")), ("tower", source(1, "a", dtype=np.float16))])
    assert layered.infos["a"].dtype == "float16" and layered.read("a").data.dtype == np.float16


@pytest.mark.parametrize(
    ("upper", "message"),
    [
        (source(1, "a", shape=(3, 2)), r"tower does not .*: 1 shape; first: shape a \(\[3, 2\], base has \[2, 3\]\)"),
        (source(1, "b", "a", dtype=np.int64), r"1 dtype; first: dtype a \(int64, expected floating point\)"),
    ],
)
def test_what_does_not_fit_over_the_layers_below_is_named(upper, message):
    with pytest.raises(ConversionError, match=message):
        OverlaidSource([("base", source(0, "a")), ("tower", upper)])


def test_no_layer_at_all():
    with pytest.raises(UserError, match="no source was given"):
        OverlaidSource([])


def test_closing_closes_all():
    class Closing(MemorySource):
        closed = 0

        def close(self):
            Closing.closed += 1

    with OverlaidSource([("a", Closing({})), ("b", Closing({}))]):
        pass
    SelectedSource(Closing({}), []).close()
    assert Closing.closed == 3


def test_a_selection_keeps_the_order_of_the_source():
    tensors = {name: RawTensor("bfloat16", (1,), np.array([index], np.uint16)) for index, name in enumerate("abcd")}
    selected = SelectedSource(MemorySource(tensors), ["d", "b"])
    assert list(selected.infos) == ["b", "d"] and selected.read("d").data.tolist() == [3]


def test_selecting_what_is_not_there():
    with pytest.raises(UserError, match="0.bin: has no tensor z"):
        SelectedSource(source(0, "a"), ["a", "z"])
