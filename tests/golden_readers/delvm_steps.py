"""Cases of DeLVM's optimizer steps: the decoder alone, and with a teacher."""

import numpy as np
from mindspore import Tensor, nn

from mindvlm.checkpoint import MemorySource, open_checkpoint
from mindvlm.core.runtime import EAGER_FLOAT32
from mindvlm.models.delvm.checkpoint_config import from_published, is_vit
from mindvlm.models.delvm.config import DelvmConfig
from mindvlm.models.delvm.distillation import DistillationConfig
from mindvlm.models.delvm.names import MODELS
from mindvlm.models.delvm.teacher import DistilledDecoder, build_teacher
from mindvlm.nn.parameters import name_by_place
from mindvlm.nn.rotary import decoder_frequencies
from mindvlm.parallel.zero import scheduled_beta2
from mindvlm.training.loss import LossScaleConfig
from mindvlm.training.optimizer import OptimizerConfig
from mindvlm.training.schedule import ScheduleConfig
from mindvlm.training.step import TrainStep
from mindvlm.weights.rules.planning import make_plan
from tests.golden_readers.case import Case
from tests.golden_readers.delvm import compare_updated, is_decoder
from tests.golden_readers.delvm_loaded import load_model
from tests.golden_readers.report import TRAINING_BOUND, Report

TEACHER = "weights_teacher.safetensors"


def is_steps(case: Case) -> bool:
    return is_decoder(case) and "step0.logits" in case.outputs


def read_steps(case: Case, report: Report) -> None:
    StepsReader(case, report).compare()


