"""Runs a few layers of a SliME of published widths: real_widths_job.py <7b|8b|13b|70b> <layers> <result.npz>

Under msrun the processes share the weights. The first one saves what it computed and the memory of each process.
"""

import sys
import time
from pathlib import Path

from mindvlm.parallel.launch import ends_all_ranks, limit_threads

SIDE, NUM_TOKENS, NUM_LOCAL = 112, 64, 16
# CLIP-L's widths on a small image
TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2,
    "num_attention_heads": 16, "image_size": SIDE, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip


def main(name: str, num_layers: int, result: Path) -> None:
    import numpy as np
    from mindspore import ops

    from mindvlm.convert.random_weights import BLOCK_ELEMENTS, RandomSource
    from mindvlm.core import runtime
    from mindvlm.core.config import GenerationConfig
    from mindvlm.core.host_memory import peak_memory
    from mindvlm.generation.engine import Engine
    from mindvlm.generation.request import Request
    from mindvlm.models.loading import build_model
    from mindvlm.models.registry import get_family
    from mindvlm.models.slime import released
    from mindvlm.models.slime.hf_config import from_hf_config
    from mindvlm.nn.parameters import fill_parameters, parameter_shapes
    from mindvlm.parallel import sharding
    from mindvlm.parallel.host import HostGather
    from mindvlm.parallel.mesh import init_tensor_parallel

    published = {
        "7b": released.vicuna_7b_config,
        "8b": released.llama3_8b_config,
        "13b": released.vicuna_13b_config,
        "70b": released.llama3_70b_config,
    }[name]()
    context = runtime.start(runtime.RuntimeConfig(device="cpu", mode="pynative"))
    mesh = init_tensor_parallel(None)
    changes = {"num_hidden_layers": num_layers, "mm_resampler_dim": NUM_LOCAL}
    config = from_hf_config({**published, **changes}, vision_config=TOWER)
    model, divided = build_model(get_family("slime"), config, context, mesh=mesh)
    parts, specs = parameter_shapes(model), divided.specs
    shapes = {key: specs[key].full_shape(shape) if key in specs else shape for key, shape in parts.items()}
    # random values are generated in blocks of this size
    sharding.CHUNK_BYTES = 4 * BLOCK_ELEMENTS
    start = time.perf_counter()
    fill_parameters(model, sharding.ShardedSource(RandomSource(shapes, 0), specs))
    seconds = {"load": time.perf_counter() - start}

    engine = Engine(model, placeholder_id=-200, max_length=512, graph_mode=False)
    rng = np.random.default_rng(0)
    views = [rng.standard_normal(shape).astype(np.float32) for shape in ((1, 3, SIDE, SIDE), (1, 2, 3, SIDE, SIDE))]
    text = rng.integers(3, config.language_model.vocab_size, 40).tolist()
    features = ops.concat([engine.encode_images(pixels) for pixels in views], 0)
    layout = np.array([*range(NUM_TOKENS), -1, *range(NUM_TOKENS, NUM_TOKENS + 2 * NUM_LOCAL)], np.int32)
    rows = model.picture_rows(features, layout, text)
    options = GenerationConfig(max_new_tokens=8)
    slot = engine.add(Request(ids=[*text[:5], *[-200] * len(rows), *text[5:]], features=rows, options=options))
    logits = engine.next_logits.asnumpy()
    while slot.is_running:
        engine.step()
    seconds["answer"] = time.perf_counter() - start - seconds["load"]
    weights = sum(parameter.nbytes for parameter in model.get_parameters())
    memory = np.array(HostGather(mesh).over_tp(np.array([weights, peak_memory()], np.float32)))
    if mesh.is_first:
        np.savez(result, ids=slot.new_ids, rows=len(rows), logits=logits, memory=memory, **seconds)


if __name__ == "__main__":
    limit_threads()
    with ends_all_ranks():
        main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
