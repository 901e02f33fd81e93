"""What Prometheus is told."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.service import Service
from services.streaming import Hub

_METHODS = ("GET", "HEAD", "POST")
"""Those that routes have; what else clients write is theirs to invent, and makes no series of its own."""


class Metrics:
    """The service's own registry: counts as they come, and looks at the rest when it is asked."""

    def __init__(self, service: Service, hub: Hub) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Looked(service, hub))
        self._requests = Counter(
            "lora_sweeps_http_requests",
            "Answers by route and status.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "lora_sweeps_http_request_seconds", "Time to an answer's first byte.", ["route"], registry=self._registry
        )
        self.refused = Counter("lora_sweeps_refused_tokens", "Requests without a valid token.", registry=self._registry)

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Counts and times an answer."""
        # The route and not the path, which has as many values as there are sweeps.
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in _METHODS and status != 405 else "other"
        self._requests.labels(method, route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' format."""
        return generate_latest(self._registry)


class _Looked(Collector):
    """What is looked up when it is asked for."""

    def __init__(self, service: Service, hub: Hub) -> None:
        self._service, self._hub = service, hub

    def collect(self) -> Iterator[Metric]:
        sweeps = GaugeMetricFamily("lora_sweeps_sweeps", "Sweeps by state.", labels=["state"])
        for state, count in self._service.store.counts().items():
            sweeps.add_metric([state], count)
        yield sweeps
        hours = GaugeMetricFamily(
            "lora_sweeps_used_device_hours", "Device-hours of each user within the window.", labels=["user"]
        )
        for user, used in self._service.supervisor.used_hours().items():
            hours.add_metric([user], used)
        yield hours
        yield GaugeMetricFamily("lora_sweeps_event_streams", "Listeners to events.", value=self._hub.listeners)
        trouble = float(bool(self._service.supervisor.trouble))
        yield GaugeMetricFamily("lora_sweeps_supervisor_trouble", "1 where drivers cannot be looked at.", value=trouble)


class Measured:
    """Counts and times every answer, up to its first byte."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, answered = time.perf_counter(), False

        async def noted(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                self._metrics.answered(scope, message["status"], time.perf_counter() - began_s)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            if not answered:
                self._metrics.answered(scope, 500, time.perf_counter() - began_s)
