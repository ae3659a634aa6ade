"""The run config of the DeLVM family, its YAML parser and the run config of a published folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mindvlm.core.config import LENGTH_KEYS, GenerationConfig, build_config, resolve_path
from mindvlm.core.errors import UserError
from mindvlm.core.runtime import RunConfig
from mindvlm.models.delvm.checkpoint_config import from_published, read_published
from mindvlm.models.delvm.model_config import DelvmModelConfig
from mindvlm.models.delvm.processor import DelvmProcessorConfig
from mindvlm.models.run_config import replace_keys


@dataclass(kw_only=True)
class DelvmConfig(RunConfig):
    """The run config of a DeLVM, with the keys of `RunConfig`.

    Attributes:
        vqgan: path of separate weights of the VQGAN; the Hugging Face form of a decoder lacks them.
    """

    family: Literal["delvm"] = "delvm"
    name: str = "delvm"
    vqgan: str | None = None
    model: DelvmModelConfig
    processor: DelvmProcessorConfig = field(default_factory=DelvmProcessorConfig)


def parse_config(data: dict, path: Path) -> DelvmConfig:
    """Returns the run config of a YAML mapping. Relative paths start at the folder of the file.

    Raises:
        UserError: a key or a value is wrong.
    """
    config = build_config(DelvmConfig, data)
    for key in ("checkpoint", "vqgan", "adapter"):
        setattr(config, key, resolve_path(getattr(config, key), path))
    # a VQGAN without decoder can train
    checked(config, str(path), parts=("vqgan",))
    # a whole config, such as that of a job with model_changes, has the usual values
    given, usual = data.get("generation") or {}, GenerationConfig()
    wrong = next((key for key in LENGTH_KEYS if given.get(key, getattr(usual, key)) != getattr(usual, key)), None)
    if wrong:
        num_codes = config.model.num_picture_codes
        raise UserError(f"{path}: generation.{wrong} has no effect: a picture has {num_codes} codes; remove it")
    return config


def folder_config(folder: Path, overrides: dict[str, Any] | None = None) -> DelvmConfig:
    """Returns the run config of a folder: a converted decoder, or the checkpoint of a training.

    Args:
        folder: folder with the weights, and a config.json or model_config.pt.
        overrides: runtime keys that replace the defaults; `vqgan` is the folder of the VQGAN, which a converted decoder
            needs.

    Raises:
        UserError: a file is missing or cannot be used, or an override is not a runtime key.
    """
    overrides = dict(overrides or {})
    data = read_published(folder)
    if data is None or "_class_name" in data:
        raise UserError(f"{folder}: does not describe a decoder of DeLVM; give the folder of one, or a YAML")
    vqgan = overrides.get("vqgan")
    if vqgan is not None:
        beside = read_published(Path(vqgan)) if Path(vqgan).is_dir() else None
        if beside is None or "_class_name" not in beside:
            raise UserError(f"vqgan {vqgan}: is no folder with the config.json of a VQGAN; give the folder of one")
        from_published(beside, path=f"{vqgan}/config.json")
        data = {**data, "vq_config": beside}
    model = from_published(data, path=f"{folder}/config.json")
    config = DelvmConfig(name=folder.name, checkpoint=str(folder), model=model)
    replace_keys(config, overrides, folder)
    return checked(config, str(folder))


def checked(config: DelvmConfig, origin: str, parts: Sequence[str] = ("language_model", "vqgan")) -> DelvmConfig:
    """Returns a config that can run, with the processor's size. Raises UserError if one of the parts is missing."""
    for part in parts:
        if getattr(config.model, part) is None:
            remedy = "give its folder as vqgan (--vqgan)" if part == "vqgan" else "add the section"
            raise UserError(f"{origin}: describes no {part}, which pictures need; {remedy}")
    size = config.model.vqgan.resolution
    if config.processor.size not in (None, size):
        raise UserError(
            f"{origin}: processor.size is {config.processor.size} but model.vqgan.resolution {size}; drop it"
        )
    config.processor.size = size
    return config
