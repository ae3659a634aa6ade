"""`mindvlm-check` with a TinyLLaVA: folders and YAMLs, every dialect and tower, and where the weights may lie."""

import dataclasses
import json
import shutil

import pytest
import yaml
from safetensors.numpy import load_file, save_file

import mindvlm
from mindvlm.models.run_config import read_config
from tests.golden_files import golden_path
from tests.models.tinyllava.test_factory_folder import TEXT, write_factory_folder
from tests.tiny_tinyllava import DIALECTS, TOWER, write_tiny_tinyllava
from tests.tools.checked import NAMES, assert_failed, checker, found, statuses

CLIP = {**TOWER, "model_type": "clip_vision_model", "hidden_act": "quick_gelu"}


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "cache"))
    return checker(monkeypatch, capsys)


def assert_ready(result, *texts: str) -> dict[str, list[tuple[str, str]]]:
    """Every check is ok, and the texts are shown; returns the lines."""
    status, out, err = result
    assert (status, err) == (0, ""), out
    assert statuses(out) == dict.fromkeys(NAMES, "ok") and out.splitlines()[-1] == "ready"
    for text in texts:
        assert text in out
    return found(out)


def write_yaml_of(folder, **changes):
    """A YAML that says the same as a folder."""
    data = dataclasses.asdict(read_config(folder)) | changes
    path = folder.parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def split_tower(folder):
    """Moves the tower's weights into a folder of their own, and returns it."""
    tensors = load_file(folder / "model.safetensors")
    tower = {name: array for name, array in tensors.items() if "vision_tower" in name}
    place = folder.parent / "tower"
    place.mkdir()
    save_file(tower, place / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", place)
    rest = {name: array for name, array in tensors.items() if name not in tower}
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("tower", [TOWER, CLIP], ids=["siglip", "clip"])
@pytest.mark.parametrize("kind", ["folder", "yaml"])
def test_folders_and_yamls(check, tmp_path, dialect, tower, kind):
    folder = write_tiny_tinyllava(tmp_path, dialect=dialect, vision_config=tower)
    path = folder if kind == "folder" else write_yaml_of(folder)
    lines = assert_ready(check("--config_path", path), "mm_projector", "tokenizer.model: ", "<image> -200")
    assert lines["memory"][0][1].startswith("load 4")


@pytest.mark.parametrize("dialect", TEXT)
def test_folders_of_tinyllava_factory(check, tmp_path, dialect):
    write_factory_folder(tmp_path / "model", dialect)
    assert_ready(check("--config_path", tmp_path / "model"))


@pytest.mark.parametrize("changes", [{"mm_use_im_start_end": True}, {"mm_projector_type": "resampler"}])
def test_marks_around_images_and_other_connectors(check, tmp_path, changes):
    sizes = {"resampler_hidden_size": 24, "num_queries": 3, "num_resampler_layers": 1, "vocab_size": 332}
    folder = write_tiny_tinyllava(tmp_path, **sizes, **changes)
    lines = assert_ready(check("--config_path", folder))
    is_marked = "<im_start> 330, <image> -200, <im_end> 331" in lines["tokenizer"][0][1]
    assert is_marked == ("mm_use_im_start_end" in changes)


@pytest.mark.parametrize("kind", ["option", "config.json", "yaml", "yaml and option"])
def test_a_tower_in_a_folder_of_its_own(check, tmp_path, kind):
    folder = write_tiny_tinyllava(tmp_path)
    path, options = folder, []
    if kind.startswith("yaml"):
        path = write_yaml_of(folder)
    tower = split_tower(folder)
    if "option" in kind:
        options = ["--vision_tower", tower]
    elif kind == "yaml":
        path = write_yaml_of(folder, vision_tower="tower")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(tower)}))
    lines = assert_ready(check("--config_path", path, *options))
    assert any(str(tower) in text for _, text in lines["files"])


def test_a_tower_that_is_nowhere(check, tmp_path):
    folder = write_tiny_tinyllava(tmp_path)
    split_tower(folder)
    result = check("--config_path", folder)
    assert_failed(result, {"weights": "FAILED", "dtype": "skipped"}, "holds no vision tower")


def test_the_option_needs_a_family_that_has_it(check):
    status, out, _ = check("--vision_tower", "tower")
    assert status == 2 and "vision_tower" in found(out)["config"][0][1]


@pytest.mark.parametrize("case", ["e2e_llama", "e2e_phi", "e2e_stablelm"])
def test_published_folders_with_a_described_tower(check, case):
    root = golden_path(f"tinyllava/{case}")
    (config,) = root.glob("*/config.json")
    assert_ready(check("--config_path", config.parent, "--vision_tower", root / "vision_config.json"))


def test_kept_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINDVLM_CACHE", str(tmp_path / "cache"))
    folder = write_tiny_tinyllava(tmp_path)
    for expected in ("the first start converts them and keeps them in ", "converted ones are kept in "):
        with monkeypatch.context() as patch:
            (_, (_, text)) = assert_ready(checker(patch, capsys)("--config_path", folder))["weights"]
        assert text.startswith(f"{expected}{tmp_path / 'cache'}/model-")
        mindvlm.load(folder, mode="pynative")


def test_no_room_for_kept_weights(check, tmp_path, monkeypatch):
    folder = write_tiny_tinyllava(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    status, out, _ = check("--config_path", folder)
    assert status == 0 and found(out)["weights"][1][0] == "warning"
    assert "MINDVLM_CACHE" in found(out)["weights"][1][1]


def test_pictures_in_tiles_are_counted(check, tmp_path):
    tiles = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56], [56, 56]]}
    folder = write_tiny_tinyllava(tmp_path, **tiles)
    whole = write_tiny_tinyllava(tmp_path / "whole")
    lengths = []
    for path in (whole, folder):
        text = assert_ready(check("--config_path", path))["memory"][0][1]
        lengths.append(int(text.partition("prompt of ")[2].split()[0]))
    # an overview and four tiles of four tokens
    assert lengths[1] - lengths[0] == 16
    few = write_tiny_tinyllava(tmp_path / "few", **tiles, tokenizer_model_max_length=lengths[0] + 12)
    # the small picture fits, the large one does not
    assert f"prompt of {lengths[0] + 12} tokens" in assert_ready(check("--config_path", few))["memory"][0][1]


def test_the_help_says_yaml_or_folder(capsys):
    from mindvlm.tools import check_model

    text = " ".join(check_model.build_parser().format_help().split())
    assert "a YAML or a checkpoint folder" in text and "--vision_tower" in text
