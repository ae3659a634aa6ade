"""Low-rank adapters on a model that is about to train."""

from mindspore import Tensor, nn

from mindvlm.core.errors import UserError
from mindvlm.nn.dropout import RowDropout, dropout_counter, new_counter
from mindvlm.nn.linear import Linear
from mindvlm.nn.lora import LoraConfig, adapt, first_values
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import ParallelModel, name_by_place
from mindvlm.parallel.sharding import ShardSpec
from mindvlm.training.trainable import found_names


def add_lora(model: nn.Cell, config: LoraConfig, *, seed: int, divided: ParallelModel, mesh: Mesh) -> None:
    """Adapts the Linears that `config.targets` names and fills their new parameters.

    Where outputs are divided over the tensor-parallel ranks, B is divided as they are and every rank has the whole A;
    where inputs are divided, A is and every rank has the whole B. The gradient of the whole one is a sum over the
    ranks.

    Args:
        model: its base is filled, and divided if it is to be.
        config: what is adapted, and how.
        seed: of A.
        divided: what tensor parallelism did to the model; the new parameters are added to it.
        mesh: of this process.

    Raises:
        UserError: a target finds no Linear, or a Linear's own parameters train as well.
    """
    linears = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, Linear)}
    targets = {name for pattern in config.targets for name in found_names("lora.targets", pattern, linears)}
    counter = dropout_counter(model)
    if counter is None:
        counter = new_counter()
    for index, name in enumerate(sorted(targets)):
        linear = linears[name]
        for parameter in linear.get_parameters():
            if parameter.requires_grad:
                raise UserError(
                    f"lora: {name} is among the targets and {parameter.name} trains whole (lora.modules_to_save or "
                    "train); take it out of one of them"
                )
        spec = divided.specs.get(f"{name}.weight")
        adapt(linear, config, dropout=build_dropout(linear, config.dropout, index, counter, spec))
        divide_factors(name, spec, divided, mesh)
        for parameter in (linear.lora_A, linear.lora_B):
            fill(parameter, divided.specs.get(parameter.name), seed)
    name_by_place(model)


def build_dropout(linear: Linear, p: float, index: int, counter, spec: ShardSpec | None) -> RowDropout | None:
    """The dropout before A; a rank with a part of the inputs drops what one with all of them would."""
    if p == 0:
        return None
    width, columns = linear.in_features, None
    if spec is not None and spec.axis == 1:
        width = linear.in_features * spec.count
        (columns,) = spec.ranges(width)
    return RowDropout(p, width, index=index, counter=counter, dtype=linear.weight.dtype, columns=columns)


def divide_factors(name: str, spec: ShardSpec | None, divided: ParallelModel, mesh: Mesh) -> None:
    """Notes how the factors of a Linear are divided, and which gradient is a sum over the ranks."""
    if spec is None or mesh.tp == 1:
        return
    part, whole = ("lora_B", "lora_A") if spec.axis == 0 else ("lora_A", "lora_B")
    divided.specs[f"{name}.{part}"] = spec
    divided.partial.add(f"{name}.{whole}")


def fill(parameter, spec: ShardSpec | None, seed: int) -> None:
    shape = tuple(parameter.shape)
    values = first_values(parameter.name, spec.full_shape(shape) if spec else shape, seed)
    parameter.set_data(Tensor(spec.take(values) if spec else values, parameter.dtype))
