"""File formats of checkpoints, independent of models: safetensors, MindSpore `.ckpt`, torch `.bin/.pt`, shards.

Readers list names, dtypes and shapes from headers and read one tensor, or a part of one, at a time. Torch pickles are
read without executing them, and written without torch. Writers stream, and rename a file to its final name only when it
is complete. No reader or writer relies on the library `safetensors`: it accepts a name that occurs twice, has no numpy
form of bfloat16, maps whole files into resident memory, and writes only what is in memory.
"""

from mindvlm.checkpoint.atomic import PendingFiles, atomic_file, check_writable, staging_folder
from mindvlm.checkpoint.dtypes import DTYPES, FLOAT_DTYPES
from mindvlm.checkpoint.opening import holds_weights, open_checkpoint
from mindvlm.checkpoint.safetensors_format import write_safetensors
from mindvlm.checkpoint.source import (
    CastSource,
    MemorySource,
    RawTensor,
    SourceView,
    TensorInfo,
    TensorSource,
    storage_shape,
)
from mindvlm.checkpoint.stored import Checkpoint, NonFiniteError
from mindvlm.checkpoint.writing import (
    Target,
    bytes_bar,
    check_ending,
    check_target,
    parse_size,
    plan_target,
    write_checkpoint,
)

__all__ = [
    "DTYPES",
    "FLOAT_DTYPES",
    "CastSource",
    "Checkpoint",
    "MemorySource",
    "NonFiniteError",
    "PendingFiles",
    "RawTensor",
    "SourceView",
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
    "storage_shape",
    "write_checkpoint",
    "write_safetensors",
]
