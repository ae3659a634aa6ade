"""Cases of DeLVM's optimizer steps: the decoder alone, and with a teacher."""

import numpy as np
from mindspore import Tensor, nn

from mindvlm.checkpoint import MemorySource
from mindvlm.core.runtime import EAGER_FLOAT32
from mindvlm.models.delvm.checkpoint_config import from_published, is_vit
from mindvlm.models.delvm.config import DelvmConfig
from mindvlm.models.delvm.distillation import DistillationConfig
from mindvlm.models.delvm.names import MODELS
from mindvlm.models.delvm.teacher import DistilledDecoder, build_teacher
from mindvlm.nn.parameters import name_by_place
from mindvlm.nn.rotary import decoder_frequencies
from mindvlm.training.loss import LossScaleConfig
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.schedule import ScheduleConfig
from mindvlm.training.step import TrainStep
from mindvlm.weights.rules.planning import make_plan
from tests.golden_readers.case import Case
from tests.golden_readers.delvm import is_decoder
from tests.golden_readers.delvm_loaded import load_model
from tests.golden_readers.report import TRAINING_BOUND, Report

TEACHER = "weights_teacher.safetensors"
SHARE = 0.97
"""Part of a tensor that must lie within a hundredth of the learning rate; the first updates follow signs."""


def is_steps(case: Case) -> bool:
    return is_decoder(case) and "step0.logits" in case.outputs


def read_steps(case: Case, report: Report) -> None:
    StepsReader(case, report).compare()


class StepsReader:
    """Runs the recorded steps: passes of one pack each, whose means weigh the same."""

    def __init__(self, case: Case, report: Report):
        self.case, self.report, self.config = case, report, case.config
        self.model = load_model(case.weights, from_published(case.config))
        self.teacher = None
        if "teacher" in self.config:
            model = from_published({**self.config, "model": self.config["teacher"]})
            config = DelvmConfig(checkpoint=str(case.folder / TEACHER), model=model)
            self.teacher = build_teacher(config, EAGER_FLOAT32, origin=TEACHER)
        self.num_passes = self.config["data"]["micro_num"]
        name_by_place(self.model)
        self.inv_freq = Tensor(decoder_frequencies(self.model.language_model.config))

    def arguments(self, number: int) -> tuple[Tensor, ...]:
        """Returns codes, labels, frequencies, positions and segments of a pack, a batch of one row."""
        inputs, pack = self.case.inputs, number % len(self.case.inputs["input_ids"])
        ids, labels, positions = (inputs[name][pack][None] for name in ("input_ids", "labels", "indexes"))
        lengths = np.diff(inputs[f"cu_seqlens_{pack}"])
        segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
        return *(Tensor(array) for array in (ids, labels)), self.inv_freq, Tensor(positions), Tensor(segments)

    def compare(self) -> None:
        self.compare_logits("step0.logits", self.model.embed, self.model.language_model, self.inv_freq)
        trained: nn.Cell = self.model
        if self.teacher:
            frequencies = Tensor(decoder_frequencies(self.teacher.config))
            self.compare_logits("step0.teacher_logits", self.teacher.embed_tokens, self.teacher, frequencies)
            trained = DistilledDecoder(
                self.model, self.teacher, DistillationConfig(teacher=TEACHER, **self.config["kd_config"])
            )
        self.model.set_train()
        self.model.stop_at_frozen_parts()
        adam, rates = self.config["adam"], self.config["lr_scheduler"]
        optimizer = OptimizerConfig(
            learning_rate=adam["lr"],
            betas=[adam["adam_beta1"], adam["adam_beta2"]],
            eps=adam["adam_eps"],
            weight_decay=adam["weight_decay"],
            max_grad_norm=self.config["hybrid_zero_optimizer"]["clip_grad_norm"],
            no_decay=[],
        )
        schedule = ScheduleConfig(
            total_steps=rates["total_steps"],
            warmup_steps=int(rates["total_steps"] * rates["warmup_ratio"]),
            final_ratio=rates["eta_min"] / adam["lr"],
        )
        scale = LossScaleConfig(initial=float(self.config["grad_scaler"]["initial_scale"]))
        step = TrainStep(trained, optimizer, accumulates=True, averages_passes=True, loss_scale=scale)
        records: dict[str, list[float]] = {}
        for number in range(self.config["steps"]):
            rate = adam["lr"] * schedule.factor(number)
            values = {"lr": rate, "beta2": optimizer.betas[1], "loss_scale": step.loss_scale.value.asnumpy().item()}
            for one in range(self.num_passes):
                step.accumulate(*self.arguments(number * self.num_passes + one))
            if number == 0:
                self.compare_gradients(step)
            result = step.update(Tensor(np.float32(rate)))
            names = [f"loss{end}" for end in ("_gt", "_kd")] if self.teacher else ["loss"]
            values |= dict(zip(names, result.loss.asnumpy().reshape(-1).tolist(), strict=True))
            values["grad_norm"] = result.norm.asnumpy().item()
            for name, value in values.items():
                records.setdefault(name, []).append(value)
            self.compare_weights(number + 1, adam["lr"])
        for name, values in records.items():
            self.report.close(f"rec.{name}", np.array(values), bound=TRAINING_BOUND)

    def compare_logits(self, name: str, embed: nn.Cell, decoder: nn.Cell, inv_freq: Tensor) -> None:
        packs = len(self.report.recorded[name])
        found = []
        for number in range(packs):
            codes, _, _, *segments = self.arguments(number)
            found.append(Logits(embed, decoder)(codes, inv_freq, *segments).asnumpy()[0])
        self.report.close(name, np.stack(found))

    def compare_gradients(self, step: TrainStep) -> None:
        """Compares the gradients of the mean of the passes, unscaled and not clipped."""
        passes, divisor = step.accumulate_graph, step.loss_scale.value.asnumpy() * self.num_passes
        arrays = {one.name.removeprefix("gradient."): one.asnumpy() / divisor for one in passes.buffers}
        for name, array in self.original(arrays).items():
            if f"step0.grad.{name}" in self.report.recorded:
                self.report.close(f"step0.grad.{name}", array, bound=TRAINING_BOUND)

    def compare_weights(self, num_steps: int, rate: float) -> None:
        prefix = f"after{num_steps}."
        arrays = {one.name: one.asnumpy() for one in self.model.trainable_params()}
        for name, array in self.original(arrays).items():
            if (recorded := self.report.recorded.get(f"{prefix}{name}")) is not None:
                difference = np.abs(array.astype(np.float64) - recorded) / rate
                note = "share of the elements that are off by more than a hundredth of the rate"
                self.report.check(f"{prefix}{name}", float((difference > 1e-2).mean()), bound=1 - SHARE, note=note)
                self.report.check(f"{prefix}{name}, largest", float(difference.max()), bound=2.0 * num_steps)

    def original(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns arrays by native names under their original names."""
        source = MemorySource(arrays)
        table = MODELS[is_vit(self.config)].forms["internlm"].table
        view = make_plan(table.reverse(), source.infos, partial=True).view(source)
        return {name: view.read(name).data for name in view.infos}


class Logits(nn.Cell):
    """Logits of rows of segments."""

    def __init__(self, embed: nn.Cell, decoder: nn.Cell):
        super().__init__(auto_prefix=False)
        self.embed, self.decoder = embed, decoder

    def construct(self, codes, inv_freq, positions, segment_ids):
        return self.decoder.lm_head(self.decoder(self.embed(codes), inv_freq, positions, segment_ids))
