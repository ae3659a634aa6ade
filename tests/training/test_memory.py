"""The memory plan of a job against the tensors that its parts hold; nothing is computed and nothing filled."""

import copy
import dataclasses

import mindspore as ms
import numpy as np
import pytest
import yaml

from mindvlm.checkpoint import MemorySource, write_checkpoint
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import BuildContext
from mindvlm.models import loading
from mindvlm.models.delvm.memory import trained_vqgan_bytes
from mindvlm.models.delvm.model_config import VqganConfig
from mindvlm.models.own_training import PassMemory
from mindvlm.models.registry import get_family
from mindvlm.nn.memory import VisionMemory
from mindvlm.parallel import collectives
from mindvlm.parallel.mesh import Mesh
from mindvlm.training import building
from mindvlm.training.job_file import read_job
from mindvlm.training.lora import add_lora
from mindvlm.training.memory import decoder_activations, estimate_training, most_slots, pass_memory
from mindvlm.training.step import TrainStep
from tests.tiny_delvm import training_tensors, write_training
from tests.training.delvm_job import MODEL
from tests.training.delvm_job import write_job as write_delvm_job
from tests.training.recompute_memory import BATCH_SIZE, LENGTH, Decoder
from tests.training.small_job import write_job

TILES = {"processor": {"tiling": {"resolutions": [[28, 56], [56, 56]]}, "image": {"padding": "none"}}}
LORA = {"rank": 4, "targets": [r"^language_model\.layers\."], "modules_to_save": ["^mm_projector"]}


def num_bytes(parameters) -> int:
    return sum(parameter.nbytes for parameter in parameters)


