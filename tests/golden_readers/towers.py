"""Cases of a single vision tower: all of its stages."""

import re

from mindspore import Tensor, nn

from tests.golden_readers.case import Case
from tests.golden_readers.loaded import LoadedVary
from tests.golden_readers.report import Report

CHANNELS_FIRST = ("neck", "net_2", "net_3")


class ClipStages(nn.Cell):
    """Computes all states of the CLIP tower, the pooled class token and the feature."""

    def __init__(self, tower):
        super().__init__(auto_prefix=False)
        self.tower = tower

    def construct(self, pixels):
        states, pooled = self.tower.hidden_states(pixels)
        return states, pooled, self.tower(pixels)


class VocabularyStages(nn.Cell):
    """Computes all stages of the vision vocabulary."""

    def __init__(self, tower):
        super().__init__(auto_prefix=False)
        self.tower = tower

    def construct(self, pixels):
        return self.tower.stages(pixels)


def read_clip(case: Case, report: Report) -> None:
    """Compares `hidden_N`, `last_hidden_state`, `pooler_output` and `feature` of `pixel_values_clip`."""
    model = LoadedVary(case).model
    states, pooled, feature = ClipStages(model.vision_tower)(Tensor(case.inputs["pixel_values_clip"]))
    known = {f"hidden_{layer}": state for layer, state in enumerate(states)}
    known.update(last_hidden_state=states[-1], pooler_output=pooled, feature=feature)
    for name, recorded in case.outputs.items():
        if name in known:
            # some arrays are recorded for the first images only
            report.close(name, known[name].asnumpy()[: len(recorded)])


def read_vocabulary(case: Case, report: Report) -> None:
    """Compares `embed`, `block_N`, `neck`, `net_2`, `net_3` and `tokens` of `pixel_values_high`."""
    loaded = LoadedVary(case)
    depth = loaded.config.vision_vocabulary.depth
    pixels = Tensor(case.inputs["pixel_values_high"])
    stages = [stage.asnumpy() for stage in VocabularyStages(loaded.model.vision_vocabulary)(pixels)]
    names = ["embed", *(f"block_{layer}" for layer in range(depth)), "neck", "net_2", "net_3", "tokens"]
    for name, stage in zip(names, stages, strict=True):
        if name not in case.outputs:
            continue
        if name != "tokens":
            step = sampling_step(case, name)
            stage = stage[:, ::step, ::step]
        if name in CHANNELS_FIRST:
            stage = stage.transpose(0, 3, 1, 2)
        report.close(name, stage[: len(case.outputs[name])])


def sampling_step(case: Case, name: str) -> int:
    """Parses n in 'every nth row and column' from the README's description of the array."""
    found = re.search(r"every (\d+)(?:st|nd|rd|th) row", case.meaning(name))
    return int(found.group(1)) if found else 1
