"""Parameters side by side in flat buffers, so that one collective serves many."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.parallel.mesh import Mesh

MAX_BUCKET_ELEMENTS = 2**20


class Bucket(nn.Cell):
    """Some of the model's parameters as one flat float32 tensor, padded so that every replica has an equal chunk.

    Attributes:
        indices: places of the bucket's parameters in the list of all.
        decays: whether they have weight decay.
        learning_rate_factor: what their learning rate is multiplied by.
        is_divided: whether they are divided over the tensor-parallel ranks.
        sizes: elements of each parameter (of the rank's part of it), in order.
        chunk_size: elements that each replica keeps of it.
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
        """A tuple with a tensor for every parameter of the model -> the bucket's, (dp * chunk_size,) float32."""
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
        """(dp * chunk_size,) -> a tensor for each of the bucket's parameters, in their shapes and dtypes."""
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
    """Divides the parameters, in their order, into buckets of one kind each; a parameter is never cut.

    Args:
        parameters: those that train, the rank's part where they are divided.
        decays: whether each has weight decay.
        is_divided: whether each is divided over the tensor-parallel ranks.
        mesh: of this process.
        learning_rate_factors: what the learning rate of each is multiplied by; 1 if not given.
        max_elements: of a bucket with more than one parameter; if not given, `MAX_BUCKET_ELEMENTS`.
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
    cells = nn.CellList(buckets, auto_prefix=False)
    return cells
