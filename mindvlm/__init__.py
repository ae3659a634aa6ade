"""Small vision-language models on MindSpore.

import mindvlm

model = mindvlm.load()
print(model.chat("Provide the ocr results of this image.", images="page.png"))
"""

from mindvlm.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "load"]


def load(config_path=None, **overrides):
    """Builds the model that a YAML describes and loads its weights; without a path, the shipped Vary-nano.

    See `mindvlm.api.load`, which this calls; MindSpore is imported only then.
    """
    from mindvlm.api import load as load_model

    return load_model(config_path, **overrides)
