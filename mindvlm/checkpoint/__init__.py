"""File formats of checkpoints, and nothing about models: safetensors, MindSpore `.ckpt`, torch `.bin/.pt`, shards.

Readers list names, dtypes and shapes from headers and hand out one tensor, or a part of one, at a time; torch pickles
are read without executing them. Writers stream and leave a file under its name only when it is complete.
"""

from mindvlm.checkpoint.atomic import atomic_file, check_writable
from mindvlm.checkpoint.dtypes import DTYPES, FLOAT_DTYPES
from mindvlm.checkpoint.files import check_ending, open_checkpoint, write_checkpoint
from mindvlm.checkpoint.mindspore_format import write_mindspore
from mindvlm.checkpoint.safetensors_format import write_safetensors
from mindvlm.checkpoint.source import CastSource, MemorySource, RawTensor, TensorInfo, TensorSource
from mindvlm.checkpoint.stored import Checkpoint

__all__ = [
    "DTYPES",
    "FLOAT_DTYPES",
    "CastSource",
    "Checkpoint",
    "MemorySource",
    "RawTensor",
    "TensorInfo",
    "TensorSource",
    "atomic_file",
    "check_ending",
    "check_writable",
    "open_checkpoint",
    "write_checkpoint",
    "write_mindspore",
    "write_safetensors",
]
