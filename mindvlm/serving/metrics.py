"""Figures of the server in Prometheus's text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mindvlm.serving.jobs import Finish, Job

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = {"registry": self.registry}
        self.requests = Counter("mindvlm_requests", "responses by path and status", ["path", "status"], **made)
        self.running = Gauge("mindvlm_running_answers", "answers in a slot", **made)
        self.waiting = Gauge("mindvlm_waiting_answers", "answers that wait for a slot", **made)
        self.finished = Counter("mindvlm_finished_answers", "answers by stop reason", ["stop_reason"], **made)
        self.prompt_tokens = Counter("mindvlm_prompt_tokens", "tokens of prompts", **made)
        self.reused_tokens = Counter("mindvlm_reused_prompt_tokens", "tokens of prompts found in the cache", **made)
        self.new_tokens = Counter("mindvlm_generated_tokens", "generated tokens", **made)
        self.first_token = Histogram(
            "mindvlm_first_token_seconds", "time from the request to the first token", buckets=SECONDS, **made
        )
        self.answer = Histogram(
            "mindvlm_answer_seconds", "time from the request to the end of the answer", buckets=SECONDS, **made
        )

    def note_finish(self, job: Job, finish: Finish, now: float) -> None:
        """Adds a finished answer."""
        self.finished.labels(finish.stop_reason).inc()
        self.prompt_tokens.inc(finish.num_prompt_tokens)
        self.reused_tokens.inc(finish.num_reused)
        self.new_tokens.inc(finish.num_new_tokens)
        self.answer.observe(now - job.asked_at)

    @property
    def text(self) -> bytes:
        return generate_latest(self.registry)
