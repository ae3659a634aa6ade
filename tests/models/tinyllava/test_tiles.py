"""Pictures in tiles (`image_aspect_ratio: anyres`) from a folder to an answer, any number of tiles and pictures."""

import json

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

import mindvlm
from mindvlm.core.errors import UserError
from mindvlm.models.tinyllava.export import hf_config
from mindvlm.models.tinyllava.folder import processor_config
from mindvlm.models.tinyllava.hf_config import from_hf_config
from mindvlm.processing.images.picture import NEWLINE
from mindvlm.processing.text.tokenizer import PLACEHOLDER_ID
from mindvlm.sessions.conversation import Conversation
from mindvlm.weights.config_json import ConfigTable
from tests.tiny_batch import assert_rows_are_answers
from tests.tiny_tinyllava import write_tiny_tinyllava

ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
WIDE, TALL, SQUARE = (
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    for seed, size in enumerate([(20, 50), (50, 20), (60, 60)])
)
MERGES = ["flat", "spatial", "spatial_unpad"]
SIDE, BOUND = 2, 1e-6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each way to merge; the weights besides the learned row are the same."""
    made = {}
    for merge in MERGES:
        options = {**ANYRES, "mm_patch_merge_type": merge}
        made[merge] = write_tiny_tinyllava(tmp_path_factory.mktemp(merge), **options)
    return made


@pytest.fixture(scope="module")
def models(folders):
    return {merge: mindvlm.load(folder, mode="pynative") for merge, folder in folders.items()}


@pytest.fixture(scope="module")
def model(models):
    """The one with everything: margins left out, lines ended."""
    return models["spatial_unpad"]


def features_in_order(model, image: Image.Image, merge: str, grid: tuple[int, int]) -> np.ndarray:
    """(R, hidden) as LLaVA-1.6 puts them together; `grid` is lines and columns of tiles."""
    views = model.encode_images(image).asnumpy()
    width = views.shape[-1]
    if merge == "flat":
        return views.reshape(-1, width)
    lines, columns = grid
    plane = views[1:].reshape(lines, columns, SIDE, SIDE, width).transpose(0, 2, 1, 3, 4)
    plane = plane.reshape(lines * SIDE, columns * SIDE, width)
    if merge == "spatial_unpad":
        newline = dict(model.model.parameters_and_names())["image_newline"].asnumpy()
        assert np.abs(newline).min() > 0
        ends = np.broadcast_to(newline, (len(plane), 1, width))
        plane = np.concatenate([plane, ends], axis=1)
    return np.concatenate([views[0], plane.reshape(-1, width)])


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(("image", "grid"), [(WIDE, (1, 2)), (TALL, (2, 1)), (SQUARE, (2, 2))])
def test_features_stand_where_the_original_puts_them(models, merge, image, grid):
    """None of these pictures has a margin of a whole patch; test_tiling.py has those."""
    model = models[merge]
    expected = features_in_order(model, image, merge, grid)
    pictures = model.pictures(image)
    prompt = prompt_of(model, "What?", pictures)
    start = prompt.placeholder_starts[0]
    assert prompt.input_ids.count(PLACEHOLDER_ID) == len(expected) == prompt.image_lengths[0]
    ids, features = np.array([prompt.input_ids], np.int32), model.encoder.encode(pictures)
    assert features.counts == prompt.image_lengths
    embeds = model.engine.merged_embeddings(ids, features.rows).asnumpy()[0]
    np.testing.assert_allclose(embeds[start : start + len(expected)], expected, rtol=BOUND, atol=BOUND)
    table = model.model.language_model.embed_tokens(Tensor(np.maximum(ids, 0))).asnumpy()[0]
    np.testing.assert_array_equal(embeds[start + len(expected) :], table[start + len(expected) :])
    np.testing.assert_array_equal(embeds[:start], table[:start])


def prompt_of(model, query: str, pictures):
    """The prompt with the placeholders of each picture's layout."""
    lengths = [len(picture.layout) for picture in pictures]
    return model.processor.prompt(query, num_images=len(pictures), image_lengths=lengths)


