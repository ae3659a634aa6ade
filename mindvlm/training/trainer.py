"""The training loop of every job."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindvlm.core import runtime
from mindvlm.core.errors import UserError
from mindvlm.families import get_family
from mindvlm.nn.rotary import inverse_frequencies
from mindvlm.parallel.mesh import init_parallel
from mindvlm.training import building, checkpoint
from mindvlm.training.checkpoint import CheckpointFolder
from mindvlm.training.evaluate import Evaluation
from mindvlm.training.job_file import Job
from mindvlm.training.metrics_log import drop_after
from mindvlm.training.progress import Progress, duration
from mindvlm.training.ranks import Ranks
from mindvlm.training.resume import differences, fingerprint, require_same_job
from mindvlm.training.sources import PassInputs
from mindvlm.training.state import RunTensors
from mindvlm.training.stepping import Outcome, Stepper

SAMPLES_FILE = "samples.jsonl"


class Trainer:
    """A job: builds everything, goes on from the newest checkpoint if there is one, trains to the last step.

    Args:
        job: see `read_job`.
        say: takes each line of progress.
        accept_changes: go on from a checkpoint of another config, and say what differs.

    Raises:
        UserError: the config, its files, the data or the checkpoint cannot be used.
    """

    def __init__(self, job: Job, *, say: Callable[[str], None] = print, accept_changes: bool = False):
        self.job, config = job, job.config
        self.config = config
        model_config = building.read_model(config)
        family = get_family(config.family)
        self.checkpoints = CheckpointFolder(config.output_dir)
        dtype = runtime.start(config)
        self.mesh = init_parallel(config.parallel)
        self.ranks = Ranks(self.mesh)
        self.say = say if self.mesh.is_first else lambda line: None
        self.resumed_from = self.find_checkpoint()
        self.source = building.open_source(config, model_config, family, self.mesh, say=self.say)
        self.fingerprint = fingerprint(job, model_config) | self.source.identity | building.base_identity(config)
        state = self.read_state(accept_changes)
        self.source_state = state.get("source")
        self.schedule = config.schedule.resolved(self.source.rows_per_epoch, config.num_rows)
        is_new = self.resumed_from is None
        self.model, divided = building.build_model(
            config, model_config, family, self.mesh, dtype, is_new=is_new, say=self.say
        )
        decoder = model_config.model.language_model
        inv_freq = Tensor(inverse_frequencies(decoder.rotary_dim, decoder.rope_theta))
        self.stepper = Stepper(self.model, config, inv_freq=inv_freq, mesh=self.mesh, divided=divided, dtype=dtype)
        self.tensors = RunTensors(
            dict(self.model.parameters_and_names()),
            self.stepper.optimizer_state,
            sharded=self.stepper.sharded,
            specs=divided.specs,
            host=self.ranks.host,
            adapter=building.adapter_files(self.model, config, divided),
        )
        self.family, self.companions = family, family.companions(model_config)
        self.evaluator = building.open_evaluator(config, model_config, family, self.source, self.model, say=self.say)
        self.progress = Progress(self.schedule.total_steps)
        self.step: int = state.get("step", 0)
        self.best: dict[str, Any] | None = state.get("best")
        self.window: list[float] = state.get("window", [])
        self.num_overflows: int = state.get("num_overflows", 0)
        self.num_skipped_before: int = state.get("num_skipped", 0)
        self.nan_steps = 0
        self.seen_shapes: set = set()
        self.stepper.start_at(self.step)
        if is_new:
            self.stepper.fill_masters()
        else:
            self.tensors.read(self.resumed_from)
            self.say(f"goes on from {self.resumed_from}, step {self.step} of {self.schedule.total_steps}")

    def find_checkpoint(self) -> Path | None:
        """The newest checkpoint. Raises UserError if there is one and there should be none."""
        steps = self.ranks.from_first(self.checkpoints.steps())
        latest = self.checkpoints.path(steps[-1]) if steps else None
        if latest is not None and self.config.resume == "never":
            raise UserError(
                f"output_dir {self.config.output_dir} holds {latest.name} of another run; set resume: auto to go on "
                "from it, or choose another output_dir"
            )
        return latest

    def read_state(self, accept_changes: bool) -> dict[str, Any]:
        """What the checkpoint holds besides tensors. Raises UserError if it is of another job."""
        if self.resumed_from is None:
            return {}
        state = checkpoint.read_state(self.resumed_from)
        if accept_changes:
            for change in differences(state["job"], self.fingerprint):
                self.say(f"changed: {change}")
        else:
            require_same_job(state["job"], self.fingerprint, str(self.resumed_from))
        ms.set_rng_state(Tensor(np.array(state["rng"], dtype=np.uint8)))
        return state

    def train(self) -> None:
        """Trains to the last step; progress goes to `say` and into the output folder."""
        config = self.config
        if self.mesh.is_first:
            self.checkpoints.lock()
            drop_after(self.checkpoints.folder / SAMPLES_FILE, self.step)
        self.metrics = building.open_metrics(config, self.mesh, step=self.step)
        self.source.start(self.step, self.source_state)
        try:
            while self.step < self.schedule.total_steps:
                self.train_step()
        except KeyboardInterrupt:
            last = self.checkpoints.latest()
            kept = f"the same command goes on from {last}" if last else "no checkpoint was written yet"
            self.say(f"stopped at step {self.step} of {self.schedule.total_steps}; {kept}")
            raise
        finally:
            self.source.close()
            if self.metrics:
                self.metrics.close()
            self.checkpoints.unlock()

    def train_step(self) -> None:
        """One step and everything that is due after it."""
        config = self.config
        passes = self.source.take()
        outcome = self.run_step(passes)
        self.step += 1
        is_end = self.step == self.schedule.total_steps
        if not outcome.is_finite and not outcome.is_overflow:
            self.meet_nan(outcome, passes)
            if not is_end:
                return
        else:
            self.nan_steps = 0
            self.num_overflows += outcome.is_overflow
            self.window.append(outcome.loss)
            news = self.source.observe(outcome.loss)
            if news:
                self.say(f"step {self.step}: {news}")
        if is_end or self.step % config.log_every == 0:
            self.log(outcome)
        is_best = False
        if self.evaluator and (is_end or self.step % config.evaluate_every == 0):
            is_best = self.note_best(self.evaluate())
        if is_end or is_best or self.step % config.save_every == 0:
            self.save()

    def run_step(self, passes: list[PassInputs]) -> Outcome:
        """The update of the present step."""
        shapes = {(one.input_ids.shape, tuple(array.shape for array in one.pixels)) for one in passes}
        is_new = bool(shapes - self.seen_shapes) and self.config.mode == "graph"
        if is_new:
            self.seen_shapes |= shapes
            self.say(f"compiling the training graph for {sorted(shape for shape, _ in shapes)} tokens")
        self.progress.start_step()
        outcome = self.stepper.run(self.learning_rate, passes)
        num_tokens = sum(one.num_tokens for one in passes) * self.mesh.dp
        seconds = self.progress.end_step(num_tokens, is_counted=not is_new)
        if is_new:
            self.say(f"compiled and run in {duration(seconds)}")
        return outcome

    @property
    def learning_rate(self) -> float:
        """Of the present step."""
        return self.config.optimizer.learning_rate * self.schedule.factor(self.step)

    def meet_nan(self, outcome: Outcome, passes: list[PassInputs]) -> None:
        """A loss that is not finite: the batch is kept; too many in a row are an error."""
        self.nan_steps += 1
        path = building.save_batch(self.checkpoints.folder, self.step, passes, self.mesh)
        what = f"the loss is {outcome.loss} and the norm of the gradients {outcome.norm}"
        self.say(f"step {self.step}: {what}; nothing was updated, the batch is in {path}")
        if self.nan_steps >= self.config.max_nan_steps:
            last = self.checkpoints.latest()
            kept = f"the last checkpoint, {last}, is kept" if last else "no checkpoint was written yet"
            raise UserError(
                f"{what} after {self.nan_steps} such steps, at step {self.step}; the last batch is in {path}; {kept}: "
                "lower optimizer.learning_rate (and go on with --accept_changes) or mend the data"
            )

    def log(self, outcome: Outcome) -> None:
        """The progress line and its record; the loss is the mean since the last one."""
        means = {"loss": sum(self.window) / len(self.window)} if self.window else {}
        figures = {
            **means,
            **({"norm": outcome.norm} if outcome.is_finite else {}),
            "learning_rate": self.config.optimizer.learning_rate * self.schedule.factor(self.step - 1),
            **self.source.figures,
            **self.progress.speed,
            "skipped": self.num_skipped(),
        }
        if self.stepper.has_loss_scale:
            figures["overflows"] = self.num_overflows
        self.say(self.progress.line(self.step, figures))
        self.record(figures)
        self.window = []
        self.progress.restart()

    def record(self, figures: dict[str, float]) -> None:
        """One line of `metrics.jsonl`."""
        if self.metrics:
            self.metrics.write(self.step, **figures)

    def num_skipped(self) -> int:
        """Samples that could not be used since the run began, in all replicas."""
        return self.num_skipped_before + sum(self.ranks.of_replicas(self.source.num_skipped))

    def evaluate(self) -> dict[str, float]:
        """Reads what was held out; figures and answers are logged."""
        # the ranks that share a replica compute together; of the replicas one is enough
        self.say(f"step {self.step}: evaluating")
        evaluation = self.evaluator.evaluate() if self.mesh.dp_rank == 0 else Evaluation({})
        figures = self.ranks.from_first({name: float(value) for name, value in evaluation.figures.items()})
        self.say(self.progress.line(self.step, figures))
        self.record(figures)
        if self.mesh.is_first:
            write_readings(self.checkpoints.folder / SAMPLES_FILE, self.step, evaluation)
        num_shown = self.config.evaluation.num_shown if self.config.evaluation else 0
        for reading in evaluation.readings[:num_shown]:
            self.say(f"  {reading.origin}: {reading.text!r}, expected {reading.reference!r}")
        return figures

    def note_best(self, figures: dict[str, float]) -> bool:
        """Whether the model is the best so far by the figure of the config."""
        name = self.config.best
        if name is None or (self.best and figures[name] >= self.best[name]):
            return False
        self.best = {"step": self.step, **figures}
        return True

    def save(self) -> None:
        """Writes a checkpoint and removes those that are not kept."""
        state = {
            "step": self.step,
            "source": self.source.merge(self.ranks.of_replicas(self.source.state)),
            "best": self.best,
            "window": self.window,
            "num_overflows": self.num_overflows,
            "num_skipped": self.num_skipped(),
            "rng": ms.get_rng_state().asnumpy().tolist(),
            "job": self.fingerprint,
            "config": self.job.written,
        }
        if not self.mesh.is_first:
            self.tensors.write(None)
            return

        def fill(folder: Path) -> None:
            self.tensors.write(folder)
            self.family.write_trained_parts(folder, [parameter.name for parameter in self.model.trainable_params()])
            for name, content in self.companions.items():
                (folder / name).write_bytes(content)
            checkpoint.write_state(folder, state)

        path = self.checkpoints.write(self.step, fill)
        if self.best:
            self.checkpoints.write_best({"checkpoint": f"step-{self.best['step']}", **self.best})
        self.checkpoints.prune(self.config.keep_checkpoints, besides=self.best and self.best["step"])
        self.say(f"saved {path}")


def write_readings(path: Path, step: int, evaluation: Evaluation) -> None:
    """Appends the answers of an evaluation. Raises UserError if they cannot be written."""
    try:
        # what a model writes may be half of a surrogate pair
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for reading in evaluation.readings:
                file.write(json.dumps({"step": step, **vars(reading)}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room and start again") from None
