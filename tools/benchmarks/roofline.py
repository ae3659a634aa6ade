"""What a device could do at best with a model: operations and bytes of every stage, counted without running it.

`python -m mindvlm.tools.benchmarks.roofline --model vary_toy` prints them, with the times of NPUs on paper.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mindvlm.core.errors import Parser, UserError
from mindvlm.models.registry import FAMILIES
from mindvlm.tools import cli
from mindvlm.tools.benchmarks.inference import PAGE_TOKENS
from mindvlm.tools.benchmarks.workload import Workload, benchmark_models
from mindvlm.weights.rules.findings import format_table


@dataclass(frozen=True)
class Device:
    """Peaks that a vendor publishes.

    Attributes:
        flops: float16 operations per second.
        bandwidth: bytes per second of its memory.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of a stage.

    Attributes:
        flops: of matrix products and attention, two for a multiplication with an addition.
        num_bytes: weights and keys and values, each read once; activations are left out.
    """

    flops: float
    num_bytes: float

    def seconds(self, device: Device) -> float:
        """Returns the least time of the stage on a device."""
        return max(self.flops / device.flops, self.num_bytes / device.bandwidth)


# sources differ about the 910B: 256 to 376 TFLOP/s, 0.4 to 1.6 TB/s
DEVICES = {"Ascend 910A": Device(256e12, 1.2e12), "Ascend 910B": Device(320e12, 1.6e12)}


def stage_costs(workload: Workload, *, value_bytes: int = 2, num_tokens: int = PAGE_TOKENS) -> dict[str, Cost]:
    """Returns the cost of `vision`, `prefill` and one `decode` step in the middle of the answer.

    The torch reference runs on torch's device "meta", which computes shapes alone.

    Args:
        value_bytes: of a weight, a key or a value.
        num_tokens: length of the answer.
    """
    with torch.device("meta"):
        model = workload.reference_type()(workload.model_config).eval()
        pixels = [torch.empty(shape) for shape in workload.pixel_shapes]
    decoder = workload.model_config.language_model
    prompt_length = workload.prompt_ids.shape[1]
    middle = prompt_length + num_tokens // 2
    caches = {length: model.new_cache(1, length + 1) for length in (prompt_length, middle)}
    embeds = torch.empty(1, prompt_length, decoder.hidden_size, device="meta")
    caches[middle].length = middle
    token = torch.empty(1, dtype=torch.long, device="meta")
    read = sum(math.prod(shape) for name, shape in workload.shapes.items() if name.startswith(workload.decode_prefixes))
    embedding = decoder.vocab_size * decoder.hidden_size
    towers = workload.num_parameters - read - (0 if decoder.tie_word_embeddings else embedding)
    position = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    return {
        "vision": Cost(count_flops(model.encode_images, *pixels), value_bytes * towers),
        "prefill": Cost(
            count_flops(model.prefill, embeds, caches[prompt_length]), value_bytes * (read + position * prompt_length)
        ),
        "decode": Cost(count_flops(model.decode_step, token, caches[middle]), value_bytes * (read + position * middle)),
    }


def count_flops(function: Callable[..., Any], *inputs: Any) -> float:
    """Returns the operations of a call on the device "meta"."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        function(*inputs)
    return counter.get_total_flops()


def page_seconds(costs: Mapping[str, Cost], device: Device, num_tokens: int = PAGE_TOKENS) -> float:
    """Returns the least time of a picture, its prompt and an answer."""
    return sum(costs[stage].seconds(device) * count for stage, count in page_stages(num_tokens).items())


def page_stages(num_tokens: int) -> dict[str, int]:
    return {"vision": 1, "prefill": 1, "decode": num_tokens}


def tables(costs: Mapping[str, Cost]) -> list[str]:
    """Returns the lines of the costs and of the least times."""
    rows = [("stage", "GFLOP", "GB read", "FLOP/byte", *(f"{name}, ms" for name in DEVICES))]
    for stage, cost in costs.items():
        times = (f"{1e3 * cost.seconds(device):.2f}" for device in DEVICES.values())
        rows.append(
            (
                stage,
                f"{cost.flops / 1e9:.1f}",
                f"{cost.num_bytes / 1e9:.2f}",
                f"{cost.flops / cost.num_bytes:.0f}",
                *times,
            )
        )
    rows.append(("page", "", "", "", *(f"{1e3 * page_seconds(costs, device):.0f}" for device in DEVICES.values())))
    rates = (f"{1 / costs['decode'].seconds(device):.0f}" for device in DEVICES.values())
    return [*format_table(rows, numbers=range(1, len(rows[0]))), f"tokens/s at most: {', '.join(rates)}"]


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables of a model; returns the exit status."""
    return cli.run(print_tables, arguments)


def print_tables(arguments: list[str] | None) -> int:
    models = benchmark_models(list(FAMILIES))
    parser = Parser(prog="python -m mindvlm.tools.benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(models), default=next(iter(models)), help="(default: %(default)s)")
    parser.add_argument("--bits", type=int, default=16, help="of a value (default 16)")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.bits not in (8, 16, 32):
        raise UserError(f"--bits {options.bits}: expected 8, 16 or 32")
    model = models[options.model]
    workload = model.workload(model.config(), seed=0, num_tokens=PAGE_TOKENS)
    print(*tables(stage_costs(workload, value_bytes=options.bits // 8)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
