"""The training loop of Vary-nano."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import mindspore as ms
from mindspore import Tensor

from mindvlm import runtime
from mindvlm.api import read_config
from mindvlm.errors import UserError
from mindvlm.models.common.rotary import inverse_frequencies
from mindvlm.models.vary.model import VaryModel
from mindvlm.training.checkpoint import load_state, save_state, save_weights
from mindvlm.training.config import TrainConfig
from mindvlm.training.curriculum import STAGES, TRAINING_STAGES, Curriculum
from mindvlm.training.data import BackgroundBatches, Batch, RenderedTextBatches
from mindvlm.training.evaluate import Reader, image_sources, pixel_tensors
from mindvlm.training.initialize import initialize
from mindvlm.training.step import TrainStep

EVALUATION_SEED = 20_000


class Trainer:
    """A job from its config: builds everything, resumes if there is a state, trains to the last step.

    Args:
        config: the job.
        say: takes each line of progress.

    Raises:
        UserError: the config, its files or the state cannot be used.
    """

    def __init__(self, config: TrainConfig, *, say: Callable[[str], None] = print):
        self.config = config
        self.say = say
        self.folder = Path(config.output_dir)
        model_config = read_config(config.model_config)
        if config.dtype != "float32":
            raise UserError(f"dtype is {config.dtype!r}; training computes in float32, set that or leave it out")
        self.folder.mkdir(parents=True, exist_ok=True)
        runtime.start(config)
        self.model = VaryModel(model_config.model)
        self.weights = {parameter.name: parameter for parameter in self.model.get_parameters()}
        initialize(list(self.weights.values()), config.seed)
        self.model.set_train()
        self.step_graph = TrainStep(self.model, config.optimizer)
        self.options = dict(
            processor_config=model_config.processor,
            queries=config.data.queries,
            main_query_share=config.data.main_query_share,
            batch_size=config.data.batch_size,
            max_answer_tokens=config.data.max_answer_tokens,
            seed=config.seed,
        )
        self.batches = RenderedTextBatches(**self.options)
        decoder = model_config.model.language_model
        self.inv_freq = Tensor(inverse_frequencies(decoder.head_dim, decoder.rope_theta))
        self.reader = Reader(self.model, self.batches, graph_mode=config.mode == "graph")
        self.curriculum = Curriculum(threshold=config.data.curriculum_threshold)
        self.step = 0
        self.ordered_stages: list[int] = []
        self.resume()

    @property
    def state(self) -> dict:
        """Everything that a resumed job needs, by name."""
        optimizer = self.step_graph.optimizer
        moments = zip(optimizer.parameters, optimizer.moment1, optimizer.moment2, strict=True)
        names = {id(parameter): name for name, parameter in self.weights.items()}
        state = {f"model.{name}": parameter for name, parameter in self.weights.items()}
        for parameter, moment1, moment2 in moments:
            state[f"moment1.{names[id(parameter)]}"] = moment1
            state[f"moment2.{names[id(parameter)]}"] = moment2
        return {**state, "num_updates": optimizer.num_updates}

    def resume(self) -> None:
        """Goes on where the state in the output folder ends, if there is one."""
        if self.config.resume == "never":
            if (self.folder / "state.safetensors").exists():
                raise UserError(f"{self.folder} holds the state of another run; set resume: auto or choose another one")
            return
        progress = load_state(self.folder, self.state)
        if progress is None:
            return
        self.step = progress["step"]
        self.curriculum = Curriculum(**{**progress["curriculum"], "threshold": self.config.data.curriculum_threshold})
        self.ordered_stages = progress["ordered_stages"]
        self.say(f"resumed at step {self.step}, stage {self.curriculum.stage}")

    def train(self) -> None:
        """Trains up to `schedule.total_steps` and writes the weights; progress goes to `say` and `metrics.jsonl`."""
        config = self.config
        source = BackgroundBatches(
            self.options,
            stages=TRAINING_STAGES,
            num_workers=config.data.num_workers,
            first=self.step,
            ordered_stages=self.ordered_stages,
        )
        try:
            started, timed_from = time.perf_counter(), None
            self.say("compiling the training graph")
            while self.step < config.schedule.total_steps:
                batch = source.take(self.curriculum.stage)
                loss, norm = self.run_step(batch)
                if not math.isfinite(loss):
                    raise UserError(
                        f"the loss is {loss} at step {self.step + 1}; what was saved before in {self.folder} is kept: "
                        "lower optimizer.learning_rate and start again"
                    )
                self.step += 1
                if self.curriculum.update(loss):
                    self.say(f"step {self.step}: stage {self.curriculum.stage} of {len(STAGES) - 1} begins")
                if timed_from is None:
                    self.say(f"compiled in {time.perf_counter() - started:.0f} s")
                    started, timed_from = time.perf_counter(), self.step
                if self.step % config.log_every == 0:
                    seconds = (time.perf_counter() - started) / max(self.step - timed_from, 1)
                    self.log(loss=self.curriculum.smoothed_loss, norm=norm, seconds_per_step=seconds)
                is_end = self.step == config.schedule.total_steps
                if is_end or self.step % config.evaluate_every == 0:
                    self.evaluate()
                if is_end or self.step % config.save_every == 0:
                    self.ordered_stages = list(source.ordered_stages)
                    self.save()
        finally:
            source.close()

    def run_step(self, batch: Batch) -> tuple[float, float]:
        """One update; returns the loss and the norm of the gradients before clipping."""
        rate = self.config.optimizer.learning_rate * self.config.schedule.factor(self.step)
        clip, high = pixel_tensors(batch)
        loss, norm = self.step_graph(
            Tensor(rate, ms.float32),
            Tensor(batch.input_ids),
            Tensor(batch.labels),
            self.inv_freq,
            clip,
            high,
            image_sources(self.batches, batch.input_ids),
        )
        return float(loss.asnumpy()), float(norm.asnumpy())

    def evaluate(self) -> float:
        """Error rate on unseen words over everything the model is meant to read, and over the present stage."""
        count = -(-self.config.data.num_evaluation_images // self.config.data.batch_size)
        rates = {}
        for name, stage in (("stage", STAGES[self.curriculum.stage]), ("full", STAGES[-1])):
            tests = [self.batches.make(EVALUATION_SEED + i, stage, "evaluation") for i in range(count)]
            rates[name] = self.reader.error_rate(tests)
            if self.curriculum.stage == len(STAGES) - 1:
                rates["full"] = rates["stage"]
                break
        self.log(cer_stage=rates["stage"], cer=rates["full"])
        return rates["full"]

    def log(self, **values: float) -> None:
        """One line on the terminal and one in `metrics.jsonl`."""
        record = {"step": self.step, "stage": self.curriculum.stage, **{k: round(v, 5) for k, v in values.items()}}
        self.say("  ".join(f"{key} {value}" for key, value in record.items()))
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def save(self) -> None:
        """State to go on from, and the weights alone in 16 bit."""
        progress = {
            "step": self.step,
            "curriculum": asdict(self.curriculum),
            "ordered_stages": self.ordered_stages,
        }
        save_state(self.folder, self.state, progress)
        save_weights(self.folder / "weights.safetensors", self.weights, "float16")