def test_rows_of_several_pictures(model):
    """Each picture's rows by its own layout; the learned row is the last of them all."""
    newline = dict(model.model.parameters_and_names())["image_newline"].asnumpy()
    features = np.arange(8 * 32, dtype=np.float32).reshape(2, 4, 32)
    rows = model.model.picture_rows(Tensor(features), np.array([3, NEWLINE, 0]), ())
    np.testing.assert_array_equal(rows.asnumpy(), [features[0, 3], newline, features[0, 0]])
    pictures = model.pictures([WIDE, SQUARE])
    whole = model.encoder.encode(pictures)
    assert whole.counts == [len(picture.layout) for picture in pictures]
    alone = [model.encoder.encode([picture]).rows.asnumpy() for picture in pictures]
    np.testing.assert_array_equal(whole.rows.asnumpy(), np.concatenate(alone))


def test_rows_of_pictures_do_without_operators_that_keep_memory(model, monkeypatch):
    """On a CPU, each call of ops.concat outside of a graph takes memory that MindSpore does not free."""
    pictures = model.pictures([WIDE, SQUARE])
    views = model.encoder.encode_views(pictures)
    expected = model.encoder.rows(pictures, views, ()).rows.asnumpy()
    for module in ("mindvlm.nn.rows", "mindvlm.nn.image_text", "mindvlm.models.tinyllava.model"):
        monkeypatch.setattr(f"{module}.ops", None)
    np.testing.assert_array_equal(model.encoder.rows(pictures, views, ()).rows.asnumpy(), expected)


def test_a_tiled_picture_is_decoded_once(model, monkeypatch):
    loaded, load = [], model.processor.load
    monkeypatch.setattr(model.processor, "load", lambda image: loaded.append(image) or load(image))
    model.chat("What?", WIDE, max_new_tokens=1)
    assert len(loaded) == 1


ROWS = (["the cup", "<image> or <image>?", "What?"], [None, [SQUARE, TALL], WIDE])


@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
def test_rows_of_a_batch_are_the_answers_alone(models, merge):
    assert_rows_are_answers(models[merge], *ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
def test_the_graphs_give_what_pynative_gives(folders, models, merge):
    compiled = mindvlm.load(folders[merge], mode="graph")
    assert_rows_are_answers(compiled, *ROWS)
    expected = models[merge].logits("compare", [TALL, SQUARE])
    np.testing.assert_allclose(compiled.logits("compare", [TALL, SQUARE]), expected, rtol=1e-4, atol=1e-4)


def test_a_conversation_with_pictures_in_later_turns(model):
    talk, images = Conversation(model), [WIDE, SQUARE, TALL]
    talk.ask("What?", images[0], max_new_tokens=2)
    for number, query in ((2, "and this?"), (3, "so?")):
        if number == 3:
            # as after another conversation: all pictures are prefilled again
            model.engine.resize(1)
        answer = talk.ask(query, images[number - 1], max_new_tokens=1)
        ids = np.array([talk.ids[: answer.num_prompt_tokens]], np.int32)
        features = model.encoder.encode(model.pictures(images[:number]))
        logits = model.engine.logits(ids, features.rows).asnumpy()
        assert logits[0, -1].argmax() == answer.ids[0]


def test_the_processor_alone(model):
    inputs = model.processor("compare", [WIDE, SQUARE])
    assert inputs.pixels.shape == (3 + 5, 3, 28, 28)
    assert inputs.input_ids == prompt_of(model, "compare", model.pictures([WIDE, SQUARE])).input_ids


@pytest.mark.parametrize("merge", MERGES)
def test_the_folder_that_is_written_is_the_one_that_was_read(models, folders, merge):
    model = models[merge]
    data = json.loads((folders[merge] / "config.json").read_text())
    written = hf_config(model.config, model.processor.tokenizer)
    again = from_hf_config(written)
    assert again.image_newline == (merge == "spatial_unpad")
    assert processor_config(ConfigTable(written), folders[merge], again).tiling == model.config.processor.tiling
    assert all(written[key] == value for key, value in data.items() if key.startswith("image_") or "merge" in key)


def test_what_does_not_fit_is_named(model, tmp_path):
    wrong = write_tiny_tinyllava(tmp_path, **{**ANYRES, "image_grid_pinpoints": [[28, 50]]})
    with pytest.raises(UserError, match="28, 50.* is not a multiple of the tower's image size of 28 pixels"):
        mindvlm.load(wrong)
    with pytest.raises(UserError, match="the prompt has .* tokens but the context holds 256"):
        model.chat("What?", [SQUARE] * 12)
    with pytest.raises(
        UserError, match="processor.tiling is set, so a picture has several views; give it to `picture`"
    ):
        model.processor.pixels(SQUARE)
