"""Peak memory of graphs beside that of the plain computation, each measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

LOSS = """
import sys
import mindspore as ms, numpy as np
from mindspore import Tensor, nn, ops
from mindvlm.nn.loss import NextTokenLoss
from tests.nn.plain_loss import next_token_loss

ms.set_context(mode=ms.GRAPH_MODE)
class Plain(nn.Cell):
    def __init__(self):
        super().__init__()
        self.head = ops.MatMul(transpose_b=True)
    def construct(self, states, matrix, labels):
        logits = self.head(states.reshape((-1, 64)), matrix)
        return next_token_loss(logits.reshape((4, 1024, 32768)), labels)
cell = (Plain() if sys.argv[1] == "plain" else NextTokenLoss()).set_train()
states, matrix = (Tensor(np.zeros(shape, np.float32)) for shape in ((4, 1024, 64), (32768, 64)))
labels = Tensor(np.zeros((4, 1024), np.int32))
_, gradients = ops.value_and_grad(cell, (0, 1), has_aux=sys.argv[1] != "plain")(states, matrix, labels)
gradients[1].asnumpy()
"""
ATTENTION = """
import sys
import mindspore as ms, numpy as np
from mindspore import Tensor, nn, ops
from mindvlm.nn.attention_core import causal_attention_core

ms.set_context(mode=ms.GRAPH_MODE)
class Plain(nn.Cell):
    def __init__(self):
        super().__init__()
        self.by_rows, self.product = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
    def construct(self, query, key, value):
        return self.product(ops.softmax(self.by_rows(query, key)), value)
class Stack(nn.Cell):
    def __init__(self):
        super().__init__()
        self.core = Plain() if sys.argv[1] == "plain" else causal_attention_core()
    def construct(self, x):
        for _ in range(6):
            x = self.core(x, x + 1.0, x - 1.0)
        return x.sum()
gradient = ms.grad(Stack())(Tensor(np.random.rand(8, 1024, 16).astype(np.float32)))
gradient.asnumpy()
"""
PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def saved_bytes(program: str, folder) -> int:
    """Returns the peak of the plain computation minus that of ours."""
    (folder / "peak.py").write_text(program + PEAK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    peak = {}
    for kind in ("ours", "plain"):
        command = [sys.executable, str(folder / "peak.py"), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)
        peak[kind] = int(done.stdout.split()[-1]) * 1024
    return peak["plain"] - peak["ours"]


def test_all_logits_are_never_in_memory(tmp_path):
    all_logits = 4 * 1024 * 32768 * 4
    assert saved_bytes(LOSS, tmp_path) > 2 * all_logits


def test_probabilities_of_all_layers_are_never_in_memory(tmp_path):
    probabilities_of_a_layer = 8 * 1024 * 1024 * 4
    assert saved_bytes(ATTENTION, tmp_path) > 4 * probabilities_of_a_layer
