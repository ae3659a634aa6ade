"""Models of lmms-eval: `lmms-eval eval --model mindvlm --model_args config_path=PATH --tasks NAME`.

lmms-eval finds `manifest` by an entry point of the package. This is the only module that imports lmms-eval.
"""

import os
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from tqdm import tqdm

import mindvlm
from mindvlm.core.errors import UserError, counted
from mindvlm.evaluation.frameworks.messages import Asked, check_kinds, read_messages

Job = tuple[dict[str, Any], Callable[[], Asked]]
"""Options of lmms-eval, and a function that reads the question and its pictures."""


class Loss(GenerationResult):
    """A loss, and whether the reply is the greedy one. lmms-eval 0.7.3 turns any other pair into text."""

    def __iter__(self):
        return iter(self.text)


class SimpleModel(lmms):
    """A model that reads the text of a task and its pictures; every type of task works.

    Questions are answered in the slots of the engine, as many at a time as it has. `--batch_size` has no effect.

    Args:
        config_path: the model, as in `mindvlm.load`.
        overrides: keys of the YAML, as in `mindvlm.load`.

    Raises:
        UserError: the model cannot be loaded or generates no text, or there are several processes.
    """

    def __init__(self, config_path: str = "", batch_size: Any = None, max_batch_size: Any = None, **overrides: Any):
        super().__init__()
        if not config_path:
            raise UserError("--model_args has no config_path; give config_path=PATH of a YAML or a checkpoint folder")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("WORLD_SIZE is more than 1; start lmms-eval in one process, which fills the device")
        self.model = mindvlm.load(str(config_path), progress=logger.info, **overrides)
        if not hasattr(self.model, "generate_each"):
            raise UserError(f"config_path {config_path} generates pictures; give a model that answers with text")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers questions. One that cannot be answered has an empty answer, and a warning names it.

        Raises:
            UserError: none can be answered.
        """
        return self.answer_all([self.job(*request.args) for request in requests])

    def job(self, context, options, doc_to_visual, doc_id, task, split) -> Job:
        """Returns the job of a request."""
        return options, lambda: (context, self.pictures(doc_to_visual, doc_id, task, split), [])

    def pictures(self, doc_to_visual: Callable | None, doc_id: Any, task: str, split: str) -> list[Any]:
        """Returns the pictures of a question."""
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
        return as_pictures(visuals)

    def answer_all(self, jobs: Sequence[Job]) -> list[GenerationResult]:
        """Answers jobs in the slots of the engine, those with the same options together."""
        options = [generation_options(given) for given, _ in jobs]
        results = [GenerationResult("")] * len(jobs)
        errors: dict[int, UserError] = {}
        numbers = sorted(range(len(jobs)), key=lambda number: (repr(options[number]), number))
        with tqdm(total=len(jobs), desc="Model Responding") as progress:
            for _, group in groupby(numbers, key=lambda number: repr(options[number])):
                members = list(group)
                asked_numbers: list[int] = []

                def asked(members=members, asked_numbers=asked_numbers):
                    for number in members:
                        try:
                            query = jobs[number][1]()
                        except UserError as error:
                            errors[number] = error
                            progress.update()
                            continue
                        asked_numbers.append(number)
                        yield query

                for at, answer in self.model.generate_each(asked(), len(members), **options[members[0]]):
                    if isinstance(answer, UserError):
                        errors[asked_numbers[at]] = answer
                    else:
                        counts = TokenCounts(answer.num_prompt_tokens, answer.num_new_tokens)
                        results[asked_numbers[at]] = GenerationResult(str(answer), counts)
                    progress.update()
        for number, error in sorted(errors.items()):
            logger.warning(f"request {number} cannot be answered, its answer is empty: {error}")
        if jobs and len(errors) == len(jobs):
            raise UserError(f"none of {counted(len(jobs), 'request')} can be answered: {next(iter(errors.values()))}")
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[Loss]:
        """Returns the loss of replies, the mean over their tokens, and whether each is the greedy reply.

        lmms-eval chooses the option with the smallest value, because its own models return the loss as well. White
        space around a reply is left out, because the template adds its own.
        """
        found = []
        for request in tqdm(requests, desc="Model Responding"):
            context, reply, *rest = request.args
            doc_to_visual, *place = rest or (None, None, None, None)
            if callable(reply):
                doc_id, task, split = place
                reply = reply(self.task_dict[task][split][doc_id])
            pictures = self.pictures(doc_to_visual, *place)
            logarithms, is_greedy = self.model.reply_probabilities(context, str(reply).strip(), pictures)
            found.append(Loss((-float(logarithms.mean()), is_greedy)))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers questions whose next round depends on the answers so far; returns those of all rounds."""
        states = [Rounds(request, self) for request in requests]
        number = 0
        while running := [state for state in states if not state.is_over]:
            for state, result in zip(running, self.answer_all([state.job() for state in running]), strict=True):
                state.answers.append(result.text)
            number += 1
            for state in running:
                state.advance(number)
        return [state.answers for state in states]


