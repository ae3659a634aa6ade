"""Script of the processes of a test: msrun ... ranks_job.py <folder for results>"""

import json
import sys
from pathlib import Path

import numpy as np

from mindvlm.parallel.launch import ends_all_ranks, limit_threads

LAYOUTS = {"tp2": dict(tp=2), "dp2": dict(dp=2), "dp2_zero1": dict(dp=2, zero=1), "dp2_zero2": dict(dp=2, zero=2)}


def run_tensors(training, host):
    """The tensors of a tiny training as a trainer keeps them."""
    from mindvlm.parallel.zero import ShardedAdamW
    from mindvlm.training.run_tensors import RunTensors

    optimizer = training.step.optimizer
    sharded = optimizer if isinstance(optimizer, ShardedAdamW) else None
    moments = {} if sharded else {moment.name: moment for moment in (*optimizer.moment1, *optimizer.moment2)}
    return RunTensors(
        {parameter.name: parameter for parameter in training.model.get_parameters()},
        {**moments, "num_updates": optimizer.num_updates},
        sharded=sharded,
        specs=training.divided.specs,
        host=host,
    )


def main(folder: Path) -> None:
    from mindvlm.core import runtime
    from mindvlm.parallel.host import Ranks
    from mindvlm.parallel.mesh import ParallelConfig, create_mesh, init_parallel
    from tests.parallel.tiny_training import TinyTraining

    runtime.start(runtime.RuntimeConfig(device="cpu"))
    rank = init_parallel(ParallelConfig(dp=2)).rank
    for name, layout in LAYOUTS.items():
        config = ParallelConfig(**layout)
        mesh = create_mesh(config, rank=rank, device="CPU")
        ranks = Ranks(mesh)
        heard = {
            "replicas": ranks.of_replicas({"rank": rank, "text": "页" * (rank * 50)}),
            "first": ranks.from_first([1, "a"] if rank == 0 else None),
        }
        (folder / f"{name}-{rank}.json").write_text(json.dumps(heard))
        first = TinyTraining("qwen", config, mesh)
        first.run(0, 2)
        if rank == 0:
            (folder / name).mkdir()
        run_tensors(first, ranks.host).write(folder / name if rank == 0 else None)
        ranks.from_first(None)
        expected = first.run(2, 4)
        second = TinyTraining("qwen", config, mesh)
        run_tensors(second, ranks.host).read(folder / name)
        again = second.run(2, 4)
        assert again == expected, f"{name}: {again} is not {expected}"
        for one, other in zip(first.model.get_parameters(), second.model.get_parameters(), strict=True):
            np.testing.assert_array_equal(one.asnumpy(), other.asnumpy(), err_msg=f"{name} {one.name}")
        print(rank, name, "goes on", flush=True)


if __name__ == "__main__":
    limit_threads()
    with ends_all_ranks():
        main(Path(sys.argv[1]))
