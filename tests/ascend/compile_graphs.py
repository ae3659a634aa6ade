"""Compiles graphs as they are on Ascend and runs none: python -m tests.ascend.compile_graphs JSON

JSON is {"config": YAML, "dtype": name, "attention": "fused" or "eager", "job": see `train_graphs`, or "predict",
"num_processes": those that share the model when it predicts, "graphs": names}. Each graph gives one line of
JSON: its name, the error or null, and how many fused attentions it holds, forward and backward. Widths and picture
sizes are the config's own, but of every stack only as many layers as differ from each other are built.

Needs MS_SIMULATION_LEVEL=0 in the environment, and RANK_SIZE: the number of processes, 2 for the parallel step.
"""

import json
import re
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindvlm.core import runtime
from mindvlm.generation.graphs import DecodeGraph, MergeGraph, PrefillGraph, ScoreGraph, VisionGraph
from mindvlm.generation.sampling import FEW_CANDIDATES, GreedyGraph, SamplingGraph
from mindvlm.models.delvm.distillation import DistillationConfig
from mindvlm.models.delvm.teacher import DistilledDecoder
from mindvlm.models.own_training import PassInputs, text_inputs
from mindvlm.models.registry import get_family
from mindvlm.models.run_config import read_config
from mindvlm.nn.config import height_and_width
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.lora import LoraConfig
from mindvlm.nn.parameters import freeze
from mindvlm.parallel.mesh import Mesh, ParallelConfig
from mindvlm.parallel.plan import ParallelModel, apply_tensor_parallel
from mindvlm.sessions.picture_sequence_model import PictureGraph
from mindvlm.training.lora import add_lora
from mindvlm.training.loss import LossScaleConfig
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep
from mindvlm.training.step_runner import model_arguments
from mindvlm.training.trainable import choose_trainable

CONFIGS = Path(__file__).parents[2] / "configs"
BATCH_SIZE, NUM_IMAGES, LENGTH, CAPACITY = 2, 2, 320, 512
NUM_LAYERS = 2
FUSED_OPERATORS = (b"FlashAttentionScore", b"FlashAttentionScoreGrad")


class Checked(nn.Cell):
    """A graph whose result must have one shape and dtype; a silent promotion to float32 ends here."""

    def __init__(self, graph, shape, dtype):
        super().__init__(auto_prefix=False)
        self.graph = graph
        self.shape = shape
        self.result_dtype = dtype

    def construct(self, *inputs):
        result = self.graph(*inputs)
        if result.shape != self.shape or result.dtype != self.result_dtype:
            raise ValueError("the graph's result has another shape or dtype than expected")
        return result


def small_config(path: str):
    """The config with every stack cut to `NUM_LAYERS`: of the vision vocabulary one windowed and one global block."""
    config = read_config(path)
    model = config.model
    model.language_model.num_hidden_layers = NUM_LAYERS
    if vocabulary := getattr(model, "vision_vocabulary", None):
        vocabulary.depth = 2
        vocabulary.global_attn_indexes = [1]
    if tower := getattr(model, "vision_tower", None):
        tower.num_hidden_layers = NUM_LAYERS
    if router := getattr(model, "router", None):
        # in training only
        model.gate_noise, router.noise = True, 0.1
    return config


def blank(*shape: int, dtype) -> Tensor:
    """A tensor that has shape and dtype and no memory."""
    return Tensor(shape=shape, dtype=dtype)


def pixels(model_config, dtype) -> list[Tensor]:
    sections = [getattr(model_config, name, None) for name in ("vision_tower", "vision_vocabulary")]
    towers = [tower for tower in sections if tower]
    return [blank(NUM_IMAGES, 3, *height_and_width(tower.image_size), dtype=dtype) for tower in towers]


