"""Flat buffers of many parameters, so that one collective handles all of them."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.parallel.mesh import Mesh

MAX_BUCKET_ELEMENTS = 2**20


class Bucket(nn.Cell):
    """Several parameters as one flat float32 tensor, padded so that every replica has an equal chunk.

    Attributes:
        indices: positions of the bucket's parameters in the list of all.
        decays: whether they have weight decay.
        learning_rate_factor: multiplies their learning rate.
        is_divided: whether they are divided over the tensor-parallel ranks.
        sizes: number of elements of each parameter (of the rank's part of it), in order.
        chunk_size: number of elements of a replica's chunk.
    """

    def __init__(
        self,
        indices: list[int],
        parameters: list[Parameter],
        *,
        decays: bool,
        learning_rate_factor: float,
        is_divided: bool,
        mesh: Mesh,
    ):
        super().__init__(auto_prefix=False)
        self.indices = tuple(indices)
        self.decays = decays
        self.learning_rate_factor = learning_rate_factor
        self.is_divided = is_divided
        self.dp = mesh.dp
        self.shapes = tuple(tuple(parameters[i].shape) for i in indices)
        self.dtypes = tuple(parameters[i].dtype for i in indices)
        self.sizes = tuple(int(np.prod(shape)) for shape in self.shapes)
        self.chunk_size = -(-sum(self.sizes) // mesh.dp)
        self.padding = self.chunk_size * mesh.dp - sum(self.sizes)
        self.splits = self.sizes + ((self.padding,) if self.padding else ())
        self.own_row = Tensor([mesh.dp_rank], ms.int32)

    def flatten(self, tensors):
        """One tensor for every parameter of the model -> the bucket's as one, (dp * chunk_size,) float32."""
        parts = ()
        for i in self.indices:
            parts = parts + (tensors[i].reshape((-1,)).astype(ms.float32),)
        if self.padding:
            parts = parts + (ops.zeros((self.padding,), ms.float32),)
        return parts[0] if len(parts) == 1 else ops.concat(parts, 0)

    def own_chunk(self, flat):
        """(dp * chunk_size,) -> this replica's (chunk_size,)."""
        return ops.gather(flat.reshape((self.dp, self.chunk_size)), self.own_row, 0).reshape((self.chunk_size,))

    def unflatten(self, flat):
        """(dp * chunk_size,) -> one tensor for each of the bucket's parameters, in its shape and dtype."""
        parts = (flat,) if len(self.splits) == 1 else ops.split(flat, self.splits, 0)
        tensors = ()
        for i in range(len(self.shapes)):
            tensors = tensors + (parts[i].reshape(self.shapes[i]).astype(self.dtypes[i]),)
        return tensors


def make_buckets(
    parameters: list[Parameter],
    *,
    decays: list[bool],
    is_divided: list[bool],
    mesh: Mesh,
    learning_rate_factors: list[float] | None = None,
    max_elements: int | None = None,
) -> nn.CellList:
    """Groups the parameters, in order, into buckets of one kind each; never splits a parameter.

    Args:
        parameters: the trained ones, the rank's part of divided ones.
        decays: whether each has weight decay.
        is_divided: whether each is divided over the tensor-parallel ranks.
        mesh: this process's mesh.
        learning_rate_factors: multiplies the learning rate of each; 1 if not given.
        max_elements: size limit of a bucket with several parameters; default `MAX_BUCKET_ELEMENTS`.
    """
    max_elements = max_elements or MAX_BUCKET_ELEMENTS
    factors = learning_rate_factors or [1.0] * len(parameters)
    open_buckets: dict[tuple[bool, bool, float], list[int]] = {}
    done: list[list[int]] = []
    for i, parameter in enumerate(parameters):
        kind = (decays[i], is_divided[i], factors[i])
        members = open_buckets.setdefault(kind, [])
        if members and sum(parameters[j].size for j in members) + parameter.size > max_elements:
            done.append(members)
            members = open_buckets[kind] = []
        members.append(i)
    done.extend(open_buckets.values())
    done.sort(key=lambda members: members[0])
    buckets = [
        Bucket(
            members,
            parameters,
            decays=decays[members[0]],
            learning_rate_factor=factors[members[0]],
            is_divided=is_divided[members[0]],
            mesh=mesh,
        )
        for members in done
    ]
    return nn.CellList(buckets, auto_prefix=False)
