"""Loss, gradients and optimizer step of a case, by the production training step."""

import re

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindvlm.generation.graphs import ScoreGraph
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.nn.splice import splice_sources
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep
from tests.golden_readers.case import Case
from tests.golden_readers.loaded import LoadedVary
from tests.golden_readers.optimizer_statement import OptimizerStatement, read_statement
from tests.golden_readers.prompts import Prompt
from tests.golden_readers.readme_rules import gradient_floor
from tests.golden_readers.report import TRAINING_BOUND, Report

KNOWN_CLASSES = {"LayerNorm", "LayerNorm2d", "RMSNorm", "Embedding", "Linear"}


class MergedLoss(nn.Cell):
    """Computes the loss from merged embeddings."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, embeds, labels, inv_freq):
        loss, num_labels = self.model.text_loss(embeds, labels, inv_freq)
        return loss / num_labels


class TextLoss(nn.Cell):
    """Computes the summed loss of a batch without images, and the number of labels."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, input_ids, labels, inv_freq):
        return self.model.text_loss(self.model.language_model.embed_tokens(input_ids), labels, inv_freq)


class LossAndGradients(nn.Cell):
    """Computes the loss and the gradients, in the order of the trainable parameters."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model
        self.parameters = ms.ParameterTuple(model.trainable_params())
        self.loss_and_gradients = ops.value_and_grad(MeanLoss(model), None, self.parameters)

    def construct(self, *batch):
        return self.loss_and_gradients(*batch)


class MeanLoss(nn.Cell):
    """Computes the mean over labels, given a Cell that returns the summed loss and the number of labels."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, *batch):
        loss, num_labels = self.model(*batch)
        return loss / num_labels


def eval_loss(loaded: LoadedVary, embeds: Tensor, labels: np.ndarray, inv_freq: Tensor) -> np.ndarray:
    """Returns the loss in inference mode."""
    return MergedLoss(loaded.model)(embeds, Tensor(labels.astype(np.int32)), inv_freq).asnumpy()


def compare_training(case: Case, report: Report, loaded: LoadedVary, prompts: list[Prompt], pictures) -> None:
    """Compares `[<name>_]train_logits`, `loss`, `grad:*` and `after:*`; changes the model's parameters."""
    trained = [prompt for prompt in prompts if prompt.labels is not None]
    wanted = [name for name in case.outputs if re.fullmatch(r"(\w+_)?train_logits|loss|(grad|after):.*", name)]
    if not wanted:
        return
    if len(trained) != 1:
        for name in wanted:
            report.skip(name, f"{len(trained)} prompts have labels; which one was trained on is not known")
        return
    (prompt,) = trained
    model, config = loaded.model.set_train(True), loaded.config.language_model
    # training never extends the context: no dynamic NTK
    inv_freq = Tensor(inverse_frequencies(config.head_dim, config.rope_theta))
    labels = Tensor(prompt.labels.astype(np.int32))
    ids = Tensor(prompt.input_ids)
    if prompt.images:
        sources = splice_sources(
            prompt.input_ids, len(prompt.images), loaded.config.image_token_len, case.config["im_patch_token"]
        )
        pixels = [Tensor(branch[prompt.images]) for branch in pictures.pixels]
        module, batch = model, (ids, labels, inv_freq, *pixels, Tensor(sources))
    else:
        module, batch = TextLoss(model).set_train(True), (ids, labels, inv_freq)
        compare_train_logits(case, report, model, prompt, inv_freq)
    if any(name == "loss" or name.startswith("grad:") for name in wanted):
        compare_gradients(case, report, loaded, module, batch)
    if any(name.startswith("after:") for name in wanted):
        compare_step(case, report, loaded, module, batch)
    model.set_train(False)


def compare_train_logits(case: Case, report: Report, model, prompt: Prompt, inv_freq: Tensor) -> None:
    for name in case.outputs:
        if re.fullmatch(r"(\w+_)?train_logits", name):
            embeds = model.language_model.embed_tokens(Tensor(prompt.input_ids))
            logits = ScoreGraph(model.language_model).set_train(True)(embeds, inv_freq)
            report.close(name, logits.asnumpy() * prompt.mask[..., None])