def predict_graphs(config, model, dtype) -> dict:
    """name -> (graph, its inputs) of everything that predict runs."""
    model.set_train(False)
    decoder, sizes = model.language_model, config.model.language_model
    hidden, vocab_size = sizes.hidden_size, sizes.vocab_size
    caches = decoder.new_caches(BATCH_SIZE, CAPACITY)
    tokens = blank(BATCH_SIZE, LENGTH, dtype=ms.int32)
    embeds = blank(BATCH_SIZE, LENGTH, hidden, dtype=dtype)
    counts = blank(BATCH_SIZE, dtype=ms.int32)
    inv_freq = blank(sizes.rotary_dim // 2, dtype=ms.float32)
    of_rows = blank(BATCH_SIZE, sizes.rotary_dim // 2, dtype=ms.float32)
    row, of_row = blank(1, dtype=ms.int32), blank(1, sizes.rotary_dim // 2, dtype=ms.float32)
    bucket = positions = blank(1, LENGTH, dtype=ms.int32)
    num_rows = getattr(config.model, "num_global_tokens", config.model.image_token_len)
    features = (NUM_IMAGES, num_rows, hidden)
    logits = (BATCH_SIZE, vocab_size)
    ids, column = blank(BATCH_SIZE, CAPACITY, dtype=ms.int32), blank(BATCH_SIZE, 1, dtype=ms.float32)
    rules = [ids, ids, column, blank(BATCH_SIZE, dtype=ms.bool_), column, blank(BATCH_SIZE, 1, dtype=ms.int32)]
    rules += [column, column]
    views, seen = pixels(config.model, dtype), (features, dtype)
    pictures = {}
    if num_codes := getattr(config.model, "num_picture_codes", 0):
        # one picture of codes, computed in float32
        shape = (1, 3, config.model.vqgan.resolution, config.model.vqgan.resolution)
        views, seen = [blank(*shape, dtype=ms.float32)], ((1, num_codes), ms.int32)
        codes = blank(1, num_codes, dtype=ms.int32)
        pictures = {"picture": (Checked(PictureGraph(model), shape, ms.float32), [codes])}
    # a bucket of two crops in place of a whole picture
    crops = [blank(NUM_IMAGES, 2, *view.shape[1:], dtype=dtype) for view in views]
    return pictures | {
        "vision": (Checked(VisionGraph(model), *seen), views),
        "crops": (Checked(VisionGraph(model), features, dtype), crops),
        "merge": (
            Checked(MergeGraph(model), embeds.shape, dtype),
            [tokens, blank(BATCH_SIZE * LENGTH, hidden, dtype=dtype), tokens],
        ),
        "prefill": (
            Checked(PrefillGraph(model, caches), logits, dtype),
            [bucket, blank(LENGTH, hidden, dtype=dtype), bucket, positions, of_row, counts, row],
        ),
        "decode": (
            Checked(DecodeGraph(decoder, caches), logits, dtype),
            [counts, blank(BATCH_SIZE, 1, dtype=ms.int32), of_rows],
        ),
        "score": (Checked(ScoreGraph(decoder), (BATCH_SIZE, LENGTH, vocab_size), dtype), [embeds, inv_freq]),
        "greedy": (Checked(GreedyGraph(), (BATCH_SIZE,), ms.int32), [blank(*logits, dtype=dtype)]),
        "sample": (
            Checked(SamplingGraph(FEW_CANDIDATES), (BATCH_SIZE,), ms.int32),
            [blank(*logits, dtype=dtype), *rules],
        ),
    }


def train_graphs(config, model, dtype, *, job: str) -> dict:
    """name -> (graph, its inputs) of the training step, as `TrainStep` builds it.

    Args:
        job: "step" for one pass in one graph; "passes" for accumulation; "lora step" with adapters; "recomputed step";
            "parallel step" for one of dp 2 x tp 2 processes with ZeRO-2; "distilled step" and "distilled parallel
            step" with a teacher. The front end takes the size of every group from RANK_SIZE.
    """
    model.set_train()
    parallel, mesh, divided = ParallelConfig(), Mesh(device="Ascend"), ParallelModel()
    if job.endswith("parallel step"):
        parallel, mesh = ParallelConfig(dp=2, tp=2, zero=2), Mesh(dp=2, tp=2, device="Ascend")
        divided = apply_tensor_parallel(model, get_family(config.family).tensor_parallel, mesh)
    if get_family(config.family).output == "pictures":
        model.stop_at_frozen_parts()
    if job == "lora step":
        choose_trainable(model, freeze=[], train={}, freezes_all=True)
        add_lora(model, LoraConfig(), seed=0, divided=divided, mesh=mesh)
        model.stop_at_frozen_parts()
    trained = with_teacher(model, dtype) if job.startswith("distilled") else model
    step = TrainStep(
        trained,
        OptimizerConfig(learning_rate=1e-4, weight_decay=0.1),
        accumulates=job == "passes",
        loss_scale=LossScaleConfig() if dtype == ms.float16 else None,
        parallel=parallel,
        mesh=mesh,
        divided=divided,
        recompute=job == "recomputed step",
    )
    learning_rate = blank(dtype=ms.float32)
    tokens = np.zeros((BATCH_SIZE, LENGTH), np.int32)
    images = tuple(np.zeros(tensor.shape, np.float32) for tensor in pixels(config.model, ms.float32))
    choices = None
    if model.takes_choices:
        # global views and buckets of two crops; text and one picture
        images += tuple(np.stack((view, view), 1) for view in images)
        choices = np.zeros((BATCH_SIZE, 2, LENGTH), np.int32)
    inv_freq = blank(config.model.language_model.rotary_dim // 2, dtype=ms.float32)
    inputs = text_inputs(tokens, tokens, tokens, images, 0, [], choices)
    if get_family(config.family).output == "pictures":
        inputs = PassInputs(dict.fromkeys(("codes", "labels", "positions", "segment_ids"), tokens), 0, [])
    batch = model_arguments(inputs, inv_freq, dtype)
    if job == "passes":
        return {"accumulate": (step.accumulate_graph, batch), "update": (step.update_graph, [learning_rate])}
    return {job: (step.graph, [learning_rate, *batch])}


def with_teacher(model, dtype) -> nn.Cell:
    """Returns the Cell that trains a student with a DeLVM-1B."""
    config = small_config(str(CONFIGS / "delvm/delvm_1b.yaml")).model.language_model
    teacher = CausalLM(config, runtime.BuildContext(dtype=dtype, attention="fused"))
    freeze(teacher)
    teacher.update_parameters_name("teacher.")
    return DistilledDecoder(model, teacher.set_train(False), DistillationConfig(teacher="", temperature=2.0))


def compile_one(graph: nn.Cell, inputs: list[Tensor]) -> dict:
    try:
        graph.compile(*inputs)
    except Exception as error:
        return {"error": str(error)[:3000]}
    graph_text = graph.get_func_graph_proto()
    names = {kind: set(re.findall(rb"/%s-op\d+" % kind, graph_text)) for kind in FUSED_OPERATORS}
    return {"error": None, "num_fused": [len(names[kind]) for kind in FUSED_OPERATORS]}


def main() -> None:
    request = json.loads(sys.argv[1])
    ms.set_context(mode=ms.GRAPH_MODE)
    config = small_config(request["config"])
    dtype = runtime.DTYPES[request["dtype"]]
    context = runtime.BuildContext(dtype=dtype, attention=request["attention"])
    names, job = request["graphs"], request["job"]
    if job != "predict" and hasattr(config.model, "num_picture_codes"):
        config.model.input_embedding = "codebook"
    model = get_family(config.family).build(config.model, context)
    if job == "predict":
        mesh = Mesh(tp=request["num_processes"], device="Ascend")
        apply_tensor_parallel(model, get_family(config.family).tensor_parallel, mesh)
        graphs = predict_graphs(config, model, dtype)
    else:
        graphs = train_graphs(config, model, dtype, job=job)
    for name in names:
        print(json.dumps({"name": name, **compile_one(*graphs[name])}), flush=True)


if __name__ == "__main__":
    main()
