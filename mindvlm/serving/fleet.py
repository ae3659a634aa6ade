"""All child processes of a router: several models, each with several replicas."""

import asyncio
import tempfile
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mindvlm.core.errors import UserError
from mindvlm.serving.errors import ApiError, shown
from mindvlm.serving.plan import ModelPlan
from mindvlm.serving.replica import Replica

RETRY = {"Retry-After": "2"}


class ServedModel:
    """A model and its replicas."""

    def __init__(self, replicas: Sequence[Replica]):
        self.replicas = replicas

    @property
    def name(self) -> str:
        return self.replicas[0].name

    @property
    def card(self) -> dict[str, Any] | None:
        """The entry of the model in `/v1/models`; None until it was loaded once."""
        return self.replicas[0].card

    def choose(self, key: int, without: Sequence[Replica] = ()) -> Replica:
        """Returns the replica with the fewest requests under way.

        Args:
            key: of the conversation. Among equally busy replicas equal keys prefer the same one, which may still have
                the beginning of the prompt in its cache.

            without: replicas that cannot be reached.

        Raises:
            ApiError: none is ready.
        """
        ready = [replica for replica in self.replicas if replica.is_ready and replica not in without]
        if not ready:
            raise self.unavailable()
        return min(ready, key=lambda replica: (replica.num_running, hash((key, replica.number))))

    def unavailable(self) -> ApiError:
        """Returns the error while no replica is ready."""
        if all(replica.has_given_up for replica in self.replicas):
            message = f"the model {self.name} has failed too often; its server must be restarted, see its log"
            return ApiError(503, message, code="replica_failed", headers={"x-should-retry": "false"})
        return ApiError(503, f"the model {self.name} is loading; try again in a moment", code="loading", headers=RETRY)


class Fleet:
    """The models of a router.

    Args:
        command: starts the process of a replica, see `Replica`.
        plans: one for each model, with different names.
        num_replicas: of each model.
        environments: variables for each process, see `machine_shares`.
        any_model: whether unknown names mean the first model.
    """

    def __init__(
        self,
        command: Sequence[str],
        plans: Sequence[ModelPlan],
        num_replicas: int,
        environments: Sequence[Mapping[str, str]],
        *,
        any_model: bool,
    ):
        self.any_model = any_model
        # other users cannot enter it
        self.folder = tempfile.TemporaryDirectory(prefix="mindvlm-")
        self.models = []
        for plan in plans:
            # the router checks keys, names and origins
            plan = replace(plan, settings=replace(plan.settings, api_keys=(), own_names=(), cors_origins=()))
            replicas = [
                Replica(
                    plan,
                    number,
                    command=command,
                    environment=environments[len(self.models) * num_replicas + number],
                    path=f"{self.folder.name}/{len(self.models)}.{number}",
                )
                for number in range(num_replicas)
            ]
            self.models.append(ServedModel(replicas))

    @property
    def replicas(self) -> list[Replica]:
        return [replica for model in self.models for replica in model.replicas]

    def find(self, name: str | None) -> ServedModel:
        """Returns the model of a name, the first one for None. Raises ApiError if there is none."""
        found = next((model for model in self.models if name in (None, model.name)), None)
        if found:
            return found
        if self.any_model:
            return self.models[0]
        known = ", ".join(repr(model.name) for model in self.models)
        message = f"the model {shown(name)} does not exist; this server has {known}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def check_ready(self) -> None:
        """Raises ApiError unless each model has a ready replica."""
        for model in self.models:
            model.choose(0)

    async def run(self) -> None:
        """Keeps all processes running until it is cancelled, and ends them then.

        Raises:
            UserError: one could not start, or none is left.
        """
        tasks = [asyncio.create_task(work) for model in self.models for work in supervisions(model)]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in ended:
                task.result()
            raise UserError("all processes have failed; see their messages above")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.folder.cleanup()


def supervisions(model: ServedModel) -> list[Coroutine]:
    """Returns the work that keeps each replica running. The first one fills the caches of weights and graphs."""
    first, *others = model.replicas

    async def follow(replica: Replica) -> None:
        await first.was_ready.wait()
        await replica.supervise()

    return [first.supervise(), *map(follow, others)]
