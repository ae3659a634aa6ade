"""File formats of checkpoints, and nothing about models: safetensors, MindSpore `.ckpt`, torch `.bin/.pt`, shards.

Readers list names, dtypes and shapes from headers and hand out one tensor, or a part of one, at a time; torch pickles
are read without executing them, and written without torch. Writers stream and leave a file under its name only when it
is complete.
"""

from mindvlm.checkpoint.atomic import PendingFiles, atomic_file, check_writable, staging_folder
from mindvlm.checkpoint.dtypes import DTYPES, FLOAT_DTYPES
from mindvlm.checkpoint.files import open_checkpoint
from mindvlm.checkpoint.folder import holds_weights
from mindvlm.checkpoint.progress import bytes_bar
from mindvlm.checkpoint.safetensors_format import write_safetensors
from mindvlm.checkpoint.source import CastSource, MemorySource, RawTensor, TensorInfo, TensorSource
from mindvlm.checkpoint.stored import Checkpoint
from mindvlm.checkpoint.targets import Target, check_ending, check_target, parse_size, plan_target
from mindvlm.checkpoint.writing import write_checkpoint

__all__ = [
    "DTYPES",
    "FLOAT_DTYPES",
    "CastSource",
    "Checkpoint",
    "MemorySource",
    "PendingFiles",
    "RawTensor",
    "Target",
    "TensorInfo",
    "TensorSource",
    "atomic_file",
    "bytes_bar",
    "check_ending",
    "check_target",
    "check_writable",
    "holds_weights",
    "open_checkpoint",
    "parse_size",
    "plan_target",
    "staging_folder",
    "write_checkpoint",
    "write_safetensors",
]
