"""Comparison of arrays of the k largest logits and their ids."""

import re

import numpy as np

from tests.golden_readers.report import Report

SEPARATED = 1e-4


def compare_top_values(report: Report, wanted: dict[str, str], logits: np.ndarray) -> None:
    """Compares `topK_values`, and `topK_ids` where a value differs from its neighbours by more than rounding.

    Args:
        wanted: item -> name of the recorded array; other items are ignored.
        logits: (..., V); the recorded arrays may lack an axis of length 1.
    """
    for item, name in wanted.items():
        found = re.fullmatch(r"top(\d+)_(values|ids)", item)
        if not found:
            continue
        k = int(found.group(1))
        candidates = np.argpartition(-logits, k, axis=-1)[..., : k + 1]
        ranks = np.argsort(-np.take_along_axis(logits, candidates, -1), axis=-1, kind="stable")
        order = np.take_along_axis(candidates, ranks, -1)
        values = np.take_along_axis(logits, order, -1)
        shape = report.recorded[name].shape
        if found.group(2) == "values":
            report.close(name, values[..., :k].reshape(shape))
            continue
        gaps = np.abs(np.diff(values, axis=-1)) > SEPARATED * np.maximum(1.0, np.abs(values[..., 1:]))
        before = np.concatenate((np.ones_like(gaps[..., :1]), gaps[..., : k - 1]), -1)
        separated = (before & gaps[..., :k]).reshape(shape)
        report.close(name, order[..., :k].reshape(shape), at=separated, note="where values are separated")
