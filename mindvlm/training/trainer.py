"""The training loop."""

import json
import logging
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindvlm.core import runtime
from mindvlm.core.errors import UserError
from mindvlm.core.progress import silence_progress
from mindvlm.models.own_training import Evaluation, PassInputs
from mindvlm.models.registry import get_family
from mindvlm.nn.rotary import decoder_frequencies
from mindvlm.parallel.host import Ranks
from mindvlm.parallel.mesh import init_parallel
from mindvlm.training import building
from mindvlm.training.job_file import Job
from mindvlm.training.metrics_log import Progress, drop_after, duration
from mindvlm.training.resume import differences, fingerprint, require_same_job
from mindvlm.training.run_checkpoints import RunCheckpoints, read_state, write_state
from mindvlm.training.run_tensors import RunTensors
from mindvlm.training.step_runner import Outcome, StepRunner

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"


class Trainer:
    """Runs a job: builds its parts, resumes from the newest checkpoint if there is one, and trains to the last step.

    Progress lines go to the logger `mindvlm`, in the first rank only; see `mindvlm.core.progress`.

    Args:
        job: see `read_job`.
        accept_changes: resumes from a checkpoint of another config and logs the differences.

    Raises:
        UserError: the config, its files, the data or the checkpoint cannot be used.
    """

    def __init__(self, job: Job, *, accept_changes: bool = False):
        self.job, config = job, job.config
        self.config = config
        model_config = building.read_model(config)
        self.family = family = get_family(model_config.family)
        self.checkpoints = RunCheckpoints(config.output_dir)
        context = runtime.start(config)
        self.mesh = init_parallel(config.parallel)
        self.ranks = Ranks(self.mesh)
        if not self.mesh.is_first:
            silence_progress()
        self.resumed_from = self.find_checkpoint()
        self.data = building.open_data(config, model_config, family, self.mesh)
        self.fingerprint = (
            fingerprint(job, model_config) | self.data.identity | building.frozen_identity(config, model_config, family)
        )
        state = self.read_state(accept_changes)
        self.data_state = state.get("source")
        self.schedule = config.schedule.resolved(self.data.rows_per_epoch, config.num_rows)
        self.companions = family.companions(model_config) if family.companions else {}
        is_new = self.resumed_from is None
        self.model, divided = building.build_model(config, model_config, family, self.mesh, context, is_new=is_new)
        decoder = model_config.model.language_model
        self.runner = StepRunner(
            building.trained_cell(config, model_config, family, self.model, context),
            config,
            inv_freq=Tensor(decoder_frequencies(decoder)) if decoder else None,
            mesh=self.mesh,
            divided=divided,
            dtype=context.dtype,
        )
        self.tensors = RunTensors(
            dict(self.model.parameters_and_names()),
            self.runner.optimizer_state,
            sharded=self.runner.sharded,
            specs=divided.specs,
            host=self.ranks.host,
            adapter=building.adapter_files(self.model, config, family, divided),
        )
        self.evaluator = building.open_evaluator(config, model_config, family, self.data, self.model)
        self.progress = Progress(self.schedule.total_steps)
        self.step: int = state.get("step", 0)
        self.best: dict[str, Any] | None = state.get("best")
        self.window: list[float] = state.get("window", [])
        self.terms: list[dict[str, float]] = state.get("terms", [])
        self.num_overflows: int = state.get("num_overflows", 0)
        self.num_skipped_before: int = state.get("num_skipped", 0)
        self.num_updates: int = state.get("num_updates", self.step)
        self.num_bad_steps = 0
        # the first checkpoint is written after a step that learned
        self.has_learned = self.step > 0
        self.seen_shapes: set = set()
        self.runner.start_at(self.step)
        if is_new:
            self.runner.fill_masters()
        else:
            self.tensors.read(self.resumed_from)
            logger.info(f"resuming from {self.resumed_from}, step {self.step} of {self.schedule.total_steps}")

    def find_checkpoint(self) -> Path | None:
        """Returns the newest checkpoint. Raises UserError if the job refuses an existing one."""
        steps = self.ranks.from_first(self.checkpoints.steps())
        latest = self.checkpoints.path(steps[-1]) if steps else None
        if latest is not None and self.config.resume == "never":
            raise UserError(
                f"output_dir {self.config.output_dir} holds {latest.name} of another run; set resume: auto to resume "
                "it, or choose another output_dir"
            )
        return latest

    def read_state(self, accept_changes: bool) -> dict[str, Any]:
        """Reads the state of a checkpoint besides tensors. Raises UserError if it belongs to another job."""
        if self.resumed_from is None:
            return {}
        state = read_state(self.resumed_from)
        if accept_changes:
            for change in differences(state["job"], self.fingerprint):
                logger.info(f"changed: {change}")
        else:
            require_same_job(state["job"], self.fingerprint, str(self.resumed_from))
        ms.set_rng_state(Tensor(np.array(state["rng"], dtype=np.uint8)))
        return state

    def train(self) -> None:
        """Trains to the last step; progress is logged and recorded in the output folder."""
        config = self.config
        if self.mesh.is_first:
            self.checkpoints.lock()
            drop_after(self.checkpoints.folder / SAMPLES_FILE, self.step)
        self.metrics = building.open_metrics(config, self.mesh, step=self.step)
        self.data.start(self.step, self.data_state)
        try:
            while self.step < self.schedule.total_steps:
                self.train_step()
        except KeyboardInterrupt:
            last = self.checkpoints.latest()
            kept = f"the same command resumes from {last}" if last else "no checkpoint was written yet"
            logger.info(f"stopped at step {self.step} of {self.schedule.total_steps}; {kept}")
            raise
        finally:
            self.data.close()
            if self.metrics:
                self.metrics.close()
            self.checkpoints.unlock()

    def train_step(self) -> None:
        """Runs one step, and the logging, evaluation and saving that are due after it."""
        config = self.config
        passes = self.data.take()
        rate = self.learning_rate
        outcome = self.run_step(rate, passes)
        self.step += 1
        self.num_updates += bool(outcome.is_measured)
        is_end = self.step == self.schedule.total_steps
        self.has_learned |= outcome.is_measured
        if not outcome.is_measured and not outcome.is_overflow:
            self.meet_bad_step(outcome, passes, is_last=is_end and not self.has_learned)
            if not is_end:
                return
        else:
            self.num_bad_steps = 0
            self.num_overflows += outcome.is_overflow
            if is_end and not self.has_learned:
                raise UserError(
                    f"no step learned anything, the gradients overflowed up to the last step, {self.step}; train more "
                    "steps (schedule.total_steps), which lower the loss scale, or set dtype to float32 or bfloat16"
                )
            self.window.append(outcome.loss)
            self.terms.append(outcome.terms)
            news = self.data.observe(outcome.loss)
            if news:
                logger.info(f"step {self.step}: {news}")
        if is_end or self.step % config.log_every == 0:
            self.log(outcome, rate)
        is_best = False
        if self.evaluator and (is_end or self.step % config.evaluate_every == 0):
            is_best = self.note_best(self.evaluate())
        if is_end or is_best or self.step % config.save_every == 0:
            self.save()

    def run_step(self, rate: float, passes: list[PassInputs]) -> Outcome:
        """Runs the update of the current step at a learning rate."""
        shapes = {one.shapes for one in passes}
        is_new = bool(shapes - self.seen_shapes) and self.config.mode == "graph"
        if is_new:
            self.seen_shapes |= shapes
            logger.info(f"compiling the training graph for {sorted(shape for shape, *_ in shapes)} tokens")
        self.progress.start_step()
        outcome = self.runner.run(rate, passes)
        num_tokens = sum(one.num_tokens for one in passes) * self.mesh.dp
        seconds = self.progress.end_step(num_tokens, is_counted=not is_new)
        if is_new:
            logger.info(f"compiled and run in {duration(seconds)}")
        return outcome

    @property
    def learning_rate(self) -> float:
        """The learning rate of the current step."""
        position = self.num_updates if self.schedule.counts == "updates" else self.step
        return self.config.optimizer.learning_rate * self.schedule.factor(position)

    def meet_bad_step(self, outcome: Outcome, passes: list[PassInputs], *, is_last: bool) -> None:
        """Handles a step without labels or finite loss, whose batch is saved.

        Too many in a row are an error, and so is the last of a run in which no step learned (`is_last`).
        """
        self.num_bad_steps += 1
        if outcome.has_labels:
            what = f"the loss is {outcome.loss} and the norm of the gradients {outcome.norm}"
            path = building.save_batch(self.checkpoints.folder, self.step, passes, self.mesh)
            where = f"the batch is in {path}"
            remedy = "lower optimizer.learning_rate (and resume with --accept_changes) or fix the data"
        else:
            what, where = "no row has a label", f"the first row is {passes[0].origins[0]}"
            remedy = "choose the template of the tokenizer, raise data.max_length, or fix the data"
        logger.info(f"step {self.step}: {what}; nothing was updated, {where}")
        if is_last or self.num_bad_steps >= self.config.max_nan_steps:
            last = self.checkpoints.latest()
            kept = f"the last checkpoint, {last}, is kept" if last else "no checkpoint was written yet"
            raise UserError(
                f"{what} after {self.num_bad_steps} such steps, at step {self.step}; {where}; {kept}: {remedy}"
            )

    def log(self, outcome: Outcome, rate: float) -> None:
        """Logs the progress line and its record; the loss is the mean since the last line, `rate` that of the step."""
        means = {"loss": sum(self.window) / len(self.window)} if self.window else {}
        names = self.terms[0] if self.terms else {}
        means |= {name: sum(terms[name] for terms in self.terms) / len(self.terms) for name in names}
        figures = {
            **means,
            **({"norm": outcome.norm} if outcome.is_measured else {}),
            "learning_rate": rate,
            **self.data.figures,
            **self.progress.speed,
            "skipped": self.num_skipped(),
        }
        if self.runner.has_loss_scale:
            figures["overflows"] = self.num_overflows
        logger.info(self.progress.line(self.step, figures))
        self.record(figures)
        self.window, self.terms = [], []
        self.progress.restart()

    def record(self, figures: dict[str, float]) -> None:
        """Writes one line of `metrics.jsonl`."""
        if self.metrics:
            self.metrics.write(self.step, **figures)

    def num_skipped(self) -> int:
        """Unusable samples since the start of the run, in all replicas."""
        return self.num_skipped_before + sum(self.ranks.of_replicas(self.data.num_skipped))

    def evaluate(self) -> dict[str, float]:
        """Evaluates the held-out samples; logs figures and answers."""
        # the ranks of one replica compute together; one replica is enough
        logger.info(f"step {self.step}: evaluating")
        evaluation = self.evaluator.evaluate() if self.mesh.dp_rank == 0 else Evaluation({})
        figures = self.ranks.from_first({name: float(value) for name, value in evaluation.figures.items()})
        logger.info(self.progress.line(self.step, figures))
        self.record(figures)
        if self.mesh.is_first:
            write_readings(self.checkpoints.folder / SAMPLES_FILE, self.step, evaluation)
        num_shown = getattr(self.config.evaluation, "num_shown", 0)
        for reading in evaluation.readings[:num_shown]:
            logger.info(f"  {reading.origin}: {reading.text!r}, expected {reading.reference!r}")
        return figures

    def note_best(self, figures: dict[str, float]) -> bool:
        """Records the figure of the config; returns whether the model is the best so far."""
        name = self.config.best
        if name is None or (self.best and figures[name] >= self.best[name]):
            return False
        self.best = {"step": self.step, **figures}
        return True

    def save(self) -> None:
        """Writes a checkpoint and removes old ones."""
        state = {
            "step": self.step,
            "source": self.data.merge(self.ranks.of_replicas(self.data.state)),
            "best": self.best,
            "window": self.window,
            "terms": self.terms,
            "num_overflows": self.num_overflows,
            "num_updates": self.num_updates,
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
            if self.family.part_files:
                names = [parameter.name for parameter in self.model.trainable_params()]
                self.family.part_files.write(folder, names, self.family.models)
            for name, content in self.companions.items():
                (folder / name).write_bytes(content)
            write_state(folder, state)

        path = self.checkpoints.write(self.step, fill)
        if self.best:
            self.checkpoints.write_best({"checkpoint": f"step-{self.best['step']}", **self.best})
        self.checkpoints.prune(self.config.keep_checkpoints, besides=self.best and self.best["step"])
        logger.info(f"saved {path}")


def write_readings(path: Path, step: int, evaluation: Evaluation) -> None:
    """Appends the answers of an evaluation. Raises UserError if they cannot be written."""
    try:
        # the output of a model may contain half of a surrogate pair
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for reading in evaluation.readings:
                file.write(json.dumps({"step": step, **vars(reading)}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free disk space and start again") from None
