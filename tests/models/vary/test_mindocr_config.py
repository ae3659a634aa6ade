"""MindOCR's model file as it was published."""

import copy
import warnings
from pathlib import Path

import pytest
import yaml

from mindvlm.core.errors import UserError
from mindvlm.models.run_config import read_config

PUBLISHED = {
    "model": {
        "name": "VaryQwenForCausalLM",
        "batch_size": 1,
        "seq_length": 2048,
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "vocab_size": 151860,
        "intermediate_size": 5504,
        "rms_norm_eps": 1.0e-6,
        "emb_dropout_prob": 0.0,
        "eos_token_id": 151643,
        "pad_token_id": 151643,
        "compute_dtype": "float16",
        "layernorm_compute_type": "float32",
        "softmax_compute_type": "float16",
        "rotary_dtype": "float16",
        "param_init_type": "float16",
        "ln_param_init_type": "float16",
        "use_past": True,
        "use_flash_attention": False,
        "use_past_shard": False,
        "offset": 0,
        "checkpoint_name_or_path": "/path/to/vary_toy.ckpt",
        "repetition_penalty": 1.5,
        "max_decode_length": 2048,
        "top_k": 0,
        "top_p": 0.8,
        "do_sample": False,
        "max_new_tokens": 1024,
        "temperature": 1.0,
        "num_beams": 1,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "kv_channels": 128,
    },
    "processor": {
        "return_tensors": "ms",
        "tokenizer": {"vocab_file": "/path/to/qwen.tiktoken", "pad_token": "<|endoftext|>"},
        "type": "QwenProcessor",
    },
}
WITHOUT_EFFECT = (
    "batch_size emb_dropout_prob eos_token_id layernorm_compute_type ln_param_init_type max_decode_length offset "
    "pad_token_id param_init_type rotary_dtype rotary_pct softmax_compute_type use_flash_attention use_past "
    "use_past_shard"
).split()


@pytest.fixture
def read(tmp_path):
    def read_changed(overrides=None, **changes):
        data = copy.deepcopy(PUBLISHED)
        for path, value in changes.items():
            *sections, key = path.split("__")
            section = data
            for name in sections:
                section = section[name]
            section[key] = value
        path = tmp_path / "vary_toy.yaml"
        path.write_text(yaml.safe_dump(data))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = read_config(path, overrides)
        return config, [str(warning.message) for warning in caught]

    return read_changed


def test_the_published_file_is_vary_toy(read):
    config, messages = read()
    ours = read_config(Path(__file__).parents[3] / "configs/vary/vary_toy.yaml")
    assert config.model == ours.model
    assert (config.family, config.name, config.dtype) == ("vary", "vary_toy", "float16")
    assert config.checkpoint == "/path/to/vary_toy.ckpt"
    processor = copy.copy(ours.processor)
    processor.vocab_file = "/path/to/qwen.tiktoken"
    assert config.processor == processor
    generation = config.generation
    assert (generation.repetition_penalty, generation.max_new_tokens, generation.do_sample) == (1.5, 1024, False)
    assert (generation.top_k, generation.top_p, generation.temperature) == (0, 0.8, 1.0)


def test_keys_without_effect_are_named_in_one_warning(read):
    _, messages = read()
    named = [f"model.{key}" for key in WITHOUT_EFFECT] + [
        "processor.return_tensors", "processor.type", "processor.tokenizer.pad_token",
    ]  # fmt: skip
    assert len(messages) == 1
    assert messages[0] == "config keys without effect here: " + ", ".join(named)


def test_our_runtime_keys_may_stand_in_it(read):
    config, _ = read(
        {"device": "cpu", "dtype": "float32", "checkpoint": "/other.safetensors"}, seed=3, tensor_parallel=2
    )
    assert (config.device, config.dtype, config.seed, config.tensor_parallel) == ("cpu", "float32", 3, 2)
    assert config.checkpoint == "/other.safetensors"


def test_an_empty_checkpoint_is_none(read):
    assert read(model__checkpoint_name_or_path="")[0].checkpoint is None


def test_theta_and_head_size_without_their_qwen_names(read):
    config, _ = read(model__theta=5000, model__kv_channels=64)
    assert (config.model.language_model.rope_theta, config.model.language_model.head_dim) == (5000.0, 64)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"model__num_layer": 3}, "unknown config key 'model.num_layer'; did you mean 'num_layers'"),
        ({"processor__tokenizer__vocabfile": "x"}, "'processor.tokenizer.vocabfile'; did you mean 'vocab_file'"),
        ({"processor__typ": "x"}, "'processor.typ'; did you mean 'type'"),
        ({"procesor": {}}, "unknown config key 'procesor'; did you mean 'processor'"),
        ({"model__name": "QwenForCausalLM"}, "'model.name' is 'QwenForCausalLM'"),
        ({"model__num_beams": 4}, "beam search"),
        ({"model__hidden_size": "wide"}, "hidden_size' is 'wide'; expected a whole number"),
        ({"model__compute_dtype": "float64"}, "'dtype' is 'float64'"),
        ({"model__num_heads": 0}, "num_attention_heads is 0"),
        ({"processor": "QwenProcessor"}, "section 'processor' is 'QwenProcessor'"),
        ({"processor__tokenizer": ["x"]}, "section 'processor.tokenizer' is"),
        ({"processor": None}, "vocab_file"),
    ],
)
def test_errors(read, change, expected):
    with pytest.raises(UserError) as caught:
        read(**change)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
