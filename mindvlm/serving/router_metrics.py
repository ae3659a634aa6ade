"""Figures of a router in Prometheus's text format, together with those of its replicas."""

import asyncio
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from mindvlm.serving.fleet import Fleet
from mindvlm.serving.replica import Replica


class RouterMetrics:
    """The figures of a router.

    Attributes:
        responses: counts the responses by path and status.
    """

    def __init__(self, fleet: Fleet):
        self.fleet, self.registry = fleet, CollectorRegistry()
        self.responses = Counter(
            "mindvlm_router_requests", "responses by path and status", ["path", "status"], registry=self.registry
        )

    async def text(self) -> bytes:
        """Returns all figures; those of a replica have the labels model and replica."""
        replicas = self.fleet.replicas
        texts = await asyncio.gather(*(replica.metrics() for replica in replicas))
        found = merged((labels(replica), text) for replica, text in zip(replicas, texts, strict=True) if text)
        families = [*self.registry.collect(), *self.states(), *found]
        return generate_latest(SimpleNamespace(collect=lambda: families))

    def states(self) -> list[Metric]:
        """Returns which replicas are ready, and how often each was started."""
        ready = GaugeMetricFamily("mindvlm_replica_ready", "1 if the replica answers", labels=["model", "replica"])
        starts = CounterMetricFamily(
            "mindvlm_replica_starts", "starts of the process of a replica", labels=["model", "replica"]
        )
        for replica in self.fleet.replicas:
            values = list(labels(replica).values())
            ready.add_metric(values, replica.is_ready)
            starts.add_metric(values, replica.num_starts)
        return [ready, starts]


def labels(replica: Replica) -> dict[str, str]:
    return {"model": replica.name, "replica": str(replica.number)}


def merged(texts: Iterable[tuple[Mapping[str, str], str]]) -> list[Metric]:
    """Returns the families of several texts, each once, whose samples have the labels of their text besides."""
    families: dict[str, Metric] = {}
    for added, text in texts:
        for family in text_string_to_metric_families(text):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [sample._replace(labels=sample.labels | added) for sample in family.samples]
    return list(families.values())
