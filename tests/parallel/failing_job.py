"""A job of two ranks of which one fails: msrun ... failing_job.py <how>"""

import os
import signal
import sys

from mindvlm.core.errors import UserError
from mindvlm.parallel.launch import ends_all_ranks


def main(how: str) -> None:
    from mindspore import Tensor

    from mindvlm.core import runtime
    from mindvlm.parallel.collectives import SumOver
    from mindvlm.parallel.mesh import ParallelConfig, init_parallel

    runtime.start(runtime.RuntimeConfig(device="cpu"))
    mesh = init_parallel(ParallelConfig(dp=4 if how == "mismatch" else 2))
    total = SumOver(mesh.dp_group)
    for step in range(100_000):
        total(Tensor([1.0])).asnumpy()
        if step == 10:
            print(f"pid {os.getpid()}", flush=True)
        if step == 20 and mesh.rank == 1:
            if how == "user_error":
                raise UserError("sample 7 is missing; make it")
            if how == "defect":
                raise RuntimeError("an index is wrong")
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with ends_all_ranks():
        main(sys.argv[1])
