"""Small vision-language models on MindSpore.

import mindvlm

model = mindvlm.load()
print(model.chat("Provide the ocr results of this image.", images="page.png"))
"""

import os

from mindvlm.core.errors import UserError
from mindvlm.core.interruption import uninterrupted

# MindSpore reads both variables when it is imported; values that are already set stay. Log level 3 is errors only:
# MindSpore's warnings address its developers.
os.environ.setdefault("GLOG_v", "3")
# Waiting OpenMP threads must not spin: MindSpore's own threads need the cores between two parallel kernels.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
__all__ = ["Conversation", "UserError", "load"]


def __getattr__(name: str):
    """Imports `Conversation`, and MindSpore with it, when it is asked for."""
    if name != "Conversation":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with uninterrupted():
        from mindvlm.sessions.conversation import Conversation

    return Conversation


def load(config_path=None, **overrides):
    """Builds a model from a YAML or a checkpoint folder and loads its weights.

    Without a path, loads the shipped Vary-nano. Calls `mindvlm.api.load`; MindSpore is imported by the first call.
    """
    # MindSpore ends the process with a traceback when its import is interrupted
    with uninterrupted():
        from mindvlm.api import load as load_model

    return load_model(config_path, **overrides)
