"""Parameters of a built model: names, freezing, and loading from a checkpoint."""

import functools

from mindspore import Parameter, nn

from mindvlm.checkpoint import RawTensor, TensorSource, storage_shape
from mindvlm.core.errors import UserError
from mindvlm.nn.linear import WeightCell
from mindvlm.nn.products import ReadRows, WeightProduct, load_parameter


def freeze(cell: nn.Cell) -> None:
    """Excludes a Cell's parameters from training, weight decay included."""
    for parameter in cell.get_parameters():
        parameter.requires_grad = False


def trains(cell: nn.Cell) -> bool:
    """Whether any parameter of the Cell is trained."""
    return any(parameter.requires_grad for parameter in cell.get_parameters())


def name_by_place(model: nn.Cell) -> None:
    """Renames every shared parameter after its first place in the model; MindSpore uses the last one."""
    for name, parameter in model.parameters_and_names():
        parameter.name = name


def stored_tensors(model: nn.Cell) -> dict[str, Parameter | WeightProduct]:
    """Maps the native name of every stored tensor to the Parameter or product it fills, in the order of the Cell."""
    targets: dict[str, Parameter | WeightProduct] = {}
    filled: set[int] = set()
    for place, cell in model.cells_and_names():
        prefix = f"{place}." if place else ""
        if isinstance(cell, WeightCell):
            targets[f"{prefix}weight"] = cell.product
            filled.update(map(id, cell.product.get_parameters()))
        for name, parameter in cell.parameters_and_names(expand=False):
            if id(parameter) not in filled:
                filled.add(id(parameter))
                targets[prefix + name] = parameter
    return targets


def parameter_shapes(model: nn.Cell) -> dict[str, tuple[int, ...]]:
    """Maps the native name of every stored tensor to its shape. Allocates no memory."""
    return {name: tuple(target.shape) for name, target in stored_tensors(model).items()}


def fill_parameters(model: nn.Cell, source: TensorSource, *, prefix: str = "") -> None:
    """Fills a model tensor by tensor; the peak memory is that of the parameters and one stored tensor.

    A float32 Parameter shares the memory of the float32 array that the source returns.

    Args:
        model: the model to fill.
        source: tensors under native names.
        prefix: prefix of the model's tensors in the source.

    Raises:
        UserError: a tensor has the wrong shape, or a value out of range of the model's dtype.
    """
    for name, target in stored_tensors(model).items():
        shape, expected = source.infos[prefix + name].shape, tuple(target.shape)
        if shape != expected:
            raise UserError(f"tensor {name} has shape {list(shape)}; the model expects {list(expected)}")
        load_target(target, functools.partial(read_rows, source, prefix + name))


def load_target(target: Parameter | WeightProduct, read: ReadRows) -> None:
    """Fills one entry of `stored_tensors`."""
    if isinstance(target, WeightProduct):
        target.load(read)
    else:
        load_parameter(target, read)


def read_rows(source: TensorSource, name: str, start: int, stop: int) -> RawTensor:
    """Returns rows [start, stop) of a tensor along its first axis, in the stored dtype."""
    info = source.infos[name]
    row_shape = info.shape[1:]
    row_size = info.num_elements // (info.shape[0] if info.shape else 1)
    data = source.read_range(name, start * row_size, stop * row_size)
    shape = (stop - start, *row_shape)
    return RawTensor(info.dtype, shape, data.reshape(storage_shape(info.dtype, shape)))
