"""Checks whether a job may resume from a checkpoint, by comparing their configs."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.core.runtime import RuntimeConfig
from mindvlm.models.registry import get_family
from mindvlm.training.job_file import Job

# These keys may change between two starts of one run: place, output, kept files.
FREE_KEYS = {
    "model_config",
    # compared as parts of the model
    "model_changes",
    "output_dir",
    "resume",
    "device",
    "attention",
    "mode",
    "parallel",
    "recompute",
    "log_every",
    "evaluate_every",
    "save_every",
    "keep_checkpoints",
    "best",
    "max_nan_steps",
    "tensorboard",
    "evaluation",
    "accumulation",
    "rows_per_step",
    "data.batch_size",
    "data.registry",
    "data.num_workers",
    "data.look_ahead",
    "data.index_folder",
    "data.inspection",
    "rendered_text.batch_size",
    "rendered_text.num_workers",
    "rendered_text.num_evaluation_images",
}
FREE_MODEL_KEYS = {"processor.vocab_file", "processor.max_pixels", "model.max_length"}
RETIRED = RuntimeConfig.RETIRED
MAX_SHOWN = 6


def fingerprint(job: Job, model_config) -> dict[str, Any]:
    """Returns the values, by dotted key, that must be equal for a run to resume.

    Args:
        model_config: of `read_config`, with the sections `model` and `processor`.
    """
    training = get_family(model_config.family).training
    free = FREE_KEYS | training.free_keys if training else FREE_KEYS
    written = {**job.written, **job.written["own_sections"]}
    del written["own_sections"]
    values = {key: value for key, value in flatten(written) if not is_free(key, free)}
    sections = {"model": asdict(model_config.model), "processor": asdict(model_config.processor)}
    values |= {key: value for key, value in flatten(sections) if not is_free(key, FREE_MODEL_KEYS)}
    # a job need not name its family
    values["family"] = model_config.family
    # devices and passes can share the same rows in many ways
    return values | {"rows of a step": job.config.num_rows}


def flatten(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Returns the leaves of nested mappings by dotted key. Lists are leaves."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flatten(item, f"{where}.{key}" if where else str(key))
    else:
        yield where, list(value) if isinstance(value, tuple) else value


def is_free(key: str, free: set[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in free)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns one text for each key whose values differ.

    A key that only the newer version has counts as off; a retired key with its only value is ignored.
    """
    absent = object()
    changed = []
    then = {key: value for key, value in then.items() if key not in RETIRED or value != RETIRED[key]}
    for key in dict.fromkeys([*then, *now]):
        before, after = then.get(key, absent), now.get(key, absent)
        if before != after and not (before is absent and after in (None, False, [], {})):
            texts = ["absent" if value is absent else repr(value) for value in (before, after)]
            changed.append(f"{key} (was {texts[0]}, is {texts[1]})")
    return changed


def require_same_job(then: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises UserError with the keys that differ."""
    changed = differences(then, now)
    if changed:
        more = f" and {len(changed) - MAX_SHOWN} more" if changed[MAX_SHOWN:] else ""
        shown = ", ".join(changed[:MAX_SHOWN]) + more
        raise UserError(
            f"{where} was made by another config: {shown}; restore them, choose another output_dir, or resume "
            "anyway with --accept_changes"
        )
