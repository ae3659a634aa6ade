"""Opens the loader of a job's data section."""

from collections.abc import Callable
from pathlib import Path

from mindvlm.training.datasets.config import DatasetsConfig, make_collator, sample_options
from mindvlm.training.datasets.loader import BatchLoader, Share
from mindvlm.training.datasets.skip_log import SkipLog


def open_loader(
    config: DatasetsConfig,
    make_processor: Callable,
    *,
    seed: int,
    skip_list: str | Path | None = None,
    state: dict | None = None,
    **share: int,
) -> BatchLoader:
    """Returns the loader of one replica; `share` as of `Share`, `skip_list` a file of JSON lines."""
    options = sample_options(config, make_processor, seed=seed, num_shards=share.get("num_shards", 1))
    collator = make_collator(config, make_processor())
    return BatchLoader(options, collator, config, Share(**share), skip_log=SkipLog(skip_list), state=state)
