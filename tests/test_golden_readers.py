"""The runner of recorded cases can fail, refuses unknown cases and reads READMEs strictly."""

import json

import mindspore as ms
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mindvlm.convert.reference.clip import ClipTower
from mindvlm.models.hf.towers import read_tower
from mindvlm.weights.config_json import ConfigTable
from tests.golden_case import main
from tests.golden_readers.case import Case
from tests.golden_readers.optimizer_statement import read_statement
from tests.golden_readers.readme_rules import assign_images, cropped_slices, sampled_slice

STATEMENT = (
    "ONE AdamW step: lr 2e-3, betas (0.9, 0.999), eps 1e-5, weight decay 0.1, no gradient clipping, bias correction "
    "on, decoupled decay (p <- p*(1-lr*wd) first). Parameter groups are those of the official trainer: no decay for "
    "names containing `bias` and for parameters of nn.LayerNorm; everything else decays, including RMSNorm weights."
)
TABLE = """
| array | shape | dtype | meaning |
|---|---|---|---|
| `after:x` | (1,) | float32 | the named parameter after the AdamW step |

## Optimiser step
"""
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
}


@pytest.fixture(autouse=True)
def same_mode():
    mode = ms.get_context("mode")
    yield
    ms.set_context(mode=mode)


@pytest.fixture
def clip_case(tmp_path):
    """Writes a CLIP tower case in the recorded format, with outputs of the torch reference."""
    torch.manual_seed(0)
    tower = ClipTower(read_tower(ConfigTable(CLIP))).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        pixels = torch.randn(2, 3, 28, 28)
        outputs = {
            "feature": tower.features(pixels, select_layer=-2),
            "hidden_1": tower.hidden_states(pixels)[1][:1],
            "unheard_of": torch.zeros(3),
        }
    prefix = "transformer.vision_tower."
    save_file({prefix + name: value.contiguous() for name, value in tower.state_dict().items()}, tmp_path / "w")
    (tmp_path / "w").rename(tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": CLIP, "vision_select_layer": -2}))
    np.savez(tmp_path / "inputs.npz", pixel_values_clip=pixels.numpy())
    np.savez(tmp_path / "outputs.npz", **{name: value.numpy() for name, value in outputs.items()})
    return tmp_path


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_a_case_that_holds(clip_case, capsys):
    status, out, _ = run(capsys, clip_case, "--mode", "pynative", "--json")
    report = json.loads(out)
    assert status == 0 and report["holds"]
    assert {item["name"] for item in report["items"]} == {"feature", "hidden_1"}
    assert list(report["not_compared"]) == ["unheard_of"]


def test_a_case_that_does_not_hold(clip_case, capsys):
    outputs = dict(np.load(clip_case / "outputs.npz"))
    outputs["hidden_1"][0, 3, 5] += 1e-2
    np.savez(clip_case / "outputs.npz", **outputs)
    status, out, _ = run(capsys, clip_case, "--mode", "pynative")
    assert status == 1
    assert [line.split()[0] for line in out.splitlines() if line[6:].startswith("hidden_1 ")] == ["FAIL"]
    assert any(line.startswith("PASS  feature") for line in out.splitlines())


def test_weights_of_another_model_do_not_hold(clip_case, capsys):
    config = {"vision_config": {**CLIP, "num_hidden_layers": 3}, "vision_select_layer": -2}
    (clip_case / "config.json").write_text(json.dumps(config))
    status, out, _ = run(capsys, clip_case, "--mode", "pynative")
    assert status == 1 and "does not fit the vary_toy model" in out


def test_nothing_compared_does_not_hold(clip_case, capsys):
    np.savez(clip_case / "outputs.npz", unheard_of=np.zeros(3))
    assert run(capsys, clip_case, "--mode", "pynative")[0] == 1


def test_unusable_folders(tmp_path, capsys):
    status, out, err = run(capsys, tmp_path / "absent")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "no such folder" in err
    status, _, err = run(capsys, tmp_path)
    assert status == 2 and "not recognised" in err


def test_the_optimizer_statement():
    statement = read_statement("", TABLE + STATEMENT + "\n\n## Next\nONE AdamW step: lr 1")
    assert (statement.num_steps, statement.learning_rate, statement.betas) == (1, 2e-3, [0.9, 0.999])
    assert (statement.eps, statement.weight_decay, statement.bias_correction) == (1e-5, 0.1, True)
    assert statement.max_grad_norm == float("inf")
    assert (statement.exempt_names, statement.exempt_classes) == (["bias"], ["LayerNorm"])


@pytest.mark.parametrize(
    ("clause", "field", "value"),
    [
        ("gradients clipped to norm 0.5", "max_grad_norm", 0.5),
        ("gradient clipping at global norm 1.0", "max_grad_norm", 1.0),
        ("gradient clipping 1.0", "max_grad_norm", 1.0),
        ("max_grad_norm=0.25", "max_grad_norm", 0.25),
        ("no bias correction", "bias_correction", False),
        ("bias correction off", "bias_correction", False),
    ],
)
def test_other_clauses(clause, field, value):
    text = STATEMENT.replace("no gradient clipping", clause).replace("bias correction on, ", "")
    assert getattr(read_statement(text), field) == value


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("eps 1e-5, ", "", "does not give eps"),
        ("no gradient clipping", "gradients clipped by value 1.0", "not understood: 'gradients clipped by value 1.0'"),
        ("lr 2e-3", "lr 2e-3 (projectors 1e-2)", "not understood"),
        ("parameters of nn.LayerNorm", "everything small", "groups are not understood: 'everything small'"),
        ("Parameter groups are", "The lr of embeddings is halved. Parameter groups are", "not understood"),
        ("AdamW", "SGD", "SGD is not AdamW"),
        ("ONE", "SOME", "number of optimizer steps"),
    ],
)
def test_what_is_not_understood_is_not_guessed(old, new, message):
    with pytest.raises(ValueError, match=message):
        read_statement(STATEMENT.replace(old, new))


def case_with(readme: str, tmp_path) -> Case:
    return Case(tmp_path, {}, {}, {}, {}, readme, "")


@pytest.mark.parametrize(
    ("meaning", "per_row", "num_images", "expected"),
    [
        ("one sample, one image (image 2), no padding", [1], 3, [2]),
        ("two spans; images entry = [image 1, image 2]", [2], 3, [1, 2]),
        ("two spans; images entry = [image 2, image 3]", [2], 3, [1, 2]),
        ("row 0 image 1, row 1 text only (a pair of zeros), row 2 image 0", [1, 0, 1], 2, [1, 0]),
        ("row 0 images 2 and 0, row 1 image 1", [2, 1], 3, [2, 0, 1]),
        ("the prompts |\n\nrow 0 -> image 1, row 1 -> image 0, row 2 -> zeros.", [1, 1, 0], 2, [1, 0]),
        ("the prompts", [1, 0, 1], 3, [0, 1]),
        ("image 1", [0], 3, []),
    ],
)
def test_images_of_a_prompt(meaning, per_row, num_images, expected, tmp_path):
    case = case_with(f"| `x` | (1, 9) | int32 | {meaning}", tmp_path)
    assert assign_images(case, "x", per_row, num_images)[0] == expected


def test_sampling_words():
    assert sampled_slice("at rows/columns 3, 11, 19, ...") == slice(3, None, 8)
    assert cropped_slices("array, rows 480..527, columns 500..563") == (slice(480, 528), slice(500, 564))
    assert sampled_slice("all of it") is None and cropped_slices("all of it") is None
