"""What each model family is made of. A new family adds its row here."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from mindvlm.errors import UserError

FAMILIES = ("vary", "tinyllava")


@dataclass(frozen=True)
class Family:
    """The eight things that the rest of the library needs from a family.

    Attributes:
        parse_config: mapping and path of a YAML -> the family's typed run config.
        model: builds the model Cell, called with (config.model, dtype).
        processor: from files and text to model inputs, called with (config.processor).
        native_view: a checkpoint under the model's own names, see `mindvlm.convert.models.native_view`; of a family
            whose config has a `vision_tower`, `tower` is the checkpoint of that.
        adapted_view: the tensors of such a checkpoint with an adapter merged in, see
            `mindvlm.convert.lora.applying.adapted_view`.
        fit_pretrained: brings a pre-trained tensor to the shape that a training starts with, called with (name, array,
            shapes, seed=...), the shapes being those of all tensors of the model by name.
        companions: files by name that stand beside trained weights, called with the run config.
        vision_memory: what its towers take for one picture, a `VisionMemory`, called with (config.model, item_size).
    """

    parse_config: Callable
    model: Callable
    processor: type
    native_view: Callable
    adapted_view: Callable
    fit_pretrained: Callable
    companions: Callable
    vision_memory: Callable


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        UserError: there is none; the message lists those that are.
    """
    if name == "vary":
        from mindvlm.convert.lora.applying import adapted_view
        from mindvlm.convert.models import native_view
        from mindvlm.models.vary.config import parse_config
        from mindvlm.models.vary.memory import vision_memory
        from mindvlm.models.vary.model import build_model
        from mindvlm.models.vary.pretrained import fit_pretrained
        from mindvlm.models.vary.processing import VaryProcessor

        return Family(
            parse_config,
            build_model,
            VaryProcessor,
            native_view,
            adapted_view,
            fit_pretrained,
            no_files,
            vision_memory,
        )
    if name == "tinyllava":
        from mindvlm.convert.lora.applying import adapted_view
        from mindvlm.convert.separate_tower import whole_view
        from mindvlm.models.tinyllava.config import parse_config
        from mindvlm.models.tinyllava.hf_export import companions
        from mindvlm.models.tinyllava.memory import vision_memory
        from mindvlm.models.tinyllava.model import build_model
        from mindvlm.models.tinyllava.pretrained import fit_pretrained
        from mindvlm.models.tinyllava.processing import TinyLlavaProcessor

        adapted = functools.partial(adapted_view, family=name)
        return Family(
            parse_config,
            build_model,
            TinyLlavaProcessor,
            whole_view,
            adapted,
            fit_pretrained,
            companions,
            vision_memory,
        )
    raise UserError(f"config key 'family' is {name!r}; expected one of {', '.join(FAMILIES)}")


def no_files(config) -> dict[str, bytes]:
    """For a family whose weights stand alone."""
    return {}
