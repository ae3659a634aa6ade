"""Cells and parameters of a divided model. Nothing is computed here, because that takes ranks."""

from pathlib import Path

import pytest

from mindvlm.checkpoint import TensorInfo
from mindvlm.core.errors import UserError
from mindvlm.generation.graphs import cache_capacity
from mindvlm.generation.memory import estimate_memory
from mindvlm.models.loading import build_model
from mindvlm.models.registry import get_family
from mindvlm.models.slime.hf_config import from_hf_config
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.memory import VisionMemory
from mindvlm.nn.parameters import freeze, parameter_shapes
from mindvlm.parallel import collectives
from mindvlm.parallel.buckets import make_buckets
from mindvlm.parallel.layers import VocabParallelEmbedding, VocabParallelTiedHead
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import DECODER, apply_tensor_parallel, plan_specs
from mindvlm.parallel.sharding import ShardSpec, shard_infos
from tests.parallel.launch import start
from tests.parallel.tiny_training import CONFIGS, TinyModel
from tests.tiny_slime import CONFIG, TOWER

MESH = Mesh(tp=2, rank=1)


@pytest.fixture(autouse=True)
def no_communication(monkeypatch):
    """Building a collective needs processes that have met; here it is left out."""
    monkeypatch.setattr(collectives.SumOver, "__init__", lambda self, group: collectives.nn.Cell.__init__(self))


@pytest.mark.parametrize(("dialect", "num_divided"), [("qwen", 12), ("opt", 11), ("phi", 13)])
def test_names_order_and_training_stay_and_shapes_follow_the_specs(dialect, num_divided):
    whole, divided = TinyModel(CONFIGS[dialect]), TinyModel(CONFIGS[dialect])
    for model in (whole, divided):
        freeze(model.language_model.layers[0].self_attn.k_proj)
    result = apply_tensor_parallel(divided, DECODER, MESH)
    before, after = list(whole.get_parameters()), list(divided.get_parameters())
    assert [p.name for p in after] == [name for name, _ in whole.parameters_and_names()]
    assert [p.requires_grad for p in after] == [p.requires_grad for p in before]
    assert [name for name, _ in divided.parameters_and_names()] == [name for name, _ in whole.parameters_and_names()]
    for full, part in zip(before, after, strict=True):
        spec = result.specs.get(part.name)
        shape = tuple(part.shape)
        assert (shape if spec is None else spec.full_shape(shape)) == tuple(full.shape)
    # q, k, v with biases, o, three or two matrices of the MLP (one bias), embedding, and a head of its own (a bias)
    assert len(result.specs) == num_divided
    assert divided.language_model.config.num_attention_heads == 2
    assert divided.language_model.layers[0].self_attn.num_heads == 2


def test_the_parts_are_the_ranks_own():
    model = TinyModel(CONFIGS["qwen"])
    specs = apply_tensor_parallel(model, DECODER, MESH).specs
    layer = "language_model.layers.0."
    assert specs[layer + "self_attn.o_proj.weight"] == ShardSpec(axis=1, index=1, count=2)
    assert specs[layer + "self_attn.q_proj.bias"] == ShardSpec(axis=0, index=1, count=2)
    assert layer + "input_layernorm.weight" not in specs


def test_a_tied_head_takes_the_divided_embedding():
    model = TinyModel(CONFIGS["opt"])
    apply_tensor_parallel(model, DECODER, MESH)
    head = model.language_model.lm_head
    assert isinstance(head, VocabParallelTiedHead) and isinstance(head.embedding, VocabParallelEmbedding)
    assert head.embedding is model.language_model.embed_tokens


def test_one_rank_changes_nothing():
    model = TinyModel(CONFIGS["qwen"])
    head = model.language_model.lm_head
    assert apply_tensor_parallel(model, DECODER, Mesh()).specs == {}
    assert model.language_model.lm_head is head


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 3}, "language_model has 3 heads, which 2 tensor-parallel processes"),
        ({"vocab_size": 45}, "language_model.embed_tokens.weight is 45 long on axis 0, which 2 "),
        ({"intermediate_size": 9}, "language_model.layers.0.mlp.gate_proj.weight is 9 long on axis 0, "),
    ],
)
def test_sizes_that_cannot_be_divided_are_refused(changes, message):
    sizes = dict(
        vocab_size=44, hidden_size=12, num_hidden_layers=1, num_attention_heads=4, head_dim=4, intermediate_size=8
    )
    model = TinyModel(DecoderConfig(**{**sizes, **changes}))
    with pytest.raises(UserError) as error:
        apply_tensor_parallel(model, DECODER, MESH)
    assert str(error.value).startswith(message)


def test_buckets_hold_every_parameter_once_and_one_kind_each():
    parameters = list(CausalLM(CONFIGS["qwen"]).get_parameters())
    decays = ["weight" in p.name and "norm" not in p.name for p in parameters]
    divided = [p.name.endswith("proj.weight") for p in parameters]
    mesh = Mesh(dp=3)
    buckets = make_buckets(parameters, decays=decays, is_divided=divided, mesh=mesh, max_elements=500)
    indices = [i for bucket in buckets for i in bucket.indices]
    assert sorted(indices) == list(range(len(parameters)))
    for bucket in buckets:
        assert {decays[i] for i in bucket.indices} == {bucket.decays}
        assert {divided[i] for i in bucket.indices} == {bucket.is_divided}
        assert sum(bucket.sizes) <= 500 or len(bucket.indices) == 1
        assert 0 <= bucket.chunk_size * mesh.dp - sum(bucket.sizes) < mesh.dp


@pytest.mark.parametrize("num_processes", [2, 4, 8])
def test_the_plan_of_a_rank_is_what_it_holds(num_processes):
    changes = {"num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 256, "intermediate_size": 896}
    tower = {**TOWER, "num_attention_heads": 8}
    config = from_hf_config({**CONFIG, **changes, "vocab_size": 344}, vision_config=tower)
    family, mesh = get_family("slime"), Mesh(tp=num_processes, rank=1)
    whole, _ = build_model(family, config)
    infos = [TensorInfo(name, "float32", shape) for name, shape in parameter_shapes(whole).items()]
    specs = plan_specs(whole, family.tensor_parallel, mesh)
    weights = shard_infos(infos, specs)
    model, divided = build_model(family, config, mesh=mesh)
    assert divided.specs == specs
    assert {info.name: info.shape for info in weights} == parameter_shapes(model)

    memory = {"num_images": 0, "num_prompt_tokens": 100, "num_slots": 3, "num_processes": num_processes}
    found = estimate_memory(config, weights, VisionMemory(), **memory)
    assert found.parameters == sum(parameter.nbytes for parameter in model.get_parameters())
    caches = model.language_model.new_caches(3, cache_capacity(128, config.max_length))
    assert found.prompt_cache == sum(parameter.nbytes for parameter in caches.get_parameters())


@pytest.mark.ci
def test_divided_parts_of_models_agree_with_whole_ones(tmp_path):
    job = start(Path(__file__).with_name("parts_job.py"), num_processes=2, log_dir=tmp_path)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output[-3000:]
    for rank in (0, 1):
        assert f"rank {rank}: CLIP with 20 divided parameters agrees" in output
        assert f"rank {rank}: vision vocabulary with 12 divided parameters agrees" in output
        assert f"rank {rank}: decoder with 12 divided parameters agrees" in output
        assert f"rank {rank}: biased head's loss with 13 divided parameters agrees" in output
        assert f"rank {rank}: tied decoder with 11 divided parameters agrees" in output