class Rounds:
    """A request of several rounds."""

    def __init__(self, request: Instance, model: SimpleModel):
        self.context, self.options, doc_to_visual, self.next_round, doc_id, task, split = request.args
        self.doc = model.task_dict[task][split][doc_id]
        self.visuals = doc_to_visual(self.doc) if doc_to_visual else None
        self.answers: list[str] = []
        self.info: Any = None
        self.is_over = False

    def job(self) -> Job:
        """Returns the job of the current round."""
        context, visuals = self.context, self.visuals
        return self.options, lambda: (context, as_pictures(visuals), [])

    def advance(self, number: int) -> None:
        """Asks the task for the next round."""
        visuals, context, self.is_over, answers, self.info = self.next_round(
            self.doc, previous_output=list(self.answers), round_idx=number, previous_round_info=self.info
        )
        self.answers = list(answers)
        if not self.is_over:
            self.visuals, self.context = visuals, context


class ChatModel(SimpleModel):
    """A model that reads the messages of a task, with pictures between texts and earlier turns."""

    is_simple = False

    def job(self, context, doc_to_messages, options, doc_id, task, split) -> Job:
        """Returns the job of a request."""

        def read() -> Asked:
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            pairs = [(message["role"], as_parts(message["content"])) for message in messages]
            return read_messages(pairs, self.model.processor)

        return options, read


def manifest() -> ModelManifest:
    """Returns what lmms-eval registers: it prefers the model of messages, and `--force_simple` chooses the other."""
    module = __name__
    return ModelManifest("mindvlm", f"{module}.{SimpleModel.__name__}", f"{module}.{ChatModel.__name__}")


def as_parts(content: str | Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Returns the content of a message of lmms-eval as parts."""
    if isinstance(content, str):
        return [("text", content)]
    return [(part["type"], part["text"] if part["type"] == "text" else part["url"]) for part in content]


def as_pictures(visuals: Any) -> list[Any]:
    """Returns the visuals of a task as a list of pictures. Raises UserError if one is a sound."""
    pictures = list(visuals) if isinstance(visuals, list | tuple) else [] if visuals is None else [visuals]
    check_kinds([("sound" if isinstance(picture, dict) else "image", picture) for picture in pictures])
    return pictures


def generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """Returns options of lmms-eval as options of `mindvlm`; those of single tasks or other models are left out.

    Raises:
        UserError: beam search is asked for.
    """
    if (given.get("num_beams") or 1) > 1:
        raise UserError(f"num_beams is {given['num_beams']}; expected 1, without beams: --gen_kwargs num_beams=1")
    temperature = given.get("temperature")
    samples = given.get("do_sample", bool(temperature)) and temperature != 0
    options: dict[str, Any] = {"do_sample": bool(samples)}
    if samples:
        keys = ("temperature", "top_p", "top_k")
        options |= {key: given[key] for key in keys if given.get(key) is not None}
    keys = ("max_new_tokens", "repetition_penalty", "no_repeat_ngram_size")
    options |= {key: given[key] for key in keys if given.get(key) is not None}
    until = given.get("until") or []
    stops = [text for text in ([until] if isinstance(until, str) else until) if text]
    return options | ({"stop_strings": stops} if stops else {})
