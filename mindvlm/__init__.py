"""Small vision-language models on MindSpore.

import mindvlm

model = mindvlm.load()
print(model.chat("Provide the ocr results of this image.", images="page.png"))
"""

import os

from mindvlm.core.errors import UserError
from mindvlm.core.interruption import uninterrupted

# Both are read when MindSpore is imported; a user's own choice stays. Errors only: its warnings are for its developers.
os.environ.setdefault("GLOG_v", "3")
# Threads that wait must not spin: MindSpore's own threads need the cores between two parallel kernels.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
__all__ = ["UserError", "load"]


def load(config_path=None, **overrides):
    """Builds the model that a YAML describes and loads its weights; without a path, the shipped Vary-nano.

    See `mindvlm.api.load`, which this calls; MindSpore is imported only then.
    """
    # MindSpore ends the process with a traceback when its import is interrupted
    with uninterrupted():
        from mindvlm.api import load as load_model

    return load_model(config_path, **overrides)