class StepsReader:
    """Runs the recorded steps: passes of one pack each, whose means weigh the same."""

    def __init__(self, case: Case, report: Report):
        self.case, self.report, self.config = case, report, case.config
        self.model = load_model(case.weights, from_published(case.config), is_trained=True)
        self.teacher = None
        if "teacher" in self.config:
            model = from_published({**self.config, "model": self.config["teacher"]})
            config = DelvmConfig(checkpoint=str(case.folder / TEACHER), model=model)
            self.teacher = build_teacher(config, EAGER_FLOAT32, origin=TEACHER)
        self.num_passes = self.config["data"].get("micro_num", 1)
        name_by_place(self.model)
        self.inv_freq = Tensor(decoder_frequencies(self.model.language_model.config))

    def arguments(self, number: int) -> tuple[Tensor, ...]:
        """Returns codes, labels, frequencies, positions and segments of a pack, a batch of one row."""
        inputs, pack = self.case.inputs, number % len(self.case.inputs["input_ids"])
        ids, labels, positions = (inputs[name][pack][None] for name in ("input_ids", "labels", "indexes"))
        lengths = np.diff(inputs[f"cu_seqlens_{pack}"])
        segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
        return *(Tensor(array) for array in (ids, labels)), self.inv_freq, Tensor(positions), Tensor(segments)

    def new_step(self) -> tuple[TrainStep, ScheduleConfig]:
        """Returns the step with the settings of the case, or the usual ones of the original, and its schedule."""
        trained: nn.Cell = self.model
        if self.teacher:
            trained = DistilledDecoder(
                self.model, self.teacher, DistillationConfig(teacher=TEACHER, **self.config["kd_config"])
            )
        self.model.set_train()
        self.model.stop_at_frozen_parts()
        adam, rates = self.config["adam"], self.config["lr_scheduler"]
        optimizer = OptimizerConfig(
            learning_rate=adam["lr"],
            betas=[adam["adam_beta1"], adam["adam_beta2"]],
            beta2_power=float(adam["adam_beta2_c"]),
            eps=adam["adam_eps"],
            weight_decay=adam["weight_decay"],
            max_grad_norm=self.config.get("hybrid_zero_optimizer", {}).get("clip_grad_norm", 1.0),
            no_decay=[],
        )
        schedule = ScheduleConfig(
            total_steps=rates["total_steps"],
            idle_steps=rates["init_steps"],
            warmup_steps=int(rates["total_steps"] * rates["warmup_ratio"]),
            final_ratio=rates["eta_min"] / adam["lr"],
        )
        initial = float(self.config.get("grad_scaler", {}).get("initial_scale", 2**16))
        scale = LossScaleConfig(initial=initial, growth_interval=1000, hysteresis=2, minimum=1.0)
        step = TrainStep(trained, optimizer, accumulates=True, averages_passes=True, loss_scale=scale)
        return step, schedule

    def accumulate(self, step: TrainStep, number: int) -> None:
        """Runs the passes of a step."""
        for one in range(self.num_passes):
            step.accumulate(*self.arguments(number * self.num_passes + one))

    def compare(self) -> None:
        self.compare_logits("step0.logits", self.model.embed, self.model.language_model, self.inv_freq)
        if self.teacher:
            frequencies = Tensor(decoder_frequencies(self.teacher.config))
            self.compare_logits("step0.teacher_logits", self.teacher.embed_tokens, self.teacher, frequencies)
        step, schedule = self.new_step()
        peak, adam = self.config["adam"]["lr"], step.optimizer
        records: dict[str, list[float]] = {}
        for number in range(self.config["steps"]):
            rate = peak * schedule.factor(number)
            beta2 = scheduled_beta2(adam.beta2, adam.beta2_power, adam.num_updates).asnumpy().item()
            values = {"lr": rate, "beta2": beta2, "loss_scale": step.loss_scale.value.asnumpy().item()}
            self.accumulate(step, number)
            if number == 0:
                self.compare_gradients(step)
            result = step.update(Tensor(np.float32(rate)))
            names = [f"loss{end}" for end in ("_gt", "_kd")] if self.teacher else ["loss"]
            values |= dict(zip(names, result.loss.asnumpy().reshape(-1).tolist(), strict=True))
            values["grad_norm"] = result.norm.asnumpy().item()
            for name, value in values.items():
                records.setdefault(name, []).append(value)
            self.compare_weights(number + 1)
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

    def compare_weights(self, num_steps: int) -> None:
        for name, array in self.weights().items():
            if f"after{num_steps}.{name}" in self.report.recorded:
                self.compare_updated(f"after{num_steps}.{name}", array, num_steps)

    def compare_updated(self, name: str, array: np.ndarray, num_steps: int) -> None:
        recorded = self.report.recorded[name]
        compare_updated(self.report, name, array, recorded, self.config["adam"]["lr"], num_steps=num_steps)

    def compare_saved(self, num_steps: int) -> None:
        """Compares weights and moments in the flat vectors of a checkpoint after some steps."""
        step, schedule = self.new_step()
        for number in range(num_steps):
            self.accumulate(step, number)
            step.update(Tensor(np.float32(self.config["adam"]["lr"] * schedule.factor(number))))
        weights, state = self.weights(), step.state
        for name in self.report.recorded:
            if name.startswith("model_file."):
                self.compare_updated(name, weights[name.removeprefix("model_file.")], num_steps)
        self.compare_updated("flat_fp32_weights", self.flat(weights), num_steps)
        for name, key in (("exp_avg", "moment1."), ("exp_avg_sq", "moment2.")):
            moments = {one.removeprefix(key): array.asnumpy() for one, array in state.items() if one.startswith(key)}
            self.report.close(name, self.flat(self.original(moments)), bound=TRAINING_BOUND)
        self.report.close("adam_step", state["num_updates"].asnumpy())

    def flat(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Returns arrays by original names as one vector, the largest first, equal ones as in the file."""
        with open_checkpoint(self.case.weights) as checkpoint:
            names = [name for name in checkpoint.infos if name in arrays]
        return np.concatenate([arrays[name].ravel() for name in sorted(names, key=lambda name: -arrays[name].size)])

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the trained weights by their original names."""
        return self.original({one.name: one.asnumpy() for one in self.model.trainable_params()})

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
