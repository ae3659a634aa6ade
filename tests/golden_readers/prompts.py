"""The prompts of a case: their input arrays and the output arrays of each."""

import re
from dataclasses import dataclass

import numpy as np

from tests.golden_readers.case import Case
from tests.golden_readers.readme_rules import assign_images

FORWARD_ITEMS = (
    r"(?:clip|sam)_(?:feature|projected)|projected|merged_embeds|hidden_\d+|last_hidden|logits|logits_tail|logits_last_position"
    r"|top\d+_(?:values|ids)|cache_(?:key|value)_\d+|ntk_alpha|inv_freq|loss_eval|train_logits"
)
GENERATION_ITEMS = r"ids|logits|ntk_alpha|top\d+_(?:values|ids)"


@dataclass(frozen=True)
class Prompt:
    """One array of prompts.

    Attributes:
        name: name of the input array.
        input_ids: (B, L) int32.
        mask: (B, L) bool, False at padding.
        labels: (B, L) int32 or None.
        images: indices of the images in the rows, in reading order.
        images_from: source of the indices.
        forward, generation: item ("logits", "hidden_0", ...) -> name of the recorded array.
    """

    name: str
    input_ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray | None
    images: list[int]
    images_from: str
    forward: dict[str, str]
    generation: dict[str, str]

    @property
    def is_left_padded(self) -> bool:
        return not self.mask[:, 0].all()

    @property
    def is_padded(self) -> bool:
        return not self.mask.all()

    def rows(self) -> list[list[int]]:
        """The rows without padding."""
        return [ids[kept].tolist() for ids, kept in zip(self.input_ids, self.mask, strict=True)]


def find_prompts(case: Case, *, num_images: int) -> list[Prompt]:
    """Returns the prompts among the inputs.

    These are `<name>_input_ids` (with `_attention_mask` and `_labels`), `ids_<name>` and `gen_ids_<name>`.
    """
    prompts = []
    labels_of = find_labels(case)
    for name, ids in case.inputs.items():
        if found := re.fullmatch(r"(?:(.+)_)?input_ids", name):
            prefix = f"{found.group(1)}_" if found.group(1) else ""
            generates_itself = f"{prefix}ids" in case.outputs
            forward = {} if generates_itself else recorded_items(case, prefix, FORWARD_ITEMS, "")
            taken = not prefix and "gen_input_ids" in case.inputs
            generation = recorded_items(case, prefix if generates_itself else f"{prefix}gen_", GENERATION_ITEMS, "")
            generation = {} if taken else generation
            mask = case.inputs.get(f"{prefix}attention_mask")
        elif found := re.fullmatch(r"(gen_)?ids_(\w+)", name):
            tag = found.group(2)
            forward = {} if found.group(1) else recorded_items(case, "", FORWARD_ITEMS, f"_{tag}")
            generation = recorded_items(case, f"gen_{tag}_", GENERATION_ITEMS, "") if found.group(1) else {}
            mask = None
        else:
            continue
        images, images_from = [], ""
        if num_images:
            length = case.config.get("image_token_len", 256)
            per_row = (ids == case.config["im_patch_token"]).sum(1) // length
            images, images_from = assign_images(case, name, per_row.tolist(), num_images)
        prompts.append(
            Prompt(
                name=name,
                input_ids=ids.astype(np.int32),
                mask=np.ones(ids.shape, bool) if mask is None else mask.astype(bool),
                labels=case.inputs.get(labels_of.get(name)),
                images=images,
                images_from=images_from,
                forward=forward,
                generation=generation,
            )
        )
    return prompts


def recorded_items(case: Case, prefix: str, items: str, suffix: str) -> dict[str, str]:
    pattern = re.compile(f"{re.escape(prefix)}({items}){re.escape(suffix)}")
    return {found.group(1): name for name in case.outputs if (found := pattern.fullmatch(name))}


def find_labels(case: Case) -> dict[str, str]:
    """Returns prompt array -> labels array: the same prefix, else the longest prompt with the labels' shape."""
    found = {}
    for name, labels in case.inputs.items():
        if not re.fullmatch(r"(?:.+_)?labels", name):
            continue
        own = name.removesuffix("labels") + "input_ids"
        fitting = [
            other
            for other, ids in case.inputs.items()
            if ids.shape == labels.shape and re.fullmatch(r"ids_\w+|(?:.+_)?input_ids", other)
        ]
        if own in case.inputs:
            found[own] = name
        elif fitting:
            found[fitting[0]] = name
    return found
