"""The thread that owns the model: it loads it, and generates the answers of all clients in the engine's slots."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from mindspore import Tensor

from mindvlm.core.errors import UserError
from mindvlm.generation.images import ImageFeatures
from mindvlm.generation.request import Addition, Request
from mindvlm.serving.errors import ApiError
from mindvlm.serving.jobs import Event, Job
from mindvlm.serving.metrics import Metrics
from mindvlm.serving.picture_process import PictureProcess, start_picture_process
from mindvlm.serving.prefixes import PromptCache, prompt_key
from mindvlm.serving.prompts import Prompt
from mindvlm.serving.settings import ServerSettings
from mindvlm.serving.warming import warm_pictures, warm_up
from mindvlm.sessions.vision_language_model import VisionLanguageModel

logger = logging.getLogger(__name__)

RETRY_SECONDS = 2

PIECE_SECONDS = 0.02
"""Tokens that follow each other faster are sent together, and those of all answers at once, because every message costs
more time than a small model needs for a token."""

START_SECONDS = 0.01
"""While answers run, prompts wait for this time after others, so that several are prefilled together."""


class Scheduler:
    """Generates answers with continuous batching: a job takes a slot as soon as one is free, between two steps.

    Nothing else uses the model's engine. `submit` and `cancel` may be called from any thread.

    Args:
        load: returns the model; called in the thread of the scheduler.
        settings: number of slots and limits.
        metrics: figures to update.
        post: calls a function with arguments in the thread of the requests.
        on_ready: called with the model when it answers.
        on_end: called if the model cannot be loaded.

    Attributes:
        model: the loaded model; None while it is loading.
        picture_process: encodes pictures; None without.
        failure: the error that prevents loading.
    """

    def __init__(
        self,
        load: Callable[[], VisionLanguageModel],
        settings: ServerSettings,
        metrics: Metrics,
        *,
        post: Callable[..., None],
        on_ready: Callable[[VisionLanguageModel], None] = lambda model: None,
        on_end: Callable[[], None] = lambda: None,
    ):
        self.load, self.settings, self.metrics = load, settings, metrics
        self.post, self.on_ready, self.on_end = post, on_ready, on_end
        self.model: VisionLanguageModel | None = None
        self.picture_process: PictureProcess | None = None
        self.failure: UserError | None = None
        self.waiting: deque[Job] = deque()
        self.starting: list[Job] = []
        self.last_start = self.last_pieces = 0.0
        self.running: dict[int, Job] = {}
        self.finished = PromptCache()
        self.news: list[tuple[Job, Event]] = []
        self.changed = threading.Condition()
        self.is_closing = False
        self.thread = threading.Thread(target=self.run, name="scheduler", daemon=True)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts jobs into the queue.

        Raises:
            ApiError: the server is closing, too many jobs wait, or there is never room for so many.
        """
        with self.changed:
            if self.is_closing:
                raise ApiError(503, "the server is shutting down", code="closing")
            self.check_room(len(jobs))
            num_bytes, num_new = sum(job.prompt.num_bytes for job in self.waiting), jobs[0].prompt.num_bytes
            if num_bytes and num_new and num_bytes + num_new > self.settings.max_waiting_bytes:
                raise queue_full(f"the pictures of the answers that wait for a slot have {num_bytes} bytes")
            self.waiting.extend(jobs)
            self.changed.notify()

    def check_room(self, num_jobs: int, num_before: int = 0) -> None:
        """Raises ApiError if there is no room for more jobs.

        Args:
            num_before: number of jobs that will be submitted before them.
        """
        limit = self.settings.num_slots + self.settings.max_waiting
        if num_jobs > limit:
            raise ApiError(400, f"{num_jobs} answers; this server has room for {limit}, ask for fewer at a time")
        num_waiting = len(self.waiting) + num_before
        if num_waiting + len(self.starting) + len(self.running) + num_jobs > limit:
            raise queue_full(f"{num_waiting} answers wait for a slot, the limit is {self.settings.max_waiting}")

    def cancel(self, job: Job) -> None:
        """Ends a job that nobody waits for. Its slot is free after the current step."""
        with self.changed:
            job.is_cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)
            self.changed.notify()

    def close(self) -> None:
        """Ends the thread after the current step. Unfinished jobs get an error."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()

    def run(self) -> None:
        """Loads the model, then works until `close`."""
        try:
            model = self.load()
            self.processor_limits(model)
            self.prepare(model)
            self.model = model
        except UserError as error:
            self.failure = error
        except Exception as error:
            logger.exception("the model cannot be loaded")
            self.failure = UserError(f"the model cannot be loaded: {error}; see the log")
        if self.failure:
            self.end_picture_process()
            self.on_end()
            return
        self.on_ready(model)
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.running or self.is_closing)
                if self.is_closing:
                    break
            self.work()
        self.fail_all(ApiError(503, "the server is shutting down", code="closing"))
        self.publish()
        self.end_picture_process()

    def prepare(self, model: VisionLanguageModel) -> None:
        """Starts the picture process, and compiles the graphs."""
        if self.settings.has_picture_process:
            self.picture_process = start_picture_process(model)
        warm_up(model, self.settings.num_slots)
        if self.picture_process and not self.picture_process.wait_until_ready():
            logger.error("the picture process does not start; the process of the server encodes pictures")
            self.picture_process = None
        if model.engine.is_exact and not self.picture_process:
            warm_pictures(model)

    def end_picture_process(self) -> None:
        if self.picture_process:
            self.picture_process.end()

    @property
    def reuses_prompts(self) -> bool:
        """Whether prompts are reused, which needs an engine that computes the rest of a prompt to the same bits."""
        return self.settings.reuses_prompts and self.model.engine.is_exact

    def processor_limits(self, model: VisionLanguageModel) -> None:
        """Applies the limit of pixels to the processor of the model."""
        model.processor.max_pixels = min(model.processor.max_pixels, self.settings.max_pixels)

    def work(self) -> None:
        """Starts the jobs for which slots are free, and generates a token of each running job."""
        try:
            self.drop_ended()
            if self.take_jobs():
                self.start()
            self.step()
        except Exception:
            logger.exception("the engine failed")
            error = ApiError(500, "the engine failed; see the log of the server", code="engine_failed")
            self.fail_all(error)
            self.clear()
        self.publish()

    def clear(self) -> None:
        """Empties the engine after a failure."""
        self.starting = []
        self.running.clear()
        self.finished.clear()
        try:
            self.model.engine.clear()
        except Exception:
            logger.exception("the cache of the engine cannot be cleared")

    def take_jobs(self) -> bool:
        """Moves the waiting jobs for which there are slots to `starting`; returns whether there are some."""
        with self.changed:
            num_free = self.settings.num_slots - len(self.running)
            if self.running and time.monotonic() - self.last_start < START_SECONDS:
                return False
            count = min(len(self.waiting), num_free)
            self.starting = [self.waiting.popleft() for _ in range(count)]
        return count > 0

    def drop_ended(self) -> None:
        """Frees the slots of jobs that were cancelled or took too long."""
        for row, job in list(self.running.items()):
            if job.is_cancelled or job.is_expired:
                self.model.engine.release(job.slot)
                del self.running[row]
                if not job.is_cancelled:
                    self.news.append((job, Event(error=self.too_slow())))
        with self.changed:
            expired = [job for job in self.waiting if job.is_expired]
            for job in expired:
                self.waiting.remove(job)
        self.news += [(job, Event(error=self.too_slow())) for job in expired]

    def too_slow(self, remedy: str = "ask for fewer tokens") -> ApiError:
        return ApiError(
            504,
            f"the answer took longer than {self.settings.max_seconds:g} s; {remedy}",
            code="timeout",
            headers={"x-should-retry": "false"},
        )

    def start(self) -> None:
        """Encodes the pictures of starting jobs and prefills their prompts together."""
        now, additions = time.monotonic(), {}
        views = iter(self.model.encoder.encode_views([one for job in self.starting for one in job.prompt.pictures]))
        for job in list(self.starting):
            job.started_at = now
            features = [next(views) for _ in job.prompt.pictures]
            try:
                additions[job] = self.addition(job, features, sum(one.slot is None for one in additions.values()))
            except UserError as error:
                self.news.append((job, Event(error=ApiError(400, str(error)))))
                self.starting.remove(job)
        slots = self.model.engine.add_all(list(additions.values()))
        now = time.monotonic()
        for job, slot in zip(additions, slots, strict=True):
            job.slot, job.prefilled_at = slot, now
            self.running[slot.row] = job
        self.starting, self.last_start = [], time.monotonic()

    def addition(self, job: Job, features: Sequence[Tensor], num_before: int) -> Addition:
        """Returns the request of a job, with the kept slot that it continues, or with a free one left for it.

        Args:
            features: those of the views of each picture.
            num_before: number of jobs that take a free slot before it.

        Raises:
            UserError: the prompt exceeds the context, which is known only after its pictures are encoded.
        """
        engine = self.model.engine
        ids, features = final_prompt(self.model, job.prompt, features)
        engine.check_length(len(ids))
        job.key, slot, num_kept = prompt_key(ids, engine.placeholder_id, features), None, 0
        if self.reuses_prompts:
            slot, num_kept = self.finished.take(job.key, engine.alpha_for(len(ids)))
        if slot is None and engine.slots.count(None) == num_before:
            engine.release(self.finished.oldest())
        job.num_reused = num_kept
        request = Request(ids=ids, features=features.rows, options=job.options, stop=job.reason_after, seed=job.seed)
        return Addition(request, slot, num_kept)

    def step(self) -> None:
        """Generates the next token of each running job."""
        engine = self.model.engine
        stepped = engine.step()
        now = time.monotonic()
        sends_pieces = now - self.last_pieces >= PIECE_SECONDS
        if sends_pieces:
            self.last_pieces = now
        wants_logits = any(self.running[slot.row].top_logprobs is not None for slot in stepped)
        logits = engine.next_logits.asnumpy() if wants_logits else None
        for slot in stepped:
            job = self.running[slot.row]
            if slot.error:
                self.news.append((job, Event(error=ApiError(500, str(slot.error), code="not_finite"))))
                engine.release(slot)
                del self.running[slot.row]
                continue
            if len(slot.new_ids) == 1:
                self.metrics.first_token.observe(now - job.asked_at)
            chosen_from = logits[slot.row] if job.top_logprobs is not None else None
            event = job.take_token(chosen_from, sends_piece=sends_pieces)
            if event:
                self.news.append((job, event))
            if slot.stop_reason or job.has_failed:
                del self.running[slot.row]
                if job.has_failed:
                    engine.release(slot)
                    continue
                if self.reuses_prompts:
                    self.finished.keep(slot, job.key)
                else:
                    engine.release(slot)
                self.metrics.note_finish(job, job.finish, now)

    def fail_all(self, error: ApiError) -> None:
        """Reports an error to all running jobs, and to the waiting ones too if the server is closing."""
        failed = [*self.running.values(), *self.starting]
        if self.is_closing:
            with self.changed:
                failed += self.waiting
                self.waiting.clear()
        self.news += [(job, Event(error=error)) for job in failed]

    def publish(self) -> None:
        """Reports the news of all jobs at once."""
        self.metrics.running.set(len(self.running))
        self.metrics.waiting.set(len(self.waiting))
        news, self.news = self.news, []
        if news:
            self.post(deliver, news)


def queue_full(problem: str) -> ApiError:
    """Returns the error for a request for whose answers there is no room at the moment."""
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(429, f"{problem}; try again later", code="queue_full", headers=headers)


def deliver(news: Sequence[tuple[Job, Event]]) -> None:
    """Hands each event to its job."""
    for job, event in news:
        job.receive(event)


def final_prompt(
    model: VisionLanguageModel, prompt: Prompt, features: Sequence[Tensor]
) -> tuple[list[int], ImageFeatures]:
    """Returns the ids of a prompt and the feature rows of its pictures, whose number may be known only after encoding.

    Args:
        features: those of the views of each picture.
    """
    if prompt.prompter is None:
        return prompt.ids, ImageFeatures()
    text = [token for token in prompt.ids if token != model.engine.placeholder_id]
    features = model.encoder.rows(prompt.pictures, features, text)
    if features.counts == [len(picture.layout) for picture in prompt.pictures]:
        return prompt.ids, features
    return prompt.prompter(features.counts).input_ids, features
