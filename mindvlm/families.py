"""What each model family is made of. A new family adds its row here."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from mindvlm.core.errors import UserError

FAMILIES = ("vary", "tinyllava")


@dataclass(frozen=True)
class Family:
    """The nine things that the rest of the library needs from a family.

    Attributes:
        parse_config: mapping and path of a YAML -> the family's typed run config.
        model: builds the model Cell, called with (config.model, dtype).
        processor: from files and text to model inputs, called with (config.processor).
        native_view: a checkpoint under the model's own names, see `mindvlm.weights.recognise.native_view`; of a family
            whose config has a `vision_tower`, `tower` is the checkpoint of that.
        adapted_view: the tensors of such a checkpoint with an adapter merged in, see
            `mindvlm.weights.lora.applying.adapted_view`.
        make_fit: called with the run config, gives what makes of a pre-trained tensor the one that a training starts
            with: the same array, or another of the model's shape. That is called with (name, array, shapes, seed=...,
            description=...): the shapes of all tensors of the model by name, and the config.json beside the checkpoint
            or None.
        companions: files by name that stand beside trained weights, called with the run config.
        write_trained_parts: writes parts of trained weights for others, see `mindvlm.models.tinyllava.trained_parts`.
        vision_memory: what its towers take for one picture, a `VisionMemory`, called with (config.model, item_size).
    """

    parse_config: Callable
    model: Callable
    processor: type
    native_view: Callable
    adapted_view: Callable
    make_fit: Callable
    companions: Callable
    write_trained_parts: Callable
    vision_memory: Callable


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        UserError: there is none; the message lists those that are.
    """
    if name == "vary":
        from mindvlm.models.vary.config import parse_config
        from mindvlm.models.vary.memory import vision_memory
        from mindvlm.models.vary.model import build_model
        from mindvlm.models.vary.pretrained import fit_pretrained
        from mindvlm.models.vary.processing import VaryProcessor
        from mindvlm.weights.lora.applying import adapted_view
        from mindvlm.weights.recognise import native_view

        return Family(
            parse_config=parse_config,
            model=build_model,
            processor=VaryProcessor,
            native_view=native_view,
            adapted_view=adapted_view,
            make_fit=functools.partial(same_for_all, fit_pretrained),
            companions=no_files,
            write_trained_parts=no_parts,
            vision_memory=vision_memory,
        )
    if name == "tinyllava":
        from mindvlm.models.tinyllava.config import parse_config
        from mindvlm.models.tinyllava.hf_export import companions
        from mindvlm.models.tinyllava.memory import vision_memory
        from mindvlm.models.tinyllava.model import build_model
        from mindvlm.models.tinyllava.pretrained import make_fit
        from mindvlm.models.tinyllava.processing import TinyLlavaProcessor
        from mindvlm.models.tinyllava.separate_tower import whole_view
        from mindvlm.models.tinyllava.trained_parts import write_trained_parts
        from mindvlm.weights.lora.applying import adapted_view

        return Family(
            parse_config=parse_config,
            model=build_model,
            processor=TinyLlavaProcessor,
            native_view=whole_view,
            adapted_view=functools.partial(adapted_view, family=name),
            make_fit=make_fit,
            companions=companions,
            write_trained_parts=write_trained_parts,
            vision_memory=vision_memory,
        )
    raise UserError(f"config key 'family' is {name!r}; expected one of {', '.join(FAMILIES)}")


def same_for_all(function: Callable, config) -> Callable:
    """What does not depend on the run config."""
    return function


def no_files(config) -> dict[str, bytes]:
    """For a family whose weights stand alone."""
    return {}


def no_parts(folder, trained) -> None:
    """For a family of which other programs know no parts."""
