import pytest

from mindvlm.core.errors import UserError
from mindvlm.training.datasets.registry import choose_datasets, read_registry


def test_paths_are_relative_to_the_registry(registry):
    entries = choose_datasets(read_registry(registry), "talk+pages", weights={"pages": 0.5})
    assert [(entry.name, entry.weight) for entry in entries] == [("talk", 2.0), ("pages", 0.5)]
    assert entries[1].images == str(registry.parent / "页 images") and entries[0].images is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pages: {annotation: a.json}",
            "data set 'pages': unknown config key 'annotation'; did you mean 'annotations'",
        ),
        ("pages: a.json", "data set 'pages': is 'a.json'; expected {images"),
        ("pages: {images: x}", "lacks the key 'annotations'"),
        ("pages: {annotations: a.json, weight: 0}", "weight is 0.0; expected a number above 0"),
        ("pages: {annotations: a.json, weight: .nan}", "weight is nan"),
        ("pages: {annotations: a.json, format: coco}", "'coco'; expected 'vary' or 'vary_tiny_600k' or 'llava'"),
        ("pages: {annotations: [", "not valid YAML at line 1"),
    ],
)
def test_errors_of_the_registry(tmp_path, text, message):
    (tmp_path / "registry.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_registry(tmp_path / "registry.yaml")
    assert "registry.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ("page", {}, "unknown data set 'page'; did you mean 'pages'"),
        ("xyz", {}, "unknown data set 'xyz'; the registry has: pages, talk"),
        ([], {}, "name at least one of pages, talk"),
        ("", {}, "name at least one"),
        ("pages+pages", {}, "name each once"),
        ("pages", {"talk": 1.0}, "data.weights names 'talk', which is not one of"),
        ("pages", {"pages": "much"}, "data.weights.pages: weight is 'much'"),
    ],
)
def test_errors_of_the_choice(registry, names, weights, message):
    with pytest.raises(UserError, match=message):
        choose_datasets(read_registry(registry), names, weights=weights)


def test_missing_files_are_named(registry):
    registry.write_text("a: {annotations: none.json}\nb: {annotations: pages.json, images: none}\n")
    entries = read_registry(registry)
    with pytest.raises(UserError, match="data set 'a': annotation file .*none.json not found"):
        choose_datasets(entries, "a")
    with pytest.raises(UserError, match="data set 'b': images folder .*none not found"):
        choose_datasets(entries, "b")


def test_paths_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "registry.yaml").write_text("a: {images: ~/images, annotations: ~/a.json}")
    entry = read_registry(tmp_path / "registry.yaml")["a"]
    assert (entry.images, entry.annotations) == (f"{tmp_path}/home/images", f"{tmp_path}/home/a.json")
