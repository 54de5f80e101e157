"""Plain numbers become the metrics that the client library would have made of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.tallies import Spread

BOUNDS = (0.1, 1.0, 2.5)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.10001, 1.0, 2.4, 2.5, 2.6, 1e9]) | st.floats(0, 10)))
def test_a_spread_counts_as_the_client_librarys_histogram_does(values: list[float]) -> None:
    registry, spread = CollectorRegistry(), Spread(BOUNDS)
    theirs = Histogram("h", "h", buckets=BOUNDS, registry=registry)
    for value in values:
        theirs.observe(value)
        spread.observe(value)
    for (edge, count), le in zip(spread.cumulative(), ("0.1", "1.0", "2.5", "+Inf"), strict=True):
        assert count == registry.get_sample_value("h_bucket", {"le": le}), edge
    assert spread.total == registry.get_sample_value("h_sum")


def test_a_scrape_shows_what_was_counted() -> None:
    metrics = GatewayMetrics()
    tallies = metrics.of_requests.variant("n", "s", "v")
    tallies.outcomes["200"] += 3
    tallies.prompt_tokens += 70
    tallies.retries += 1
    tallies.ttft_s.observe(0.3)
    scraped = generate_latest(metrics.registry).decode()
    labels = {"namespace": "n", "service": "s", "variant": "v"}
    for name, more, value in (
        ("requests_total", {"outcome": "200"}, 3.0),
        ("tokens_total", {"kind": "prompt"}, 70.0),
        ("tokens_total", {"kind": "completion"}, 0.0),
        ("engine_failures_total", {}, 1.0),
        ("time_to_first_token_seconds_count", {}, 1.0),
        ("time_to_first_token_seconds_bucket", {"le": "0.3"}, 1.0),
        ("time_to_first_token_seconds_bucket", {"le": "0.2"}, 0.0),
    ):
        found = metrics.registry.get_sample_value(f"llmfleet_gateway_{name}", labels | more)
        assert found == value, name
        assert f"llmfleet_gateway_{name}{{" in scraped
