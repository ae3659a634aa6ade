"""Adds low-rank adapters to a model before training."""

from mindspore import Tensor

from mindvlm.core.errors import UserError
from mindvlm.nn.dropout import RowDropout, dropout_counter, new_counter
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.nn.linear import Linear
from mindvlm.nn.lora import LoraConfig, adapt, first_values
from mindvlm.nn.parameters import name_by_place
from mindvlm.parallel.mesh import Mesh
from mindvlm.parallel.plan import ParallelModel
from mindvlm.parallel.sharding import ShardSpec
from mindvlm.training.trainable import found_names, untrainable


def add_lora(
    model: ImageTextModel, config: LoraConfig, *, seed: int | None, divided: ParallelModel, mesh: Mesh
) -> None:
    """Adapts the Linears that match `config.targets` and initializes the new parameters.

    Linears whose weights cannot train get no adapter, see `untrainable`.

    If tensor parallelism divides the outputs of a Linear, it also divides B, and every rank has the whole A. If it
    divides the inputs, it also divides A, and every rank has the whole B. The gradient of the whole factor is a sum
    over the ranks.

    Args:
        model: the model, with its base filled and divided.
        config: targets, rank, scale and dropout.
        seed: seed of A; None leaves the new parameters unfilled.
        divided: the parts of the divided model; the new parameters are added to it.
        mesh: the mesh of this process.

    Raises:
        UserError: a target matches no Linear that can train, or the weights of an adapted Linear also train.
    """
    linears = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, Linear)}
    never = untrainable(model)
    targets = set()
    for pattern in config.targets:
        found = found_names("lora.targets", pattern, linears)
        names = [name for name in found if f"{name}.weight" not in never]
        if not names:
            raise UserError(
                f"lora.targets: {pattern!r} matches only layers that cannot train, such as {found[0]} "
                f"({never[f'{found[0]}.weight']}); remove it"
            )
        targets.update(names)
    counter = dropout_counter(model)
    if counter is None:
        counter = new_counter()
    for index, name in enumerate(sorted(targets)):
        linear = linears[name]
        for parameter in linear.get_parameters():
            if parameter.requires_grad:
                raise UserError(
                    f"lora: {name} is among the targets and {parameter.name} trains whole (lora.modules_to_save or "
                    "train); remove it from one of them"
                )
        spec = divided.specs.get(f"{name}.weight")
        adapt(linear, config, dropout=build_dropout(linear, config.dropout, index, counter, spec))
        divide_factors(name, spec, divided, mesh)
        for factor in ("lora_A", "lora_B") if seed is not None else ():
            full_name = f"{name}.{factor}"
            fill(getattr(linear, factor), full_name, divided.specs.get(full_name), seed)
    name_by_place(model)


def build_dropout(linear: Linear, p: float, index: int, counter, spec: ShardSpec | None) -> RowDropout | None:
    """Returns the dropout before A; a rank with a part of the inputs drops the same elements as one with all inputs."""
    if p == 0:
        return None
    width, columns = linear.in_features, None
    if spec is not None and spec.axis == 1:
        width = linear.in_features * spec.count
        (columns,) = spec.ranges(width)
    return RowDropout(p, width, index=index, counter=counter, dtype=linear.product.dtype, columns=columns)


def divide_factors(name: str, spec: ShardSpec | None, divided: ParallelModel, mesh: Mesh) -> None:
    """Records how the factors of a Linear are divided, and which gradient is a sum over the ranks."""
    if spec is None or mesh.tp == 1:
        return
    part, whole = ("lora_B", "lora_A") if spec.axis == 0 else ("lora_A", "lora_B")
    divided.specs[f"{name}.{part}"] = spec
    divided.partial.add(f"{name}.{whole}")


def fill(parameter, name: str, spec: ShardSpec | None, seed: int) -> None:
    shape = tuple(parameter.shape)
    values = first_values(name, spec.full_shape(shape) if spec else shape, seed)
    parameter.set_data(Tensor(spec.take(values) if spec else values, parameter.dtype))
