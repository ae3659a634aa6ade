"""Tiny models for the logits check: configs, tensors under every naming, and both sides in one process."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

from mindvlm.checkpoint import MemorySource, write_checkpoint
from mindvlm.convert.parity import comparison, process
from mindvlm.convert.parity.comparison import BOUND, ParityReport, read_report
from mindvlm.convert.parity.graphs import ModelStages, fill_target, stages_for
from mindvlm.convert.parity.inputs import ParityRequest, inputs_of
from mindvlm.convert.parity.stages import GREEDY_IDS, stages_of
from mindvlm.convert.random_weights import RandomSource
from mindvlm.convert.reference import stages as reference
from mindvlm.core import runtime
from mindvlm.generation.graphs import GraphRunner
from mindvlm.models.registry import get_family
from mindvlm.models.vary.hf_config import vary_tiny_config, vary_toy_config
from mindvlm.weights.recognise import native_view
from tests.hf_shapes import tiny_shapes, toy_shapes
from tests.known_models import VARY
from tests.models.vary.vary_names import mindocr_name

NUM_TOKENS = 4
LANGUAGE = vary_toy_config() | {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "vocab_size": 64,
    "seq_length": 512,
}
TOWERS = {
    "image_token_len": 8,
    "im_patch_token": 63,
    "im_start_token": 61,
    "im_end_token": 62,
    "vision_config": {
        "hidden_size": 20,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": [28, 56],
    },
    "vision_high_config": {
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "global_attn_indexes": [1],
        "window_size": 6,
        "image_size": [128, 256],
        "out_chans": 8,
        "net_2_channels": 12,
        "net_3_channels": 20,
    },
}
CONFIG = LANGUAGE | TOWERS
TINY_CONFIG = vary_tiny_config() | {
    "hidden_size": 24,
    "word_embed_proj_dim": 24,
    "ffn_dim": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 60,
    "vocab_size": 64,
    "im_patch_token": 61,
    "im_start_token": 62,
    "im_end_token": 63,
    "image_token_len": 8,
    "vision_high_config": TOWERS["vision_high_config"],
}
TEXT_CONFIG = {
    key: value for key, value in LANGUAGE.items() if not key.startswith("im_") and not key.endswith("_config")
}


def source_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face names."""
    shapes = tiny_shapes(config) if "ffn_dim" in config else toy_shapes(config)
    source = RandomSource(shapes, seed)
    tensors = {name: source.read(name).data for name in source.infos}
    if "ffn_dim" in config:
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    return tensors


def native_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    view = native_view(MemorySource(tensors), VARY)
    return {name: view.read(name).data for name in view.infos}


def mindocr_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """MindOCR's names; it keeps q, k and v apart."""
    found = {}
    for name, value in tensors.items():
        if ".c_attn." in name:
            renamed = mindocr_name(name.replace(".attn.c_attn.", ".attention.w#."))
            found |= {renamed.replace("#", part): third for part, third in zip("qkv", np.split(value, 3), strict=True)}
        else:
            found[mindocr_name(name)] = value
    return found


def swapped(tensors: dict[str, np.ndarray], first: str, second: str) -> dict[str, np.ndarray]:
    assert tensors[first].shape == tensors[second].shape and not np.array_equal(tensors[first], tensors[second])
    return tensors | {first: tensors[second], second: tensors[first]}


def write(path, tensors: dict[str, np.ndarray]) -> str:
    write_checkpoint(path, MemorySource(tensors))
    return str(path)


def part(tensors: dict[str, np.ndarray], *prefixes: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in tensors.items() if name.startswith(prefixes)}


def request(source: str, target: str, config: dict, **options) -> ParityRequest:
    """A comparison of a Vary-toy or a Vary-tiny, or of the family and model in `options`."""
    model = "vary_tiny" if "ffn_dim" in config else "vary_toy"
    options = {"family": "vary", "model": model, "num_tokens": NUM_TOKENS} | options
    return ParityRequest(source_paths=[source], target=target, config=config, **options)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Runs the graphs of the check in PyNative mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "set_mode", lambda graph_mode, set_mode=runtime.set_mode: set_mode(False))
        patch.setattr(GraphRunner, "compile", lambda runner, stage, graph, *inputs: None)
        yield


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Runs both sides of the check in this process and in PyNative mode, which saves imports and compiling."""
    with eager(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "run_child", process.run_side)
        yield


class Bench:
    """The reference's stages of one source, and graphs that run any target of the same parts and shapes.

    Args:
        folder: for the files of both sides.
        config: the config.json of the source.
        tensors: the source, of any naming.
        compiled: whether our side runs as graphs, as with the command. Compiling is worth its time for many reports.
        options: see `request`.
    """

    def __init__(self, folder, config: dict, tensors: dict[str, np.ndarray], *, compiled: bool = False, **options):
        self.folder, self.compiled = folder, compiled
        places = (str(folder / f"{name}.safetensors") for name in ("source", "target"))
        self.request = request(*places, config, **options)
        self.expected = self.reference(tensors)
        self.stages: ModelStages | None = None
        self.keep("reference", self.expected)

    def reference(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Stages of a source by the torch side."""
        write(self.request.source_paths[0], tensors)
        return reference.run(self.request)[1]

    def keep(self, side: str, stages: dict[str, np.ndarray]) -> None:
        metadata = {"framework": side, "seconds": "1", "peak_memory_bytes": "1"}
        write_checkpoint(self.folder / f"{side}.safetensors", MemorySource(stages), metadata=metadata)

    def report(self, native: dict[str, np.ndarray], target: dict[str, np.ndarray] | None = None) -> ParityReport:
        """Runs our side over native tensors, or over a target in another naming of them, and compares."""
        request, check = self.request, inputs_of(self.request.family)
        write(request.target, native if target is None else target)
        config = check.parity_config(request, tuple(native))
        scope = check.scope_of(tuple(native), config)
        if self.stages is None:
            self.model = get_family(request.family).build(config).set_train(False)
        fill_target(self.model, request.family, request.target, tuple(native), without=scope.absent)
        self.stages = self.stages or stages_for(self.model, scope, request)
        inputs = check.make_inputs(config, scope, request)
        with contextlib.nullcontext() if self.compiled else eager():
            self.keep("mindspore", self.stages.compute(inputs, self.expected.get(GREEDY_IDS)))
        return read_report(self.folder, stages_of(request.family, request.model), BOUND)
