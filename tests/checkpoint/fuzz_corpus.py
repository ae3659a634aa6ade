"""Small valid files of every format, the starting points of the fuzzer."""

import argparse
from collections import OrderedDict, defaultdict
from pathlib import Path

import mindspore
import numpy as np
import torch
from safetensors.torch import save_file

from mindvlm.checkpoint import open_checkpoint, write_checkpoint
from tests.checkpoint.samples import DTYPES, random_tensor


def write_corpus(folder: Path) -> None:
    """Write one file per format and dialect into `folder`."""
    few = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3, dtype=torch.bfloat16)}
    every = {name: random_tensor(name, (2, 3)) for name in DTYPES}
    base = torch.arange(24.0).reshape(4, 6)
    views = {"t": base.T, "s": base[1:, ::2], "e": base[0, :1].expand(3, 2), "p": torch.nn.Parameter(base)}
    wrapped = {"epoch": 3, "lr": 1e-3, "state_dict": OrderedDict(few)}
    torch.save(torch.nn.Linear(3, 2).state_dict(), folder / "module.bin")
    torch.save(every, folder / "every.bin")
    torch.save(views, folder / "views.pt")
    torch.save(wrapped, folder / "wrapped.pth", pickle_protocol=4)
    settings = argparse.Namespace(dtype=torch.bfloat16, names={"a"}, path=Path("x"), table=defaultdict(list, a=[1]))
    state = {"module": few, "shapes": [base.shape], "args": settings, 0.5: np.arange(3)}
    for protocol in (2, 4):
        torch.save(state, folder / f"state{protocol}.pt", pickle_protocol=protocol)
    torch.save(views, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(every, folder / "legacy_every.bin", _use_new_zipfile_serialization=False)
    save_file(every, folder / "every.safetensors", metadata={"format": "pt"})
    save_file({**few, "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0)}, folder / "few.safetensors")
    with open_checkpoint(folder / "every.safetensors") as source:
        write_checkpoint(folder / "every.ckpt", source, metadata={"note": "text"})
    with open_checkpoint(folder / "few.safetensors") as source:
        write_checkpoint(folder / "few.ckpt", source)
    entries = [{"name": name, "data": mindspore.Tensor(t.float().numpy())} for name, t in few.items()]
    mindspore.save_checkpoint(entries, str(folder / "mindspore.ckpt"), append_dict={"epoch": 3}, crc_check=True)
