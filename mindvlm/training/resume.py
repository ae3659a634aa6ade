"""Whether a job may go on from a checkpoint: what was written then against what is written now."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.training.job_file import Job

# What may change between two starts of one run: where it runs, what it shows, what it keeps.
FREE_KEYS = {
    "model_config",
    # they are compared as parts of the model
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
    "rendered_text.batch_size",
    "rendered_text.num_workers",
    "rendered_text.num_evaluation_images",
}
FREE_MODEL_KEYS = {"processor.vocab_file", "processor.max_pixels", "model.max_length"}
MAX_SHOWN = 6


def fingerprint(job: Job, model_config) -> dict[str, Any]:
    """What must be the same for a run to go on: values by dotted key.

    Args:
        model_config: of `read_config`, with the sections `model` and `processor`.
    """
    values = {key: value for key, value in flatten(job.written) if not is_free(key, FREE_KEYS)}
    sections = {"model": asdict(model_config.model), "processor": asdict(model_config.processor)}
    values |= {key: value for key, value in flatten(sections) if not is_free(key, FREE_MODEL_KEYS)}
    # the same rows can be shared among devices and passes in many ways
    return values | {"rows of a step": job.config.num_rows}


def flatten(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by dotted key. Lists are leaves."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flatten(item, f"{where}.{key}" if where else str(key))
    else:
        yield where, list(value) if isinstance(value, tuple) else value


def is_free(key: str, free: set[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in free)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One text for each key whose value is another one. A key that came later is as good as one that is off."""
    absent = object()
    changed = []
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
            f"{where} was made by another config: {shown}; restore them, choose another output_dir, or go on all the "
            "same with --accept_changes"
        )
