"""The folder of everything that is kept between two starts."""

import os
from pathlib import Path

from mindvlm.core.errors import UserError


def cache_folder() -> Path:
    """Returns `$MINDVLM_CACHE`, else `$XDG_CACHE_HOME/mindvlm`, else `~/.cache/mindvlm`; it need not exist.

    Raises:
        UserError: there is no home folder.
    """
    if chosen := os.environ.get("MINDVLM_CACHE"):
        return Path(os.path.expanduser(chosen)).absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG specification ignores relative paths
    if shared.is_absolute():
        return shared / "mindvlm"
    try:
        return Path.home() / ".cache" / "mindvlm"
    except RuntimeError as error:
        raise UserError("no home folder to keep files in; set MINDVLM_CACHE to a folder") from error
