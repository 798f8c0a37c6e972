"""Prometheus metrics of the HTTP front: its own names (`baton_`), and vLLM's where dashboards already read those.

Every value is kept once, in plain counters and bucket arrays that cost a fraction of a microsecond per token, and
exported under each of its names when scraped. One writer: the event loop.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.request import FinishReason
from router.generation import Timeline

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
ABORTED, FAILED = "abort", "error"  # vLLM's names: the client left, or got an error
ENDS = (*(reason.value for reason in FinishReason), ABORTED, FAILED)
_LONG_SECONDS = (*SECONDS, 40.0, 80.0, 160.0, 640.0, 2560.0)
_TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
_BYTES = tuple(float(4**power) for power in range(5, 18))
_BYTES_PER_SECOND = tuple(float(step * 10**power) for power in range(7, 13) for step in (1, 2, 5))


@dataclass(slots=True)
class Histogram:
    name: str
    help: str
    bounds: Sequence[float]
    vllm: bool = False  # also exported under vLLM's prefix
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, prefix: str, model: str) -> Metric:
        family = HistogramMetricFamily(prefix + self.name, self.help, labels=["model_name"])
        family.add_metric([model], self.buckets(), self.total)
        return family

    def buckets(self) -> list[tuple[str, int]]:
        """As the exposition format has them: each with what is in the smaller ones."""
        bounds = [*map(str, self.bounds), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))


class IndexWatch(Protocol):
    """What the dispatcher knows of how far its index is behind the workers."""

    index_lag: Histogram

    def index_lags(self) -> Iterable[tuple[str, float, int]]:
        """Of each attached worker: lag of its last events, seconds; blocks that it holds beyond those in the index."""
        ...


@dataclass(slots=True)
class Transfers:
    """The handoffs of one transport."""

    num_bytes: int = 0
    bandwidth: Histogram = field(
        default_factory=lambda: Histogram(
            "kv_transfer_bytes_per_second",
            "KV bytes of a request over the time they were in transfer.",
            _BYTES_PER_SECOND,
        )
    )


@dataclass(frozen=True, slots=True)
class _Families(Collector):
    families: Sequence[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


class Metrics(Collector):
    """`model` is the value of the model_name label."""

    def __init__(self, model: str, index: IndexWatch | None = None) -> None:
        self._index = index
        self.num_waiting = 0  # requests without a first token
        self.num_running = 0  # requests with a first token, not ended
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()  # one of ENDS -> choices that had been started
        self.responses: Counter[tuple[str, int]] = Counter()  # route, status -> HTTP responses; 499: client left before
        self.first_token = Histogram("time_to_first_token_seconds", "Time to first token.", _LONG_SECONDS, vllm=True)
        self.inter_token = Histogram(
            "inter_token_latency_seconds", "Time between a choice's deltas.", SECONDS, vllm=True
        )
        self.e2e = Histogram("e2e_request_latency_seconds", "Time from arrival to the end.", _LONG_SECONDS, vllm=True)
        self.queued = Histogram("request_queue_time_seconds", "Time before prefill began.", _LONG_SECONDS, vllm=True)
        self.prefill = Histogram("request_prefill_time_seconds", "Time in prefill.", _LONG_SECONDS, vllm=True)
        self.decode = Histogram("request_decode_time_seconds", "Time in decode.", _LONG_SECONDS, vllm=True)
        self.prompt_length = Histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS, vllm=True)
        self.output_length = Histogram("request_generation_tokens", "Output tokens of a choice.", _TOKENS, vllm=True)
        self.transfer_bytes = Histogram("kv_transfer_bytes", "KV bytes moved for a choice that ran to its end.", _BYTES)
        self.transfer_time = Histogram("kv_transfer_seconds", "Time KV of a request was in transfer.", SECONDS)
        self.exposed_time = Histogram(
            "kv_transfer_exposed_seconds", "Transfer time that prefill did not hide.", SECONDS
        )
        self.transfers: dict[str, Transfers] = {}  # by transport
        self._model = model

    def finish(self, timeline: Timeline, num_prompt: int, num_output: int, reason: FinishReason, now: float) -> None:
        """Count one choice that ran to its end."""
        self.finished[reason.value] += 1
        self.prompt_tokens += num_prompt
        self.cached_prompt_tokens += timeline.cached_tokens
        self.generation_tokens += num_output
        self.prompt_length.observe(num_prompt)
        self.output_length.observe(num_output)
        self.e2e.observe(now - timeline.received)
        waited = 0.0 if timeline.dispatched is None else timeline.dispatched - timeline.received
        self.queued.observe(waited + timeline.queued_s)
        self.prefill.observe(timeline.prefill_s)
        self.decode.observe(timeline.decode_s)
        if timeline.transfer_bytes:
            transfers = self.transfers.setdefault(timeline.transport, Transfers())
            transfers.num_bytes += timeline.transfer_bytes
            if timeline.transfer_s > 0:
                transfers.bandwidth.observe(timeline.transfer_bytes / timeline.transfer_s)
            self.transfer_bytes.observe(timeline.transfer_bytes)
            self.transfer_time.observe(timeline.transfer_s)
            self.exposed_time.observe(timeline.exposed_s)

    def snapshot(self) -> Collector:
        """All of now, to be collected in any thread."""
        return _Families(list(self.collect()))

    def collect(self) -> Iterator[Metric]:
        """On the event loop."""
        for histogram in self._histograms():
            yield histogram.family("baton_", self._model)
            if histogram.vllm:
                yield histogram.family("vllm:", self._model)
        for prefix in ("baton_", "vllm:"):
            yield from self._shared(prefix)
        yield self._counter(
            "baton_prompt_tokens_cached", "Prompt tokens that needed no prefill.", self.cached_prompt_tokens
        )
        yield from self._by_transport()
        responses = CounterMetricFamily("baton_http_responses", "HTTP responses.", labels=["route", "status"])
        for (route, status), count in self.responses.items():
            responses.add_metric([route, str(status)], count)
        yield responses
        if self._index is not None:
            yield from self._of_index(self._index)

    def _histograms(self) -> list[Histogram]:
        return [value for value in vars(self).values() if isinstance(value, Histogram)]

    def _of_index(self, index: IndexWatch) -> Iterator[Metric]:
        yield index.index_lag.family("baton_", self._model)
        lag = GaugeMetricFamily(
            "baton_worker_index_lag_seconds", "Lag of a worker's last blocks.", labels=["worker_id"]
        )
        behind = GaugeMetricFamily(
            "baton_worker_index_blocks_behind",
            "Blocks by which the index of a worker and what it has cached, by its last report, differ.",
            labels=["worker_id"],
        )
        for worker_id, lag_s, num_behind in index.index_lags():
            lag.add_metric([worker_id], lag_s)
            behind.add_metric([worker_id], abs(num_behind))  # of several processes the largest is shown
        yield lag
        yield behind

    def _by_transport(self) -> Iterator[Metric]:
        labels = ["model_name", "transport"]
        moved = CounterMetricFamily(
            "baton_kv_transferred_bytes", "KV bytes moved for choices that ran to their end.", labels=labels
        )
        shape = Transfers().bandwidth
        bandwidth = HistogramMetricFamily("baton_" + shape.name, shape.help, labels=labels)
        for transport, transfers in self.transfers.items():
            moved.add_metric([self._model, transport], transfers.num_bytes)
            bandwidth.add_metric([self._model, transport], transfers.bandwidth.buckets(), transfers.bandwidth.total)
        yield moved
        yield bandwidth

    def _shared(self, prefix: str) -> Iterator[Metric]:
        yield self._counter(prefix + "prompt_tokens", "Prompt tokens of finished requests.", self.prompt_tokens)
        yield self._counter(prefix + "generation_tokens", "Output tokens of finished choices.", self.generation_tokens)
        success = CounterMetricFamily(
            prefix + "request_success", "Choices that ended.", labels=["model_name", "finished_reason"]
        )
        for end in ENDS:
            success.add_metric([self._model, end], self.finished[end])
        yield success
        for name, text, value in (
            ("num_requests_waiting", "Requests without a first token.", self.num_waiting),
            ("num_requests_running", "Requests that are producing tokens.", self.num_running),
        ):
            gauge = GaugeMetricFamily(prefix + name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge

    def _counter(self, name: str, text: str, value: float) -> Metric:
        counter = CounterMetricFamily(name, text, labels=["model_name"])
        counter.add_metric([self._model], value)
        return counter
