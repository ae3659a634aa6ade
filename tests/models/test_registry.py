"""A family is one folder and one registry row: `tests/mosaic` loads, converts both ways, answers, trains and is
checked."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from mindvlm.api import load
from mindvlm.checkpoint import MemorySource, open_checkpoint, write_checkpoint
from mindvlm.convert.convert_weight import main as convert
from mindvlm.core.config import Scope, kind_of_config, read_yaml
from mindvlm.core.errors import UserError
from mindvlm.models.loading import build_model, require_checkpoint
from mindvlm.models.registry import FAMILIES, convertible_models, get_family
from mindvlm.models.run_config import read_config
from mindvlm.parallel.mesh import Mesh
from mindvlm.serving.app import Service
from mindvlm.serving.metrics import Metrics
from mindvlm.serving.settings import ServerSettings
from mindvlm.tools.check_model import main as check
from mindvlm.tools.serve import main as serve
from mindvlm.training.job_file import read_job
from mindvlm.training.trainer import Trainer
from mindvlm.weights.rules.planning import make_plan
from tests.mosaic import family as mosaic
from tests.mosaic import names
from tests.mosaic.config import parse_config
from tests.mosaic.names import HF, SIZES, infos_of
from tests.processing.text.small_pieces import write_piece_files
from tests.training.small_job import losses, write_data

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a Mosaic's YAML, tokenizer and published weights, and the family's row in the registry."""
    monkeypatch.setitem(FAMILIES, "mosaic", "tests.mosaic")
    rng = np.random.default_rng(0)
    native = infos_of(SIZES)
    names = make_plan(HF.reverse(), native).infos
    tensors = {name: rng.normal(0, 0.3, info.shape).astype(np.float32) for name, info in names.items()}
    write_checkpoint(tmp_path / "published.safetensors", MemorySource(tensors), metadata={"format": "pt"})
    write_piece_files(tmp_path)
    config = {
        "family": "mosaic",
        "checkpoint": "published.safetensors",
        "device": "cpu",
        "mode": "pynative",
        "model": {"language_model": SIZES},
        "processor": {"tokenizer": "."},
        "generation": {"max_new_tokens": 6},
    }
    (tmp_path / "mosaic.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_every_row_leads_to_a_family_of_its_name():
    for name in FAMILIES:
        family = get_family(name)
        assert family.name == name
        assert {model.family for model in family.models} == {name}
    assert {model.family for model in convertible_models()} == set(FAMILIES)
    with pytest.raises(UserError, match=f"'family' is 'mosaic'; expected one of {', '.join(FAMILIES)}"):
        get_family("mosaic")


@pytest.mark.parametrize(
    ("path", "repository", "family"),
    [
        ("TinyLLaVA-1.5B", "bczhou/TinyLLaVA-1.5B", "tinyllava"),
        ("bczhou/tiny-llava-v1-hf", "bczhou/tiny-llava-v1-hf", "tinyllava"),
        ("models/vary-toy", "HaoranWei/Vary-toy", "vary"),
        ("SliME-llama3-70B/config.json", "yifanzhang114/SliME-llama3-70B", "slime"),
    ],
)
def test_a_published_model_that_is_not_there(path, repository, family, tmp_path, capsys):
    folder = tmp_path / path.removesuffix("/config.json")
    said = (
        f"{folder} does not exist, and nothing is downloaded; run: hf download {repository} --local-dir {folder} "
        f"(docs/{family}.md shows its use)"
    )
    with pytest.raises(UserError) as raised:
        read_config(tmp_path / path)
    assert str(raised.value) == said
    assert serve(["--config_path", str(tmp_path / path)]) == convert(["--torch_ckpt_path", str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {said}\n" * 2
    with pytest.raises(UserError, match="hf download"):
        require_checkpoint(str(folder))
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="has no config.json"):
        read_config(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_of_every_family_says_what_a_model_is_for(name):
    configs = {path: read_yaml(path) for path in (CONFIGS / name).glob("*.yaml")}
    path, data = next(item for item in configs.items() if kind_of_config(item[1]) == "the config of a model")
    parse = get_family(name).parse_config
    assert parse(data | {"scope": {"note": "For tests."}}, path).scope == Scope(note="For tests.")
    with pytest.raises(UserError, match="unknown config key 'scope.notes'; did you mean 'note'"):
        parse(data | {"scope": {"notes": "For tests."}}, path)


def test_a_new_family_answers(folder):
    model = load(folder / "mosaic.yaml", cache=False)
    red, blue = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    answer = model.chat("what colour?", images=red)
    assert answer.num_new_tokens and answer.num_prompt_tokens > 4
    logits = [model.logits("what colour?", images=image) for image in (red, blue)]
    assert not np.allclose(*logits)
    several = model.generate(["what colour?", "what?"], images=[red, None])
    assert several[0].ids == answer.ids


def test_the_web_page_learns_what_a_new_family_is_for(folder):
    def scope_of() -> dict:
        scheduler = SimpleNamespace(model=load(folder / "mosaic.yaml", cache=False), failure=None)
        return Service(scheduler, ServerSettings(), Metrics()).card()["scope"]

    assert scope_of() == asdict(mosaic.FAMILY.scope) == asdict(Scope())
    own = {"note": "Names colours.", "questions": ["what colour?"], "one_picture": True}
    data = yaml.safe_load((folder / "mosaic.yaml").read_text())
    (folder / "mosaic.yaml").write_text(yaml.safe_dump(data | {"scope": own}, allow_unicode=True))
    assert scope_of() == asdict(Scope(**own))


def test_a_new_family_converts_both_ways(folder, capsys):
    published, native, back = (folder / f"{name}.safetensors" for name in ("published", "native", "back"))
    assert convert(["--torch_ckpt_path", str(published), "--mindspore_ckpt_path", str(native), "--verify"]) == 0
    assert "mosaic" in capsys.readouterr().out
    with open_checkpoint(native) as checkpoint:
        assert checkpoint.infos.keys() == infos_of(SIZES).keys()
    assert convert(["--torch_ckpt_path", str(native), "--mindspore_ckpt_path", str(back), "--to", "hf"]) == 0
    assert back.read_bytes() == published.read_bytes()


def test_a_new_family_is_checked(folder, capsys):
    status = check(["--config_path", str(folder / "mosaic.yaml")])
    assert status == 0, capsys.readouterr()
    assert "of the family mosaic" in capsys.readouterr().out


def train_job(folder, **changes):
    data = {"registry": write_data(folder).name, "datasets": "words", "batch_size": 2, "max_length": 96}
    job = {
        "model_config": "mosaic.yaml",
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "mode": "pynative",
        "data": {**data, "lengths": [96], "num_workers": 0},
        "init": {"weights": ["published.safetensors"]},
        "schedule": {"total_steps": 2, "warmup_steps": 0},
        "optimizer": {"learning_rate": 1e-2},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job | changes))
    return read_job(folder / "job.yaml")


@pytest.mark.parametrize("weights", [["published.safetensors"], []])
def test_a_new_family_trains(folder, weights):
    Trainer(train_job(folder, init={"weights": weights}, log_every=1)).train()
    first, second = losses(folder / "run")
    assert np.isfinite([first[1], second[1]]).all() and first[1:] != second[1:]


def test_a_family_without_a_plan_is_not_divided(folder):
    with pytest.raises(UserError, match="a model of the family 'mosaic' cannot be divided over 2 processes; use 1"):
        build_model(get_family("mosaic"), read_config(folder / "mosaic.yaml").model, mesh=Mesh(tp=2))


def test_a_config_that_several_families_list_goes_to_the_one_that_claims_it(folder, monkeypatch):
    """Both families list the model type "llama"."""
    (model,) = names.MODELS

    def read_folder(path, overrides):
        return parse_config(yaml.safe_load((folder / "mosaic.yaml").read_text()), path / "config.json")

    both = replace(model, model_types=("LlamaForCausalLM", "llama"))
    claims = replace(mosaic.FAMILY, models=(both,), read_folder=read_folder, reads=lambda data: "mosaic_grid" in data)
    monkeypatch.setattr(names, "MODELS", (both,))
    monkeypatch.setattr(mosaic, "FAMILY", claims)
    data = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mosaic_grid": 2}
    (folder / "config.json").write_text(json.dumps(data))
    assert read_config(folder).family == "mosaic"
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="config.json: lacks"):
        read_config(folder)
    monkeypatch.setattr(mosaic, "FAMILY", replace(claims, reads=lambda data: True, read_folder=None))
    with pytest.raises(UserError, match="config.json: lacks"):
        read_config(folder)
    monkeypatch.setattr(mosaic, "FAMILY", replace(claims, reads=None))
    with pytest.raises(UserError, match="model type llama is not read from a folder"):
        read_config(folder)
