"""What the server counts, for Prometheus."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..scheduling import Answering, Scheduler
from .access import Application, Receive, Scope, Send

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 300)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "switchkd_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self._answers = Counter(
            "switchkd_answers", "Accepted questions by how they ended.", ["model", "outcome"], registry=registry
        )
        self._prompt = Counter("switchkd_prompt_tokens", "Tokens of prompts read.", ["model"], registry=registry)
        self._completion = Counter("switchkd_completion_tokens", "Tokens written.", ["model"], registry=registry)
        self._stages = Histogram(
            "switchkd_stage_seconds",
            "Seconds of an answer by stage: queue, encode (pictures), prefill, decode.",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "switchkd_time_to_first_token_seconds",
            "Seconds from a question to the first piece of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(self, schedulers: Mapping[str, Scheduler]) -> None:
        """Read queues when asked."""
        self._registry.register(_Queues(schedulers))

    def count_answer(self, model: str, answering: Answering) -> None:
        """Count what is left of an accepted question: tokens, seconds, how it ended."""
        self._answers.labels(model, answering.outcome or "failed").inc()
        if answering.started is not None:
            self._stages.labels(model, "queue").observe(answering.started - answering.accepted)
        if answering.first_piece is not None:
            self._first.labels(model).observe(answering.first_piece - answering.accepted)
        if (ended := answering.ended) is not None:
            self._prompt.labels(model).inc(ended.prompt_tokens)
            self._completion.labels(model).inc(ended.completion_tokens)
            seconds = ended.seconds
            stages = {"encode": seconds.pictures, "prefill": seconds.prefill, "decode": seconds.decode}
            for stage, taken in stages.items():
                self._stages.labels(model, stage).observe(taken)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _Queues(Collector):
    """The numbers that the schedulers know themselves."""

    def __init__(self, schedulers: Mapping[str, Scheduler]) -> None:
        self._schedulers = schedulers

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("switchkd_queue_length", "Questions that wait.", labels=["model"])
        running = GaugeMetricFamily("switchkd_running", "Answers under way.", labels=["model"])
        restarts = CounterMetricFamily("switchkd_engine_restarts", "Engines that died.", labels=["model"])
        for model, scheduler in self._schedulers.items():
            waiting.add_metric([model], scheduler.waiting)
            running.add_metric([model], scheduler.running)
            restarts.add_metric([model], scheduler.restarts)
        yield from (waiting, running, restarts)


class CountRequests:
    """Counts every response by its route and status."""

    def __init__(self, app: Application, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "499"  # the caller left before there was one

        async def note(message: Scope) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # paths are the callers' to invent
            self._metrics.requests.labels(route, status).inc()
