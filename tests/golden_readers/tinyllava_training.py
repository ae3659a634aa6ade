"""The training steps of a TinyLLaVA case: the changes that each policy makes, by the production step."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindvlm.models.tinyllava.model_config import TuneConfig
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.nn.splice import splice_sources
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.step import TrainStep
from tests.golden_readers.case import Case
from tests.golden_readers.readme_rules import gradient_floor
from tests.golden_readers.report import TRAINING_BOUND, Report
from tests.golden_readers.tinyllava_loaded import LoadedTinyLlava
from tests.golden_readers.tinyllava_scenario import IGNORED, PLACEHOLDER, Scenario

# what the official trainer exempts from decay: biases and norms of any kind
NO_DECAY = [r"bias$", r"(norm[^.]*|feed_forward\.0)\.weight$"]


def tuned_parts(options: dict, num_tower_layers: int) -> TuneConfig:
    """Returns the production config of an official policy.

    A first layer beyond the tower's last one, 100 in the official program's defaults, freezes the tower.
    """
    policy = options["policy"]
    if policy == "pretrain":
        return TuneConfig(language_model=False)
    if policy == "finetune":
        return TuneConfig()
    first = options["tune_vit_from_layer"]
    return TuneConfig(vision_tower_from_layer=first if first < num_tower_layers else None)


def optimizer_config(options: dict) -> OptimizerConfig:
    factors = {}
    if "mm_projector_lr" in options:
        factors = {r"^mm_projector\.": options["mm_projector_lr"] / options["lr"]}
    return OptimizerConfig(
        learning_rate=options["lr"],
        betas=[options["beta1"], options["beta2"]],
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        max_grad_norm=None,
        no_decay=NO_DECAY,
        learning_rate_factors=factors,
    )


def compare_training(case: Case, report: Report, scenarios: dict[str, Scenario]) -> None:
    """Compares every entry `optimizer` of scenarios.json: groups, losses, gradients and parameters after one step."""
    num_tower_layers = LoadedTinyLlava(case).config.vision_tower.num_hidden_layers
    for tag, options in case.documents["scenarios.json"].get("optimizer", {}).items():
        loaded = LoadedTinyLlava(case, tune=tuned_parts(options, num_tower_layers))
        config = optimizer_config(options)
        compare_groups(report, tag, options, loaded, config)
        batch = batch_of(scenarios[options["inputs"]], loaded)
        step = TrainStep(loaded.model.set_train(True), config, accumulates=True)
        rate = Tensor(options["lr"], ms.float32)
        losses = []
        for number in range(options["steps"] + 1):
            step.accumulate(*batch)
            if number == 0:
                compare_arrays(None, report, tag, "grad", loaded, gradients(loaded, step))
            result = step.update(rate)
            losses.append(float(result.loss))
            if number == 0:
                report.close(f"{tag}.grad_norm", result.norm.asnumpy(), bound=TRAINING_BOUND)
                compare_arrays(case, report, tag, "after1", loaded, values_of(loaded))
        report.close(f"{tag}.losses", np.array(losses, np.float32), bound=TRAINING_BOUND)


def batch_of(scenario: Scenario, loaded: LoadedTinyLlava) -> tuple[Tensor, ...]:
    """Returns the arguments of the model for a scenario."""
    ids, labels = scenario.padded(scenario.rows, 0), scenario.padded(scenario.labels, IGNORED)
    decoder = loaded.config.language_model
    sources = splice_sources(ids, len(scenario.used), loaded.config.image_token_len, PLACEHOLDER)
    inv_freq = inverse_frequencies(decoder.rotary_dim, decoder.rope_theta)
    pixels = scenario.pixels[scenario.used]
    return Tensor(ids), Tensor(labels), Tensor(inv_freq), Tensor(pixels), Tensor(sources)


def compare_groups(report: Report, tag: str, options: dict, loaded: LoadedTinyLlava, config: OptimizerConfig) -> None:
    """Compares the trained parameters, their learning rates and their decay.

    The official groups also contain parameters that receive no gradient; these do not change.
    """
    ours = {}
    for parameter in loaded.model.trainable_params():
        rate = options["lr"] * config.learning_rate_factor(parameter.name)
        ours[loaded.original_name(parameter.name)] = (round(rate, 12), config.decays(parameter.name))
    unused = {
        loaded.original_name(parameter.name)
        for cell in loaded.model.vision_tower.unused_cells()
        for parameter in cell.get_parameters()
    }
    theirs = {
        name: (round(group["lr"], 12), not group["name"].startswith("no_decay"))
        for group in options["groups"]
        for name in group["params"]
        if name not in unused
    }
    names = sorted(ours.keys() | theirs.keys())
    report.same(f"{tag} groups", [(name, ours.get(name), theirs.get(name)) for name in names])


def gradients(loaded: LoadedTinyLlava, step: TrainStep) -> dict[str, np.ndarray]:
    """Returns the gradients of the mean loss by name, from the accumulation buffers; 0 for frozen parameters."""
    passes = step.accumulate_graph
    arrays = {name: np.zeros(p.shape, np.float32) for name, p in loaded.parameters.items()}
    for buffer in passes.buffers:
        arrays[buffer.name.split("gradient.", 1)[1]] = buffer.asnumpy() / passes.num_labels.asnumpy()
    return arrays


def values_of(loaded: LoadedTinyLlava) -> dict[str, np.ndarray]:
    return {name: parameter.asnumpy() for name, parameter in loaded.parameters.items()}


def compare_arrays(
    case: Case | None, report: Report, tag: str, kind: str, loaded: LoadedTinyLlava, arrays: dict[str, np.ndarray]
) -> None:
    """Compares `<tag>.<kind>.<parameter>`; with a case, only where its README says that gradients are large enough."""
    original = loaded.under_original_names(arrays)
    floor = gradient_floor(case) if case else 0.0
    for name in report.recorded:
        if not name.startswith(f"{tag}.{kind}."):
            continue
        parameter = name.removeprefix(f"{tag}.{kind}.")
        if kind == "grad" and "vision" in parameter and parameter.endswith("k_proj.bias"):
            # softmax does not see it, so that both are rounding: small beside the gradient of the queries' bias
            scale = np.linalg.norm(original[parameter.replace("k_proj", "q_proj")])
            error = float(np.linalg.norm(original[parameter] - report.recorded[name]) / scale)
            report.check(name, error, bound=TRAINING_BOUND, note="beside that of q_proj.bias")
            continue
        at, note = None, ""
        gradient = report.recorded.get(f"{tag}.grad.{parameter}")
        if floor and gradient is not None:
            at, note = np.abs(gradient) > floor, f"|grad| > {floor:g}"
        report.close(name, original[parameter], bound=TRAINING_BOUND, at=at, note=note)
