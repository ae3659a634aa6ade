"""Script of the processes of a test: msrun ... job.py <folder> <layouts>; without msrun it runs in one process.

Each layout trains and leaves its full tensors in `<layout>.safetensors` and what it measured in `<layout>.json`. One
named "_resumed" starts from `half_way.safetensors` and trains the second half. A further "_graph" compiles the step.
"""

import json
import sys
from pathlib import Path

from mindvlm.parallel.launch import ends_all_ranks, limit_threads

LAYOUTS = {
    "single": ("qwen", {}),
    "single_opt": ("opt", {}),
    "dp2": ("qwen", {"dp": 2}),
    "dp2_zero2": ("qwen", {"dp": 2, "zero": 2}),
    "tp2": ("qwen", {"tp": 2}),
    "tp2_opt": ("opt", {"tp": 2}),
    "dp2_tp2": ("qwen", {"dp": 2, "tp": 2}),
    "dp2_tp2_zero1_resumed": ("qwen", {"dp": 2, "tp": 2, "zero": 1}),
    "dp4_zero1": ("qwen", {"dp": 4, "zero": 1}),
    "dp2_tp2_zero2_opt": ("opt", {"dp": 2, "tp": 2, "zero": 2}),
    "tp4": ("qwen", {"tp": 4}),
    "dp2_passes2": ("qwen", {"dp": 2}, 2),
    "dp2_zero2_passes2": ("qwen", {"dp": 2, "zero": 2}, 2),
}
NUM_STEPS = 20
HALF_WAY = "half_way.safetensors"


def layout_of(name: str) -> tuple:
    """Returns dialect and parallel config, and perhaps the number of passes, of a layout in either mode."""
    return LAYOUTS[name.removesuffix("_graph")]


def main(folder: Path, names: list[str]) -> None:
    from mindvlm.core import runtime
    from mindvlm.parallel.mesh import ParallelConfig, create_mesh, init_parallel
    from tests.parallel.tiny_training import TinyTraining

    runtime.start(runtime.RuntimeConfig(device="cpu"))
    configs = [ParallelConfig(**layout_of(name)[1]) for name in names]
    rank = init_parallel(configs[0]).rank
    for name, parallel in zip(names, configs, strict=True):
        runtime.set_mode(name.endswith("_graph"))
        dialect, _, *passes = layout_of(name)
        mesh = create_mesh(parallel, rank=rank, device="CPU")
        training = TinyTraining(dialect, parallel, mesh, num_passes=passes[0] if passes else 1)
        is_resumed = "_resumed" in name
        if is_resumed:
            training.load(folder / HALF_WAY)
        results = training.run(NUM_STEPS // 2 if is_resumed else 0, NUM_STEPS)
        report = {"results": results, "state_bytes": training.state_bytes}
        training.save(folder / f"{name}.safetensors")
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    limit_threads()
    with ends_all_ranks():
        main(Path(sys.argv[1]), sys.argv[2:])
