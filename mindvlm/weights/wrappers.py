"""Removes what wrappers add to the names of a model's tensors.

Training programs save a model inside other modules: DataParallel and DeepSpeed (`module.`), torch.compile
(`_orig_mod.`), FSDP, a trainer's own class. All names then begin with the same words. PEFT and torch.compile also put
words inside names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mindvlm.checkpoint import SourceView, TensorSource
from mindvlm.core.errors import UserError
from mindvlm.weights.rules.findings import fold_name
from mindvlm.weights.rules.naming import best_fit
from mindvlm.weights.rules.table import RuleTable

_WORDS = frozenset({"module", "model", "base_model", "net", "network", "_orig_mod", "_forward_module"})
WORDS_INSIDE = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.|(?<=\.)module\."
)
"""Words that wrappers of a part of the model put inside names."""

_ADAPTER = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")
_UNMERGED = re.compile(r"\.(modules_to_save|original_module)\.")


class PlainNames(SourceView):
    """Another source under names without wrappers.

    Attributes:
        wrappers: the words that were removed, with their dots.
        names: name -> name in the source.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str], wrappers: Sequence[str]):
        super().__init__(source, {new: replace(source.infos[old], name=new) for new, old in names.items()})
        self.wrappers = tuple(wrappers)
        self.names = names

    @property
    def recipe(self) -> str:
        return self._source.recipe

    def read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._source.read_range(self.names[name], start, stop)


def without_wrappers(source: TensorSource, tables: Iterable[RuleTable]) -> TensorSource:
    """Returns a source under the names that its tensors have without wrappers; itself if there are none.

    A prefix is removed if all names have it and the tables know more names without it.

    Raises:
        UserError: the source is a LoRA adapter, or a model with an adapter that was not merged.
    """
    require_no_adapter(source)
    words = dict.fromkeys(word[0] for name in source.infos for word in WORDS_INSIDE.finditer(name))
    plain = {WORDS_INSIDE.sub("", name): name for name in source.infos}
    if len(plain) < len(source.infos):
        words, plain = {}, {name: name for name in source.infos}
    prefix = wrapper_prefix(plain, tables)
    if not prefix and not words:
        return source
    names = {new.removeprefix(prefix): old for new, old in plain.items()}
    return PlainNames(source, names, [*filter(None, [prefix]), *words])


def wrapper_prefix(names: Collection[str], tables: Iterable[RuleTable]) -> str:
    """Returns the shortest common prefix, with its dot, without which a table keeps most names; often empty.

    A word that no wrapper is known to add counts only if a table knows all names without it.
    """
    # one name per pattern decides as well as all
    shown = list({fold_name(name): name for name in names}.values())
    tables = list(tables)
    best, most = "", best_fit(tables, shown)
    if most.num_known == len(shown):
        return best
    common = _common_words(shown)
    for stop in range(1, len(common) + 1):
        prefix = ".".join(common[:stop]) + "."
        fit = best_fit(tables, [name.removeprefix(prefix) for name in shown])
        if fit.num_kept > most.num_kept and (fit.num_known == len(shown) or _WORDS.issuperset(common[:stop])):
            best, most = prefix, fit
    return best


def require_no_adapter(source: TensorSource) -> None:
    """Raises UserError if the source holds factors of a LoRA adapter."""
    factors = sum(bool(_ADAPTER.search(name)) for name in source.infos)
    if not factors:
        if name := next(filter(_UNMERGED.search, source.infos), None):
            raise UserError(
                f"{source.path}: holds a model inside PEFT, with an adapter that was not merged (tensor {name}); call "
                "PEFT's merge_and_unload() before saving"
            )
        return
    if 2 * factors >= len(source.infos):
        raise UserError(
            f"{source.path}: is a LoRA adapter, not a model; give the weights of its base, and this with --merge_lora "
            "or --adapter"
        )
    raise UserError(
        f"{source.path}: holds a model and {factors} factors of a LoRA adapter that was not merged into it; call "
        "PEFT's merge_and_unload() before saving, or give the base's weights and the adapter's folder with --merge_lora"
    )


def _common_words(names: Sequence[str]) -> list[str]:
    """Returns the words that all names begin with, without the last word of any."""
    split = [name.split(".")[:-1] for name in names]
    common = []
    for words in zip(*split, strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return common
