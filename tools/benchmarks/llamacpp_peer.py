"""llama.cpp as a contender of the benchmark: the decoder alone, of the package `xllamacpp` in this process."""

from __future__ import annotations

import importlib.metadata
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import numpy as np
import xllamacpp

from mindvlm.tools.benchmarks.worker import InferencePeer
from mindvlm.tools.benchmarks.workload import Workload

QUIET = -1
GREEDY = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "return_tokens": True}


class Inference(InferencePeer):
    """llama.cpp's server without its HTTP. A prompt consists of text: the server takes no features of pictures."""

    def __init__(self, workload: Workload, *, dtype: str, num_threads: int) -> None:
        self.workload, self.dtype, self.num_threads = workload, dtype, num_threads
        self.path = workload.gguf_file(dtype)
        self.prompt_ids = np.maximum(workload.prompt_ids, 0)
        self.sizes = (0, 0)

    def describe(self) -> dict[str, Any]:
        reader = gguf.GGUFReader(self.path)
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
        version = importlib.metadata.version("xllamacpp")
        return {
            "text": f"llama.cpp of xllamacpp {version}, {self.dtype}, {self.num_threads} threads, the decoder alone",
            "stored_bytes": sum(sizes.values()),
            "decode_bytes": sum(size for name, size in sizes.items() if not name.startswith("token_embd")),
        }

    def load(self) -> None:
        self.open_server(1, self.workload.total_length + 1)

    def open_server(self, num_rows: int, capacity: int) -> None:
        if self.sizes == (num_rows, capacity):
            return
        # the memory of the former one must be free before
        self.server = None
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(self.path)
        parameters.n_parallel, parameters.n_ctx = num_rows, num_rows * capacity
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = self.num_threads
        # copies of earlier prompts would cost time and memory
        parameters.cache_ram_mib, parameters.n_ctx_checkpoints = 0, 0
        parameters.warmup, parameters.verbosity = False, QUIET
        self.server, self.sizes = xllamacpp.Server(parameters), (num_rows, capacity)

    def vision(self) -> None:
        """Does nothing."""

    def prompt_logits(self) -> np.ndarray:
        self.answer(self.prompt_ids, 1, cache_prompt=False)
        return np.zeros((1, 0), np.float32)

    def generate(self, num_tokens: int) -> list[int]:
        # the prompt is in the cache; its last token is computed again, so this runs num_tokens steps
        return self.answer(self.prompt_ids, num_tokens, cache_prompt=True)[0]

    def start_rows(self, ids: np.ndarray, capacity: int) -> None:
        self.open_server(len(ids), capacity)
        self.rows = ids
        self.answer(ids, 1, cache_prompt=False)

    def continue_rows(self, num_tokens: int) -> None:
        self.answer(self.rows, num_tokens, cache_prompt=True)

    def answer(self, ids: np.ndarray, num_tokens: int, *, cache_prompt: bool) -> list[list[int]]:
        """Answers prompts (B, L), each in a slot of its own; returns the new ids."""

        def complete(slot: int) -> list[int]:
            request = {"prompt": ids[slot].tolist(), "n_predict": num_tokens, "id_slot": slot}
            reply = self.server.handle_completions(request | GREEDY | {"cache_prompt": cache_prompt})
            return [int(word[1:]) for word in reply["choices"][0]["text"].split()]

        with ThreadPoolExecutor(len(ids)) as pool:
            return list(pool.map(complete, range(len(ids))))
