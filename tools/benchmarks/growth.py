"""Speed of the decoder as contexts, prompts and batches grow: text prompts, a process for each contender."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mindvlm.tools.benchmarks.inference import summary_table
from mindvlm.tools.benchmarks.worker import Contender, Worker
from mindvlm.tools.benchmarks.workload import Workload

LENGTHS = (128, 512, 2048, 8192)
BATCHES = (1, 2, 4, 8, 16)


def points() -> list[tuple[int, int]]:
    """Returns (rows, prompt length) to measure: one row of every length, then several of the shortest."""
    return [(1, length) for length in LENGTHS] + [(rows, LENGTHS[0]) for rows in BATCHES[1:]]


def run_growth(
    workload: Workload, contenders: Sequence[Contender], *, num_rounds: int, num_threads: int
) -> list[dict[str, Any]]:
    """Returns for each contender and point `rows`, `length`, `prefill_tokens_per_s` and `decode_tokens_per_s`.

    Rates are medians over the rounds and count the tokens of all rows together.
    """
    num_tokens = workload.num_tokens
    # room for the longest prompt
    longest = dataclasses.replace(workload, num_tokens=LENGTHS[-1] + num_tokens)
    measured: dict[tuple[Contender, int, int], list[Mapping[str, float]]] = {}
    for number in range(num_rounds):
        for contender in contenders:
            with Worker(contender, "Inference", longest, num_threads=num_threads) as worker:
                worker.ask("load")
                for rows, length in points():
                    seconds = worker.ask("grow", rows, length, num_tokens)["value"]
                    measured.setdefault((contender, rows, length), []).append(seconds)
                    print(
                        f"round {number + 1}/{num_rounds} {contender}, {rows} x {length} tokens: prefill "
                        f"{seconds['prefill_s']:.2f} s, {num_tokens} steps {seconds['decode_s']:.2f} s",
                        file=sys.stderr,
                        flush=True,
                    )
    return [
        {
            "contender": str(contender),
            "rows": rows,
            "length": length,
            "prefill_tokens_per_s": rows * length / statistics.median(one["prefill_s"] for one in seconds),
            "decode_tokens_per_s": rows * num_tokens / statistics.median(one["decode_s"] for one in seconds),
        }
        for (contender, rows, length), seconds in measured.items()
    ]


def growth_tables(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a table of prefill and one of decode: a row for each contender, a column for each point."""
    tables = []
    for stage in ("prefill", "decode"):
        table: dict[str, dict[str, float]] = {}
        for one in figures:
            row = table.setdefault(one["contender"], {})
            row[f"{one['rows']} x {one['length']}"] = one[f"{stage}_tokens_per_s"]
        tables.append(f"{stage}, tokens/s of rows x prompt length\n{summary_table(table)}")
    return tables
