"""What the gateway tells of sizes and of engines' times is what happened, in sums that add up."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_testing.fake_engine import fake_engine
from gateway_testing.harness import CHAT, PATIENCE_S, STREAM, eventually, gateway_for, post
from gateway_testing.tables import BUCKETS, engines, fleet, table
from llmfleet.api import ALL_SERVICES, Buckets, DemandReport, ObservedSums, Part, ServiceDemand, VariantLoad
from llmfleet.gateway.main import gateway
from llmfleet.gateway.policy import RequestShape, Router, Ticket, Usage
from llmfleet.gateway.settings import GatewaySettings


@dataclass(frozen=True)
class Stay:
    """One request: when it is sent, how long until its first token and then until its last, and its size."""

    sent_s: float
    ttft_s: float
    decode_s: float
    input_tokens: int
    output_tokens: int

    @property
    def first_s(self) -> float:
        return self.sent_s + self.ttft_s

    @property
    def end_s(self) -> float:
        return self.first_s + self.decode_s


STAYS = st.lists(
    st.builds(
        Stay,
        st.integers(0, 50).map(float),
        st.integers(1, 20).map(float),
        st.integers(0, 40).map(float),
        st.integers(1, 1000),
        st.integers(1, 100),
    ),
    min_size=1,
    max_size=30,
)


class Replay:
    """Requests at their times through a router with one engine; the end of one comes before the start of another."""

    def __init__(self, stays: list[Stay], shape: RequestShape | None = None) -> None:
        self.now = 0.0
        self.router = Router(lambda: self.now, "i")
        self.router.update(fleet(table({"a": 1.0}), engines({"a": 1})))
        self.engine: dict[int, tuple[float, float]] = {}
        tickets: dict[int, Ticket] = {}
        moments = [
            moment
            for number, stay in enumerate(stays)
            for moment in ((stay.sent_s, 2, number), (stay.first_s, 0, number), (stay.end_s, 1, number))
        ]
        for self.now, what, number in sorted(moments, key=lambda m: (m[0], m[1])):
            stay = stays[number]
            if what == 2:
                ticket = tickets[number] = self.router.admit("team/chat", shape or RequestShape(0, stay.input_tokens))
                assert self.router.assign(ticket) is not None
            elif what == 0:
                self.router.started(tickets[number])
            else:
                usage = Usage(stay.input_tokens, stay.output_tokens)
                self.router.completed(tickets[number], usage, timed=True)

    def told(self) -> ServiceDemand:
        [demand] = self.router.demand(ALL_SERVICES).services
        return demand


def mean_load(one: Stay, stays: list[Stay]) -> float:
    """Requests in the engine over the stay of one, by adding up how long each other one was there meanwhile."""
    together_s = sum(max(0.0, min(one.end_s, other.end_s) - max(one.sent_s, other.sent_s)) for other in stays)
    return together_s / (one.end_s - one.sent_s)


@given(STAYS)
def test_sizes_are_sums_and_sums_of_squares_of_what_completed(stays: list[Stay]) -> None:
    truth: defaultdict[int, list[int]] = defaultdict(lambda: [0] * 5)
    for stay in stays:
        sums = truth[BUCKETS.index(stay.input_tokens, stay.output_tokens)]
        i, o = stay.input_tokens, stay.output_tokens
        sums[:] = [old + new for old, new in zip(sums, (1, i, i * i, o, o * o), strict=True)]
    told = Replay(stays).told().sizes
    assert told is not None
    assert {bucket: sums for bucket, *sums in told} == truth


@given(STAYS)
def test_each_request_is_told_with_the_load_that_was_around_it(stays: list[Stay]) -> None:
    replay = Replay(stays)
    told = replay.told()
    assert told.observed is not None
    observed = told.observed["a"]
    assert sum(one.requests for one in observed) == len(stays)
    assert sum(one.load for one in observed) == pytest.approx(sum(mean_load(one, stays) for one in stays))
    assert sum(one.ttft_ms for one in observed) == pytest.approx(1e3 * sum(one.ttft_s for one in stays))
    assert sum(one.decode_ms for one in observed) == pytest.approx(1e3 * sum(one.decode_s for one in stays))
    assert sum(one.decoded_tokens for one in observed) == sum(one.output_tokens - 1 for one in stays)
    for one in observed:
        assert 2 ** (one.octave - 0.5) * 0.998 <= one.load / one.requests <= 2 ** (one.octave + 0.5) * 1.002
    assert told.loads is not None
    assert told.loads["a"].engines == 1
    assert told.loads["a"].request_seconds == pytest.approx(sum(one.end_s - one.sent_s for one in stays))


def test_what_is_larger_than_the_last_edges_counts_in_their_sizes_and_teaches_nothing_of_engines() -> None:
    told = Replay([Stay(0, 1, 1, 5000, 20), Stay(5, 1, 1, 20, 5000)]).told()
    assert told.observed == {}
    assert told.sizes is not None
    assert [(one.input_tokens, one.output_tokens) for one in told.sizes] == [(20, 100), (1000, 20)]


def test_sizes_lie_within_their_bucket() -> None:
    replay = Replay([Stay(0, 1, 1, 101, 1)])
    for usage, sequences in ((Usage(0, 0), 1), (Usage(5, 31), 3), (Usage(5, 32), 3)):
        ticket = replay.router.admit("team/chat", RequestShape(0, 10, sequences=sequences))
        replay.router.assign(ticket)
        replay.router.completed(ticket, usage)
    assert [one[:4] for one in replay.told().sizes or ()] == [(0, 1, 1, 1), (1, 2, 10, 50), (2, 1, 101, 101**2)]
    assert (replay.told().sizes or [])[1].output_tokens == 22


def test_several_answers_of_one_request_are_load_and_no_observation() -> None:
    stays = [Stay(0, 5, 5, 10, 30), Stay(0, 5, 5, 10, 30)]
    told = Replay(stays, RequestShape(0, 10, sequences=3)).told()
    assert told.observed == {}
    assert told.loads == {"a": VariantLoad(engines=1, request_seconds=60.0)}


def test_the_load_of_engines_that_are_gone_stays_counted() -> None:
    replay = Replay([Stay(0, 5, 5, 10, 30)])
    replay.router.update(fleet(table({"a": 1.0}), ()))
    assert replay.told().loads == {"a": VariantLoad(engines=0, request_seconds=10.0)}


def test_other_edges_start_sizes_and_observations_anew() -> None:
    replay = Replay([Stay(0, 5, 5, 10, 30)])
    replay.router.update(
        fleet(table({"a": 1.0}, buckets=Buckets(input_tokens=[50], output_tokens=[64])), engines({"a": 1}))
    )
    replay.router.admit("team/chat", RequestShape(0, 10))
    assert (replay.told().sizes, replay.told().observed) == ([], {})


def test_nothing_is_told_in_detail_that_was_not_asked_for() -> None:
    [demand] = Replay([Stay(0, 5, 5, 10, 30)]).router.demand().services
    assert (demand.sizes, demand.observed, demand.loads) == (None, None, None)
    assert not {"sizes", "observed", "loads"} & demand.to_wire().keys()


async def test_only_streams_to_clients_that_keep_up_say_what_an_engine_took() -> None:
    async with fake_engine(tokens=6, interval_s=0.01, delay_s=0.05) as engine, gateway_for(engine) as gate:

        def told() -> list[ObservedSums]:
            [demand] = gate.plane.demand(ALL_SERVICES).services
            return (demand.observed or {}).get("fast", [])

        await gate.chat()
        assert told() == []
        await gate.chat(stream=True)
        [one] = told()
        assert (one.requests, one.decoded_tokens, one.load) == (1, 5, 1.0)
        assert 40 < one.ttft_ms < 2000
        assert 40 < one.decode_ms < 2000
        engine.behave(tokens=90, token_text="x" * 100_000)
        reader, writer = await gate.raw(post(STREAM))
        await reader.read(1000)
        await eventually(lambda: engine.requests[-1].written_bytes > 0 and gate.demand().running == 1)
        await asyncio.sleep(0.3)
        assert gate.demand().running == 1
        while await reader.read(2**20):
            if gate.demand().running == 0:
                break
        writer.close()
        await eventually(lambda: sum(gate.demand().completed) == 3)
        assert told() == [one]


@given(st.lists(st.text("abc/", min_size=1), unique=True), st.integers(1, 40))
def test_each_service_is_in_one_part_and_a_part_survives_the_wire(keys: list[str], of: int) -> None:
    parts = [Part(number, of) for number in range(of)]
    assert [Part.parse(str(part)) for part in parts] == parts
    for key in keys:
        assert sum(part.holds(key) for part in parts) == 1
        assert ALL_SERVICES.holds(key)


@pytest.mark.parametrize("text", ["", "true", "1", "1/", "/2", "2/2", "-1/2", "0/0", "1/2/3", "a/b"])
def test_what_is_no_part_asks_for_nothing(text: str) -> None:
    assert Part.parse(text) is None


async def test_the_admin_port_tells_details_where_they_are_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    token = tmp_path_factory.mktemp("admin") / "token"
    token.write_text("t")
    async with fake_engine() as engine:
        settings = GatewaySettings(
            listen="127.0.0.1:0", admin_listen="127.0.0.1:0", engines=(engine.url,), drain_s=1.0, admin_token_file=token
        )
        async with gateway(settings) as gate, httpx.AsyncClient(timeout=PATIENCE_S) as http:
            await http.post(f"http://127.0.0.1:{gate.api_port}/v1/chat/completions", json=CHAT | {"stream": True})
            url, headers = f"http://127.0.0.1:{gate.admin_port}/v1/demand", {"authorization": "Bearer t"}
            plain = DemandReport.model_validate((await http.get(url, headers=headers)).json())
            full = DemandReport.model_validate((await http.get(f"{url}?detail=0/1", headers=headers)).json())
    assert plain.services[0].sizes is None
    assert full.services[0].sizes is not None
    assert full.services[0].sizes[0].requests == 1
