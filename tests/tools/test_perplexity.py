"""The perplexity of a GGUF file: our decoder beside transformers and llama.cpp on the same weights."""

import json

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from mindvlm.core.errors import UserError

gguf = pytest.importorskip("gguf")

from mindvlm.tools.benchmarks import perplexity  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = [*sorted(ByteLevel.alphabet()), "ab", *(f"<{index}>" for index in range(43))]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A GGUF file of a tiny Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = {"tie_word_embeddings": True, "rope_theta": 5000.0, "rms_norm_eps": 1e-5, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), num_hidden_layers=2, **SIZES, **options)).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(TOKENS))
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            values = values.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def ids_of(*shape: int) -> np.ndarray:
    # ASCII characters, none of which is llama.cpp's default end of text
    return np.random.default_rng(0).integers(20, 90, shape).astype(np.int32)


def test_logits_are_those_of_transformers(file):
    path, reference = file
    reader = perplexity.open_gguf(path)
    model = perplexity.build(perplexity.decoder_config(reader), perplexity.native_weights(reader), "float32")
    ids = ids_of(40)
    with torch.no_grad():
        expected = reference(torch.tensor(ids[None]).long()).logits[0].numpy()
    found = perplexity.logits_of(model, ids)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_losses_are_those_of_llama_cpp(file, kernels, tmp_path):
    pytest.importorskip("xllamacpp")
    path, _ = file
    reader, ids = perplexity.open_gguf(path), ids_of(2, 20)
    config, weights = perplexity.decoder_config(reader), perplexity.native_weights(reader)
    for dtype, weight_format, tolerance in (("F32", "float32", 2e-3), ("Q8_0", "int8,embeddings=int8", 0.1)):
        size = perplexity.requantized(reader, tmp_path / "other.gguf", dtype)
        model = perplexity.build(config, weights, weight_format)
        ours = perplexity.token_losses(model, ids)
        theirs = perplexity.llama_cpp_losses(tmp_path / "other.gguf", ids)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
        assert abs(size - perplexity.num_bytes(model)) < 0.2 * size


def test_the_command_prints_a_line_for_each_format(file, kernels, capsys):
    arguments = [str(file[0]), "--weights", "float32", "int8", "--llamacpp", "--num_windows", "2", "--length", "9"]
    assert perplexity.main(arguments) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["weights"] for record in records] == ["float32", "int8"]
    assert all(record["num_tokens"] == 16 and record["perplexity"] > 1 for record in records)
    assert records[0]["megabytes"] >= records[1]["megabytes"]


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"no GGUF file" * 10)
    with pytest.raises(UserError, match="a.gguf: no GGUF file"):
        perplexity.open_gguf(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="b.gguf: no GGUF file"):
        perplexity.open_gguf(tmp_path / "b.gguf")


def test_formats_that_need_kernels_are_refused_without_them(file, monkeypatch, capsys):
    monkeypatch.setattr(perplexity, "open_library", lambda: None)
    assert (
        perplexity.main([str(file[0]), "--weights", "int8", "--llamacpp", "--num_windows", "1", "--length", "9"]) == 2
    )
    assert "int8 needs the C++ kernels" in capsys.readouterr().err
