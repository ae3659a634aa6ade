"""Prompts of SliME: the beginning mark, stop tokens and rows; ids and labels are among the recorded cases."""

import json

import pytest

from mindvlm.core.errors import UserError
from mindvlm.models.slime.processor import SlimeProcessor, SlimeProcessorConfig
from mindvlm.models.slime.views import ViewsConfig
from tests.golden_files import golden_json
from tests.processing.text.small_pieces import write_piece_files

SETTINGS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


@pytest.mark.parametrize("adds_start", [True, False])
def test_llama_3_begins_with_its_mark_and_stops_at_both_ends(tmp_path, adds_start):
    definition = golden_json("slime/templates/tokenizer_l3/tokenizer.json")
    if not adds_start:
        definition["post_processor"] = definition["post_processor"]["processors"][0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    processor = SlimeProcessor(SlimeProcessorConfig(tokenizer=str(tmp_path), template="llama3"))
    special_ids = processor.tokenizer.special_ids
    assert processor.tokenizer.prefix_ids == [special_ids["<|begin_of_text|>"]]
    assert set(processor.stop_ids) == {special_ids["<|eot_id|>"], special_ids["<|end_of_text|>"]}
    prompt = processor.prompt("What?", num_images=1, image_lengths=[3], history=[("Hello", "Hi.")])
    assert prompt.input_ids[0] == special_ids["<|begin_of_text|>"]
    assert prompt.input_ids.count(-200) == 3 and "<|eot_conversation|>" not in prompt.text
    assert prompt.text.count("<|eot_id|>") == 3 and prompt.text.endswith("assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, (576 + 1 + 2 * 144, 1585)),
        ({"use": "global"}, (576, 576)),
        ({"use": "local"}, (288, 1008)),
        ({"mode": "pad"}, (576, 576)),
        ({"mode": "pad_then_devide"}, (865, 577 + 9 * 144)),
    ],
)
def test_lengths_of_pictures(tmp_path, changes, lengths):
    config = SlimeProcessorConfig(tokenizer=str(write_piece_files(tmp_path)), views=ViewsConfig(**changes))
    assert SlimeProcessor(config).picture_lengths == lengths


def test_unknown_templates_and_long_vocabularies_are_named(tmp_path):
    folder = str(write_piece_files(tmp_path))
    with pytest.raises(UserError, match="chat template 'phi' is unknown; known are llama3, llava_v1, plain"):
        SlimeProcessor(SlimeProcessorConfig(tokenizer=folder, template="phi"))
    with pytest.raises(UserError, match="330 tokens, but the model has embeddings for 300"):
        SlimeProcessor(SlimeProcessorConfig(tokenizer=folder, vocab_size=300))