def compare_gradients(case: Case, report: Report, loaded: LoadedVary, module: nn.Cell, batch: tuple) -> None:
    """Returns gradients by their original names; a frozen parameter has gradient 0."""
    graph = LossAndGradients(module).set_train(True)
    loss, gradients = graph(*batch)
    if "loss" in case.outputs:
        report.close("loss", loss.asnumpy())
    names = {id(parameter): name for name, parameter in loaded.parameters.items()}
    arrays = {name: np.zeros(p.shape, np.float32) for name, p in loaded.parameters.items()}
    for parameter, gradient in zip(graph.parameters, gradients, strict=True):
        arrays[names[id(parameter)]] = gradient.asnumpy()
    compare_parameters(report, loaded, arrays, "grad:")


def compare_step(case: Case, report: Report, loaded: LoadedVary, module: nn.Cell, batch: tuple) -> None:
    """Compares the parameters after the step that the README states."""
    try:
        statement = read_statement(case.readme, case.family_readme)
        config = optimizer_config(statement, loaded)
    except ValueError as error:
        for name in case.outputs:
            if name.startswith("after:"):
                report.skip(name, str(error))
        return
    step = TrainStep(module.set_train(True), config)
    for _ in range(statement.num_steps):
        step(Tensor(statement.learning_rate, ms.float32), *batch)
    arrays = {name: parameter.asnumpy() for name, parameter in loaded.parameters.items()}
    compare_parameters(report, loaded, arrays, "after:", floor=gradient_floor(case))


def compare_parameters(report: Report, loaded: LoadedVary, arrays: dict, prefix: str, *, floor: float = 0.0) -> None:
    """Compares all recorded arrays with that prefix; with a floor, only where the recorded gradient exceeds it."""
    original = loaded.under_original_names(arrays)
    for name, recorded in report.recorded.items():
        if not name.startswith(prefix):
            continue
        parameter = name.removeprefix(prefix)
        if parameter not in original:
            report.fail(name, "the model has no such parameter", bound=TRAINING_BOUND)
            continue
        gradient = report.recorded.get(f"grad:{parameter}")
        at, note = None, ""
        if floor and gradient is not None and gradient.shape == recorded.shape:
            at, note = np.abs(gradient) > floor, f"|grad| > {floor:g}"
        report.close(name, original[parameter], bound=TRAINING_BOUND, at=at, note=note)


def optimizer_config(statement: OptimizerStatement, loaded: LoadedVary) -> OptimizerConfig:
    """Returns the production optimizer with the stated settings and exactly the stated exceptions from decay.

    Raises:
        ValueError: a stated parameter class has no counterpart here.
    """
    unknown = set(statement.exempt_classes) - KNOWN_CLASSES
    if unknown:
        raise ValueError(f"the optimizer's parameter groups name a class unknown here: {unknown.pop()}")
    exempt = [
        f"{cell_name}.{name}"
        for cell_name, cell in loaded.model.cells_and_names()
        if original_class(cell_name, cell) in statement.exempt_classes
        for name, _ in cell.parameters_and_names(expand=False)
    ]
    exempt += [name for name in loaded.parameters if any(part in name for part in statement.exempt_names)]
    return OptimizerConfig(
        learning_rate=statement.learning_rate,
        betas=statement.betas,
        eps=statement.eps,
        weight_decay=statement.weight_decay,
        bias_correction=statement.bias_correction,
        max_grad_norm=statement.max_grad_norm,
        no_decay=[rf"(^|\.){re.escape(name)}$" for name in exempt],
    )


def original_class(name: str, cell: nn.Cell) -> str:
    """Returns the original program's class for a Cell; SAM's neck uses its own LayerNorm2d."""
    kind = type(cell).__name__
    return "LayerNorm2d" if kind == "LayerNorm" and ".neck." in name else kind
