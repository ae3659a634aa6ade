"""Batches of a process: from any step on, for any share of the rows."""

from dataclasses import replace

import numpy as np
import pytest

from mindvlm.core.errors import UserError
from mindvlm.datagen.rendered_text import MIN_STEPS_PER_STAGE
from mindvlm.models.run_config import read_config
from mindvlm.models.vary.processor import VaryProcessor
from mindvlm.training.config import RenderedTextConfig
from mindvlm.training.datasets.loader import Share
from mindvlm.training.job_file import read_job
from mindvlm.training.rendered_batches import BackgroundBatches, RenderedTextData
from tests.training.test_trainer import CONFIGS


@pytest.fixture
def open_data():
    """Opens sources of rendered text that are closed at the end."""
    opened = []
    processor = read_config(read_job(CONFIGS / "train_nano.yaml").config.model_config).processor

    def make(batch_size=2, *, step=0, state=None, template=processor.template, **share):
        config = RenderedTextConfig(batch_size=batch_size, curriculum_threshold=100.0)
        used = replace(processor, template=template)
        opened.append(RenderedTextData(config, VaryProcessor, used, seed=3, share=Share(**share)))
        opened[-1].start(step, state)
        return opened[-1]

    yield make
    for source in opened:
        source.close()


def texts(passes):
    return [origin for one in passes for origin in one.origins]


def test_rendered_text_goes_on_with_the_very_next_picture(open_data):
    whole = open_data()
    count = MIN_STEPS_PER_STAGE + 3
    taken, state = [], None
    for step in range(count + 8):
        if step == count:
            state = whole.state
        taken.append(whole.take())
        news = whole.observe(1.0)
        assert (news is not None) == (step + 1 == MIN_STEPS_PER_STAGE)
    assert state["curriculum"]["stage"] == 1 and set(state["ordered_stages"]) == {0, 1}
    resumed = open_data(step=count, state=state)
    for step in range(count, count + 8):
        again = resumed.take()
        resumed.observe(1.0)
        assert texts(again) == texts(taken[step])
        for first, second in zip(again, taken[step], strict=True):
            np.testing.assert_array_equal(first.arrays["pixels.1"], second.arrays["pixels.1"])
            np.testing.assert_array_equal(first.arrays["labels"], second.arrays["labels"])


def test_replicas_and_passes_share_the_pictures(open_data):
    parts = [open_data(shard=shard, num_shards=2, num_passes=2) for shard in (0, 1)]
    seen = [texts(part.take()) for _ in range(2) for part in parts]
    assert len({text for share in seen for text in share}) == 2 * 2 * 4
    whole = open_data(batch_size=8)
    assert sorted(texts(whole.take())) == sorted(seen[0] + seen[1])


def test_a_template_without_a_closing_token_is_refused(open_data):
    with pytest.raises(UserError, match="template 'simple' closes an answer with '###', which is no token besides"):
        open_data(template="simple")


def test_both_towers_share_one_array(open_data):
    (inputs,) = open_data().take()
    assert inputs.arrays["pixels.0"] is inputs.arrays["pixels.1"]
    has_label = inputs.arrays["labels"] != -100
    assert inputs.num_tokens == has_label.sum() + 2 * int(np.argmax(has_label[0]))


def test_the_curriculum_needs_the_same_passes(open_data):
    state = {"curriculum": {"threshold": 1.0}, "ordered_stages": [0] * BackgroundBatches.AHEAD + [0]}
    with pytest.raises(UserError, match="number of passes"):
        open_data(state=state, num_passes=2)