@pytest.mark.parametrize(
    "kind, dtype, changes",
    [
        ("toy", "float32", {}),
        ("toy", "bfloat16", {"accumulation": 3, "freeze": ["^vision"]}),
        ("toy", "bfloat16", {"parallel": {"tp": 2}}),
        ("toy", "bfloat16", {"parallel": {"dp": 4, "zero": 1}, "accumulation": 2}),
        ("toy", "float32", {"parallel": {"dp": 3, "tp": 2, "zero": 2}, "accumulation": 2}),
        ("slime", "bfloat16", {"parallel": {"dp": 4, "tp": 2, "zero": 2}}),
        ("slime", "bfloat16", {"parallel": {"tp": 2}, "lora": LORA, "init": {"weights": ["model"]}}),
    ],
)
def test_weights_gradients_and_state_are_those_of_the_step(kind, dtype, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(collectives.SumOver, "__init__", lambda self, group: collectives.nn.Cell.__init__(self))
    config = read_job(write_job(tmp_path, kind=kind, **changes)).config
    model_config = building.read_model(config)
    family = get_family(model_config.family)
    found = estimate_training(config, model_config, family, dtype=dtype)

    mesh = Mesh(dp=config.parallel.dp, tp=config.parallel.tp)
    context = BuildContext(dtype={"float32": ms.float32, "bfloat16": ms.bfloat16}[dtype])
    model, divided = loading.build_model(family, model_config.model, context, mesh=mesh)
    building.choose_trained(model, config)
    if config.lora:
        add_lora(model, dataclasses.replace(config.lora, dropout=0.0), seed=None, divided=divided, mesh=mesh)
    options = {"parallel": config.parallel, "mesh": mesh, "divided": divided, "accumulates": config.num_passes > 1}
    step = TrainStep(model, config.optimizer, **options)
    optimizer = step.optimizer
    copies = optimizer.master if step.is_sharded else [master for _, master in optimizer.masters]
    assert found.weights == num_bytes(model.get_parameters())
    assert found.optimizer == num_bytes([*optimizer.moment1, *optimizer.moment2, *copies])
    expected = num_bytes(model.trainable_params())
    if step.accumulate_graph:
        expected += num_bytes(step.accumulate_graph.buffers)
    elif config.parallel.zero == 2:
        # the chunks of the summed gradients
        expected += num_bytes(optimizer.moment1)
    assert found.gradients == expected


def test_zero_and_tensor_parallelism_leave_less(tmp_path):
    def plan(**changes):
        config = read_job(write_job(tmp_path, **changes)).config
        model_config = building.read_model(config)
        return estimate_training(config, model_config, get_family(model_config.family), dtype="bfloat16")

    alone, zero, shared = plan(), plan(parallel={"dp": 4, "zero": 2}), plan(parallel={"tp": 2})
    assert zero.weights == alone.weights and zero.optimizer < 0.3 * alone.optimizer
    assert 0.5 * alone.weights < shared.weights < alone.weights
    assert shared.activations < alone.activations
    assert plan(recompute=True).activations < alone.activations


@pytest.mark.parametrize("recompute, measured", [(False, 0.86), (True, 0.41)])
def test_activations_are_near_the_measured_step_of_the_docs(recompute, measured, tmp_path):
    changes = {"data__batch_size": BATCH_SIZE, "data__max_length": LENGTH, "data__lengths": [LENGTH]}
    config = read_job(write_job(tmp_path, recompute=recompute, **changes)).config
    model = Decoder()
    shape = PassMemory(num_rows=BATCH_SIZE, length=LENGTH)
    found = decoder_activations(model, model.language_model.config, shape, config, 4)
    assert 0.9 <= found / (measured * 2**30) <= 1.2


@pytest.mark.parametrize(
    "kind, changes, expected",
    [
        ("toy", {}, 2),
        ("toy", {"data__image_slots": 5}, 5),
        ("tinyllava", {}, 2),
        # an overview and up to 4 tiles for each of 2 rows
        ("tinyllava", {"model_changes": TILES}, 10),
        ("tinyllava", {"model_changes": TILES, "data__image_slots": 3}, 12),
        # the global view and 4 buckets of up to 7 crops for each row
        ("slime", {}, 2 + 8),
        ("slime", {"data__image_slots": [2, 3]}, 2 + 9),
        ("slime", {"model_changes": {"processor": {"views": {"use": "local"}}, "model": {"use": "local"}}}, 8),
        ("slime", {"model_changes": {"processor": {"views": {"mode": "pad_then_devide"}}}}, 2 + 10),
    ],
)
def test_the_towers_hold_all_views_of_a_batch(kind, changes, expected, tmp_path):
    """Each row has a picture with the most views; the towers' part grows with them."""
    config = read_job(write_job(tmp_path, kind=kind, **changes)).config
    model_config = building.read_model(config)
    family = get_family(model_config.family)
    assert most_slots(config, model_config, family) == expected
    family = dataclasses.replace(family, vision_memory=lambda config, size, has_kernels: VisionMemory(0, 2**40))
    assert estimate_training(config, model_config, family, dtype="float32").activations == expected * 2**40


def test_slots_of_other_kinds_are_refused(tmp_path):
    config = read_job(write_job(tmp_path, kind="slime", data__image_slots=[1, 2, 3])).config
    model_config = building.read_model(config)
    with pytest.raises(UserError, match="but the model has 2 view kinds; give one entry for each"):
        most_slots(config, model_config, get_family("slime"))


def test_the_pass_of_a_family_with_data_of_its_own(tmp_path):
    """Packs are rows of segments; a teacher adds its weights, and 16-bit ones stay so."""
    config = read_job(write_delvm_job(tmp_path, data__batch_size=2)).config
    model_config = building.read_model(config)
    family = get_family(model_config.family)
    shape = pass_memory(config, model_config, family, 4)
    assert (shape.num_rows, shape.length, shape.frozen, shape.beside) == (6, 32, 0, 0)
    alone = estimate_training(config, model_config, family, dtype="float32")
    model, _ = loading.build_model(family, model_config.model)
    assert alone.weights == num_bytes(model.get_parameters())
    # the VQGAN stays in float32
    vqgan = sum(parameter.size for parameter in model.vqgan.get_parameters())
    others = sum(parameter.size for parameter in model.get_parameters()) - vqgan
    assert estimate_training(config, model_config, family, dtype="bfloat16").weights == 4 * vqgan + 2 * others

    teacher = write_training(tmp_path / "teacher")
    config = read_job(write_delvm_job(tmp_path, distillation={"teacher": str(teacher)}, data__batch_size=2)).config
    found = estimate_training(config, model_config, family, dtype="float32")
    tensors = training_tensors()
    table = tensors["model.head.weight"].size
    decoder = [array.size for name, array in tensors.items() if "embedding" not in name]
    assert found.weights == alone.weights + 4 * (sum(decoder) + table)
    assert found.activations > alone.activations and found.gradients == alone.gradients


@pytest.mark.parametrize("vocab_size, num_layers, measured", [(4096, 6, 1687), (4096, 1, 1476), (512, 6, 1237)])
def test_the_activations_of_a_distillation_are_near_measured_steps(vocab_size, num_layers, measured, tmp_path):
    """Steps of 8 rows of 1024 codes: 4 layers of width 256 learn from layers of width 512; MiB on an x86 CPU."""
    sizes = {"vocab_size": vocab_size, "num_attention_heads": 4}
    student = sizes | {"hidden_size": 256, "num_hidden_layers": 4, "head_dim": 64, "intermediate_size": 704}
    teacher = sizes | {"hidden_size": 512, "num_hidden_layers": num_layers, "head_dim": 128, "intermediate_size": 1408}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(tiny_job_model(teacher, vocab_size)))
    write_checkpoint(tmp_path / "teacher.safetensors", MemorySource({"a": np.zeros((1, 1), np.float32)}))
    path = write_delvm_job(
        tmp_path,
        distillation={"teacher": "teacher.yaml"},
        data={"codes": "codes", "pack_length": 8192, "segment_length": 1024},
    )
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(tiny_job_model(student, vocab_size)))
    config = read_job(path).config
    model_config = building.read_model(config)
    found = estimate_training(config, model_config, get_family("delvm"), dtype="float32")
    assert 0.9 <= (found.activations + found.gradients) / (measured * 2**20) <= 1.2


def tiny_job_model(decoder: dict, vocab_size: int) -> dict:
    """The model of the job with another decoder and so many codes."""
    model = copy.deepcopy(MODEL) | {"checkpoint": "teacher.safetensors"}
    model["model"]["language_model"] |= decoder
    model["model"]["vqgan"]["num_embeddings"] = vocab_size
    model["model"]["max_length"] = 1024
    return model


def test_the_activations_of_a_vqgan_are_near_a_measured_step():
    """A step of 8 pictures of 64 pixels through 3 levels added 2470 MiB on an x86 CPU."""
    sizes = {"z_channels": 32, "quantized_embed_dim": 32, "num_embeddings": 2048}
    config = VqganConfig(resolution=64, hidden_channels=64, channel_mult=[1, 2, 2], **sizes)
    assert 0.9 <= 8 * trained_vqgan_bytes(config) / (2470 * 2**20) <= 1.2
