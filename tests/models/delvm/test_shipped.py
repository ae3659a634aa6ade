"""The shipped models of drawn scenes, on scenes of another seed than those of the training."""

from pathlib import Path

import numpy as np
import pytest

from mindvlm import load
from mindvlm.evaluation.picture_metrics import palette
from mindvlm.evaluation.picture_pairs import nearest_label, picture_figures
from mindvlm.models.delvm.model_config import DelvmModelConfig
from mindvlm.models.delvm.scenes import draw_pair
from mindvlm.models.run_config import read_config
from mindvlm.training.building import read_model
from mindvlm.training.job_file import read_job

ROOT = Path(__file__).parents[3]
RECIPES = ("train_scenes_vqgan", "train_scenes", "train_scenes_more")
TASKS = ("segmentation", "edges", "rain")
NUM_QUERIES, SEED = 5, 987


@pytest.fixture(scope="module")
def figures():
    """The figures of each task: those of predictions, and those of copies of the nearest example's label."""
    model = load(ROOT / "configs/delvm/scenes.yaml", device="cpu", mode="pynative")
    pairs = {task: [draw_pair(task, number, seed=SEED, size=32) for number in range(3 + NUM_QUERIES)] for task in TASKS}
    prompts = []
    for examples in pairs.values():
        codes = model.encode([picture for pair in examples for picture in pair])
        prompts += [np.concatenate([*codes[:6], codes[2 * number]]).tolist() for number in range(3, 3 + NUM_QUERIES)]
    # all tasks at once, which takes no longer than one
    predicted = list(map(np.asarray, model.decode(model.continue_codes(prompts, model.num_codes))))
    found = {}
    for task, examples in pairs.items():
        shown, asked = [tuple(map(np.asarray, pair)) for pair in examples[:3]], examples[3:]
        truths = [np.asarray(label) for _, label in asked]
        copied = [nearest_label(np.asarray(picture), shown) for picture, _ in asked]
        colours = palette(truths) if task != "rain" else None
        options = (truths, colours, None if colours is None else 20)
        found[task] = picture_figures(predicted[:NUM_QUERIES], *options), picture_figures(copied, *options)
        del predicted[:NUM_QUERIES]
    return found


def test_both_files_have_at_most_8_megabytes():
    files = [*ROOT.glob("examples/delvm_scenes*/*.safetensors")]
    assert len(files) == 2 and sum(path.stat().st_size for path in files) <= 8_000_000


@pytest.mark.parametrize(
    ("task", "figure", "least", "margin"),
    [
        ("segmentation", "miou", 0.25, 0.08),
        ("segmentation", "foreground_iou", 0.7, 0.4),
        ("edges", "miou", 0.62, 0.15),
        ("edges", "line_f1", 0.9, 0.2),
        ("rain", "psnr", 21, 6),
    ],
)
def test_predictions_beat_a_copy_clearly(figures, task, figure, least, margin):
    predicted, copied = figures[task]
    assert predicted[figure] >= least and predicted[figure] >= copied[figure] + margin


def test_the_recipes_train_the_shipped_sizes():
    configs = {name: read_model(read_job(ROOT / f"configs/delvm/{name}.yaml").config) for name in RECIPES}
    shipped = read_config(ROOT / "configs/delvm/scenes.yaml").model
    assert configs["train_scenes_vqgan"].model == DelvmModelConfig(vqgan=shipped.vqgan)
    assert configs["train_scenes"].model == configs["train_scenes_more"].model == shipped
    assert shipped.num_picture_codes * 8 == shipped.max_length
