"""The drawing of tiles and kept rows: each cell shows the part of the picture whose row the model keeps."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mindvlm
from mindvlm.tools import show_views
from tests.tiny_slime import write_tiny_slime
from tests.tiny_tinyllava import write_tiny_tinyllava

ROOT = Path(__file__).resolve().parents[2]
RED = (200, 40, 30)
QUESTION = "What is it?"
ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[56, 56]]}


@pytest.fixture(scope="module")
def slime(tmp_path_factory):
    return write_tiny_slime(tmp_path_factory.mktemp("slime"), mm_resampler_topp=0.6, max_position_embeddings=512)


def drawn(model, picture, query=QUESTION):
    """Returns (column, line of the tile) -> whether each cell is drawn as kept, and the line of the drawing."""
    found = {}

    def arranged(above, tiles, title, captions):
        for panel, place in tiles:
            pixels = np.asarray(panel)
            cell = panel.width // model.side
            found[place] = pixels[cell // 2 :: cell, cell // 2 :: cell]
        found["above"] = [name for name, _ in above]
        found["captions"] = captions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show_views, "arranged", arranged)
        _, line = show_views.draw(model, picture, query)
    return found, line


@pytest.mark.parametrize("merge", ["spatial", "flat"])
def test_cells_of_slime_are_those_that_the_router_keeps(tmp_path, merge):
    folder = write_tiny_slime(tmp_path, mm_patch_merge_type=merge, max_position_embeddings=512)
    model = mindvlm.load(folder, mode="pynative")
    model.side = 2
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 200, (100, 150, 3), dtype=np.uint8))
    cells, line = drawn(model, picture)

    (read,) = model.pictures(picture)
    ids = model.processor.prompt(QUESTION, num_images=1, image_lengths=[len(read.layout)]).input_ids
    text = [token for token in ids if token >= 0]
    features = model.encoder.encode_views([read])[0]
    rows = model.model.picture_rows(features, read.layout, text).asnumpy()
    every = features.asnumpy().reshape(-1, rows.shape[1])
    columns, lines = 3, 2
    crops, grid = model.config.processor.views.crops(picture)
    assert grid == (columns, lines) and len(crops) == 6
    num_kept = 0
    for number in range(6):
        line_of, column = divmod(number, columns)
        whole = np.asarray(crops[number].resize((252, 252)), np.float32)[63::126, 63::126]
        for y in range(2):
            for x in range(2):
                first = model.config.processor.views.first_row(number)
                is_kept = any(np.array_equal(every[first + 2 * y + x], row) for row in rows[17:])
                dimmed = 0.22 * whole[y, x] + 0.78 * 225
                expected = whole[y, x] if is_kept else dimmed
                np.testing.assert_allclose(cells[column, line_of][y, x], expected, atol=1)
                num_kept += is_kept
    assert 0 < num_kept < 24
    assert line == f"{num_kept} of 24 rows of 6 tiles are kept"
    assert cells["above"] == ["picture, 150 x 100", "global view"]
    assert cells["captions"] == [f"{model.config.name}. {line} for:", QUESTION]


def test_margins_of_tinyllava_are_dimmed(tmp_path):
    model = mindvlm.load(write_tiny_tinyllava(tmp_path, **ANYRES), mode="pynative")
    model.side = 2
    # two by two tiles; the picture fills the two middle ones of four lines of cells
    cells, line = drawn(model, Image.new("RGB", (56, 28), RED))
    assert cells["above"] == ["picture, 56 x 28", "overview"]
    for column in (0, 1):
        assert (cells[column, 0][1] == RED).all() and (cells[column, 1][0] == RED).all()
        assert (cells[column, 0][0] == 175).all() and (cells[column, 1][1] == 175).all()
    assert line == "8 of 16 rows of 4 tiles are kept"


def test_the_command_line(tmp_path, slime, capsys):
    Image.new("RGB", (150, 100), RED).save(tmp_path / "red.png")
    command = ["--config_path", str(slime), "--image", str(tmp_path / "red.png"), "--output", str(tmp_path / "out.png")]
    assert show_views.main([*command, "--query", QUESTION]) == 0
    said = capsys.readouterr().err
    assert " of 24 rows of 6 tiles are kept; wrote " in said
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and image.width >= 3 * 252 and image.height >= 3 * 252
    # without weights
    (slime / "model.safetensors").rename(tmp_path / "away")
    assert show_views.main([*command, "--random_weights", "--seed", "5"]) == 0
    first = (tmp_path / "out.png").read_bytes()
    assert show_views.main([*command, "--random_weights", "--seed", "5"]) == 0
    assert (tmp_path / "out.png").read_bytes() == first
    (tmp_path / "away").rename(slime / "model.safetensors")


def test_the_command_of_the_docs(tmp_path, capsys):
    """The real views, grids and row counts, without a download."""
    photo, output = str(ROOT / "examples/images/page.png"), str(tmp_path / "views.png")
    command = ["--config_path", str(ROOT / "configs/slime/slime_small.yaml"), "--random_weights"]
    assert show_views.main([*command, "--image", photo, "--output", output]) == 0
    assert re.search(r"^\d+ of 288 rows of 2 tiles are kept; wrote ", capsys.readouterr().err, re.MULTILINE)
    assert (ROOT / "docs/images/slime_views.png").stat().st_size < 300_000


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--output": "views.jpg"}, "--output is 'views.jpg'; give a name that ends in .png"),
        ({"--output": "none/views.png"}, "the folder none does not exist"),
        ({"--image": "none.png"}, "none.png: no such file"),
        ({"--config_path": "none"}, "none"),
        ({"--query": "word " * 600}, "context"),
        ({"--seed": "-1"}, "--seed is -1; expected 0 or more"),
        ({"--image": "same.png", "--output": "../{cwd}/same.png"}, "--output is the picture itself"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, slime, capsys, monkeypatch, changes, expected):
    Image.new("RGB", (150, 100), RED).save(tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (150, 100), RED).save("same.png")
    changes = {name: value.format(cwd=tmp_path.name) for name, value in changes.items()}
    options = {"--config_path": str(slime), "--image": str(tmp_path / "red.png"), "--output": str(tmp_path / "o.png")}
    assert show_views.main([word for pair in (options | changes).items() for word in pair]) == 2
    error = capsys.readouterr().err
    *progress, line = error.splitlines()
    assert line.startswith("error: ") and expected in line and all(one.startswith("loading ") for one in progress)
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    ("query", "caption"),
    [
        ("what\n is\tit", "what is it"),
        ("x" * 200, "x" * 97 + "..."),
        ("图里有什么？", "a question with characters that the font lacks"),
    ],
)
def test_captions(query, caption):
    assert show_views.shown_query(query) == caption


def test_models_without_tiles_are_refused(tmp_path, slime, capsys):
    Image.new("RGB", (150, 100), RED).save(tmp_path / "red.png")
    whole = write_tiny_tinyllava(tmp_path / "whole")
    padded = write_tiny_slime(tmp_path / "padded", image_aspect_ratio="pad")
    queries = {
        "mm_projector_type": "resampler",
        "num_queries": 3,
        "resampler_hidden_size": 12,
        "mm_patch_merge_type": "flat",
    }
    odd = write_tiny_tinyllava(tmp_path / "odd", **ANYRES | queries)
    for folder, expected in ((whole, "cuts no tiles"), (padded, "cuts no tiles"), (odd, "the 3 tokens of a tile form")):
        options = ["--image", str(tmp_path / "red.png"), "--output", str(tmp_path / "o.png"), "--random_weights"]
        assert show_views.main(["--config_path", str(folder), *options]) == 2
        assert expected in capsys.readouterr().err
