"""The policy: requests go where the plan says and engines work, and every one of them is counted once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway_testing.tables import BUCKETS, engines, fleet, table
from llmfleet.api import Buckets, LatencyCoefficients, Part
from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.gateway.fleet import Engine, Fleet, Leaving, LeavingReason
from llmfleet.gateway.policy import EngineReport, RequestShape, Router, Ticket, Usage
from llmfleet.gateway.policy.replicas import EJECTION_FIRST_S, EJECTION_LONGEST_S
from llmfleet.gateway.policy.reports import FRESH_S
from llmfleet.gateway.policy.state import PRESSED_UNSTARTED

SMALL = RequestShape(prompt_bytes=40, max_output_tokens=5)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def router_with(
    fractions: dict[str, float], replicas: dict[str, int], *, planned: dict[str, int] | None = None
) -> tuple[Router, Clock]:
    clock = Clock()
    router = Router(clock, "instance")
    router.update(fleet(table(fractions, replicas=planned or replicas), engines(replicas)))
    return router, clock


def send(router: Router, shape: RequestShape = SMALL) -> tuple[Ticket, Engine]:
    ticket = router.admit("team/chat", shape)
    engine = router.assign(ticket)
    assert engine is not None
    return ticket, engine


def serve(router: Router, shape: RequestShape = SMALL) -> Engine:
    ticket, engine = send(router, shape)
    router.started(ticket)
    router.completed(ticket, Usage(10, 5))
    return engine


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.floats(0.05, 1), min_size=1),
    st.lists(st.booleans(), min_size=1, max_size=200),
)
def test_each_bucket_is_split_as_planned_at_every_prefix(shares: dict[str, float], long_prompts: list[bool]) -> None:
    total = sum(shares.values())
    fractions = {name: share / total for name, share in shares.items()}
    router, _ = router_with(fractions, dict.fromkeys(fractions, 2))
    counts = {True: Counter[str](), False: Counter[str]()}
    for long_prompt in long_prompts:
        shape = RequestShape(0, prompt_tokens=900 if long_prompt else 10, max_output_tokens=5)
        ticket, engine = send(router, shape)
        router.started(ticket)
        bucket = counts[long_prompt]
        bucket[engine.variant] += 1
        for name, fraction in fractions.items():
            assert abs(bucket[name] - bucket.total() * fraction) <= 2


def test_buckets_follow_their_own_rows_of_the_table() -> None:
    routing = table({"a": 1.0}, replicas={"a": 1, "b": 1})
    rows = [route.model_copy(update={"variant": "b"}) if route.bucket >= 2 else route for route in routing.routes]
    router = Router(Clock(), "i")
    router.update(fleet(routing.model_copy(update={"routes": rows}), engines({"a": 1, "b": 1})))
    assert {serve(router, RequestShape(0, prompt_tokens=10)).variant for _ in range(10)} == {"a"}
    assert {serve(router, RequestShape(0, prompt_tokens=900)).variant for _ in range(10)} == {"b"}


def test_a_bucket_without_routes_is_spread_by_replicas() -> None:
    routing = table({"a": 1.0}, replicas={"a": 3, "b": 1}).model_copy(update={"routes": []})
    router = Router(Clock(), "i")
    router.update(fleet(routing, engines({"a": 3, "b": 1})))
    assert Counter(serve(router).variant for _ in range(40)) == {"a": 30, "b": 10}


def test_a_variant_whose_replicas_are_not_all_there_gets_its_share_of_those_that_are() -> None:
    router, _ = router_with({"a": 0.5, "b": 0.5}, {"a": 1, "b": 4}, planned={"a": 4, "b": 4})
    counts = Counter(serve(router).variant for _ in range(100))
    assert counts["a"] == pytest.approx(20, abs=2)


def test_a_bucket_whose_variants_are_all_gone_goes_to_what_there_is() -> None:
    router, _ = router_with({"a": 1.0}, {"b": 1}, planned={"a": 1, "b": 1})
    assert serve(router).variant == "b"


def test_without_an_engine_the_request_waits_and_is_counted() -> None:
    router, _ = router_with({"a": 1.0}, {}, planned={"a": 1})
    ticket = router.admit("team/chat", SMALL)
    assert router.assign(ticket) is None
    [demand] = router.demand().services
    assert (demand.arrived, demand.waiting, demand.running) == ([1, 0], 1, 0)
    router.update(fleet(table({"a": 1.0}), engines({"a": 1})))
    assert router.assign(ticket) is not None
    [demand] = router.demand().services
    assert (demand.arrived, demand.waiting, demand.running) == ([1, 0], 0, 1)


def test_equal_replicas_take_turns() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 5})
    assert Counter(serve(router).id for _ in range(50)) == {f"a-{n}": 10 for n in range(5)}


def test_a_request_goes_to_the_replica_with_the_least_in_flight() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 3})
    first, second = send(router)[1], send(router)[1]
    third = send(router)[1]
    assert len({first.id, second.id, third.id}) == 3


def test_a_long_prompt_in_front_counts_more_than_a_short_one() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 2})
    _, long = send(router, RequestShape(0, prompt_tokens=50_000, max_output_tokens=5))
    assert {send(router)[1].id for _ in range(6)} == {"a-0", "a-1"} - {long.id}


def test_load_alone_decides_where_the_fit_has_no_slope() -> None:
    flat = LatencyCoefficients(ttft_base_ms=50, ttft_ms_per_input_token=0, tpot_base_ms=20, tpot_ms_per_running=0)
    router = Router(Clock(), "i")
    router.update(fleet(table({"a": 1.0}, replicas={"a": 2}, fits={"a": flat}), engines({"a": 2})))
    held, engine = send(router)
    router.started(held)
    assert {serve(router).id for _ in range(6)} == {"a-0", "a-1"} - {engine.id}


def test_a_failed_engine_is_avoided_and_then_probed_by_one_request() -> None:
    router, clock = router_with({"a": 1.0}, {"a": 2})
    ticket, broken = send(router)
    router.failed(ticket)
    assert router.assign(ticket) != broken
    assert broken.id not in {serve(router).id for _ in range(10)}
    clock.now += EJECTION_FIRST_S
    others = {"a-0", "a-1"} - {broken.id}
    probe, probed = send(router)
    assert probed == broken
    assert {send(router)[1].id for _ in range(5)} == others
    router.started(probe)
    assert broken.id in {send(router)[1].id for _ in range(5)}


def test_the_ejection_grows_and_has_a_ceiling() -> None:
    router, clock = router_with({"a": 1.0}, {"a": 1})
    ticket, _ = send(router)
    waits = []
    for _ in range(10):
        router.failed(ticket)
        assert router.assign(ticket) is None
        wait = router.retry_after("team/chat")
        assert wait is not None
        waits.append(wait)
        clock.now += wait
        assert router.assign(ticket) is not None
    assert waits[:4] == pytest.approx([0.5, 1, 2, 4])
    assert waits[-1] == EJECTION_LONGEST_S


def test_an_abandoned_probe_makes_room_for_the_next() -> None:
    router, clock = router_with({"a": 1.0}, {"a": 1})
    ticket, _ = send(router)
    router.failed(ticket)
    clock.now += EJECTION_FIRST_S
    assert router.assign(ticket) is not None
    router.abandoned(ticket)
    assert send(router)[1].id == "a-0"


def test_a_variant_with_a_queue_is_passed_over_while_another_has_none() -> None:
    router, _ = router_with({"a": 0.9, "b": 0.1}, {"a": 1, "b": 1})
    # Nothing of what went to `a` starts; `b` starts at once.
    counts: Counter[str] = Counter()
    for _ in range(100):
        ticket, engine = send(router)
        counts[engine.variant] += 1
        if engine.variant == "b":
            router.started(ticket)
            router.completed(ticket, Usage(10, 5))
    assert counts["a"] == PRESSED_UNSTARTED + 1


def test_no_replica_starves_under_steady_load() -> None:
    router, _ = router_with({"a": 0.7, "b": 0.3}, {"a": 4, "b": 2})
    tickets: list[Ticket] = []
    used: Counter[str] = Counter()
    for _ in range(300):
        ticket, engine = send(router)
        router.started(ticket)
        used[engine.id] += 1
        tickets.append(ticket)
        if len(tickets) > 30:
            router.completed(tickets.pop(0), Usage(10, 5))
    assert len(used) == 6
    assert min(used.values()) >= 40


def test_a_new_table_keeps_what_is_known_of_engines_that_stay() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 2})
    ticket, broken = send(router)
    router.failed(ticket)
    router.update(fleet(table({"a": 1.0}, replicas={"a": 3}), engines({"a": 3})))
    assert router.ejected("team/chat") == 1
    assert broken.id not in {serve(router).id for _ in range(10)}


def test_an_engine_is_sent_to_where_the_newest_fleet_says() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 1})
    serve(router)
    moved = Engine(id="a-0", host="127.0.0.1", port=9, variant="a")
    router.update(fleet(table({"a": 1.0}), [moved]))
    assert send(router)[1] == moved


def leaving(engine: Engine) -> Engine:
    return replace(engine, leaving=Leaving(LeavingReason.ASKED))


def test_an_engine_that_leaves_gets_no_request_and_keeps_those_it_has() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 2})
    ticket, first = send(router)
    router.started(ticket)
    both = engines({"a": 2})
    router.update(fleet(table({"a": 1.0}), [leaving(e) if e.id == first.id else e for e in both]))
    assert first.id not in {serve(router).id for _ in range(10)}
    assert router.demand().services[0].running == 1
    router.completed(ticket, Usage(10, 5))
    assert router.demand().services[0].running == 0


def test_a_request_waits_where_every_engine_leaves() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 2})
    router.update(fleet(table({"a": 1.0}), [leaving(engine) for engine in engines({"a": 2})]))
    assert router.assign(router.admit("team/chat", RequestShape(prompt_bytes=10))) is None


def test_a_request_moves_to_the_freest_engine_of_its_variant_and_revision() -> None:
    router, _ = router_with({"a": 1.0, "b": 0.0}, {"a": 4, "b": 1})
    known = {engine.id: engine for engine in engines({"a": 4, "b": 1})}
    known["a-1"] = replace(known["a-1"], revision="2")
    known["a-2"] = leaving(known["a-2"])
    router.update(fleet(table({"a": 1.0, "b": 0.0}), list(known.values())))
    tickets = {}
    while "a-0" not in tickets:
        ticket, engine = send(router)
        tickets[engine.id] = ticket
    assert router.elsewhere(tickets["a-0"]) == known["a-3"]
    assert router.elsewhere(tickets["a-0"], tried={"a-3"}) == known["b-0"]
    assert router.elsewhere(tickets["a-0"], tried={"a-3", "b-0"}) is None


def test_moves_that_are_under_way_count_at_their_destination() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 3})
    ticket, source = send(router)
    first = router.elsewhere(ticket)
    assert first is not None
    second = router.elsewhere(ticket, coming={first.id: 1})
    assert second is not None
    assert len({source.id, first.id, second.id}) == 3


def test_a_request_that_has_moved_is_counted_where_it_runs() -> None:
    router, clock = router_with({"a": 1.0}, {"a": 2})
    ticket, source = send(router)
    router.started(ticket)
    target = router.elsewhere(ticket)
    assert target is not None
    clock.now += 1.0
    router.moved(ticket, target)
    assert ticket.replica is not None
    assert (ticket.replica.engine, ticket.replica.in_flight, ticket.replica.unstarted) == (target, 1, 0)
    assert send(router)[1] == source
    clock.now += 1.0
    router.completed(ticket, Usage(10, 5), timed=True)
    [demand] = router.demand(Part(0, 1)).services
    assert (demand.running, sum(demand.completed)) == (1, 1)
    assert not demand.observed


def test_an_engine_that_dies_under_a_request_is_ejected_while_the_request_goes_on() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 2})
    ticket, source = send(router)
    router.started(ticket)
    router.engine_lost(ticket)
    assert router.ejected("team/chat") == 1
    target = router.elsewhere(ticket)
    assert target is not None
    router.moved(ticket, target)
    router.completed(ticket, Usage(10, 5))
    assert source.id not in {serve(router).id for _ in range(4)}


def test_other_bucket_edges_start_the_counts_anew() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 1})
    serve(router)
    running, _ = send(router)
    edges = Buckets(input_tokens=[50, 500, 5000], output_tokens=[64])
    router.update(fleet(table({"a": 1.0}, buckets=edges), engines({"a": 1})))
    [demand] = router.demand().services
    assert demand.buckets == edges
    assert (demand.arrived, demand.completed, demand.running) == ([0, 0, 0], [0, 0, 0], 1)
    router.completed(running, Usage(400, 9))
    [demand] = router.demand().services
    assert (demand.completed, demand.running) == ([0, 1, 0], 0)


def test_a_service_that_is_gone_is_not_reported() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 1})
    ticket, _ = send(router)
    router.update(Fleet())
    router.started(ticket)
    router.completed(ticket, Usage(10, 5))
    assert router.demand().services == []


def test_the_demand_report_says_for_how_long_it_was_counted() -> None:
    router, clock = router_with({"a": 1.0}, {"a": 1})
    clock.now += 12.5
    assert router.demand().uptime_seconds == 12.5


class Conservation(RuleBasedStateMachine):
    """Whatever happens, every admitted request is in exactly one place, and in-flight counts match the tickets."""

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.router = Router(self.clock, "i")
        self.replicas = {"a": 2, "b": 1}
        self.router.update(fleet(table({"a": 0.6, "b": 0.4}, replicas={"a": 2, "b": 1}), engines(self.replicas)))
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.arrived = self.completed = self.abandoned = 0

    @rule(tokens=st.integers(1, 3000), bound=st.none() | st.integers(1, 500))
    def arrive(self, tokens: int, bound: int | None) -> None:
        self.waiting.append(self.router.admit("team/chat", RequestShape(0, tokens, bound)))
        self.arrived += 1

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def assign(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        engine = self.router.assign(ticket)
        if engine is not None:
            assert engine.id in {e.id for e in engines(self.replicas)}
            self.waiting.remove(ticket)
            self.running.append(ticket)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["start", "complete", "fail", "break", "abandon"]))
    def proceed(self, data: st.DataObject, how: str) -> None:
        ticket = data.draw(st.sampled_from(self.running))
        if how == "start":
            self.router.started(ticket)
            return
        self.running.remove(ticket)
        if how == "complete":
            self.router.completed(ticket, data.draw(st.none() | st.just(Usage(20, 30))))
            self.completed += 1
        elif how == "fail":
            self.router.failed(ticket)
            self.waiting.append(ticket)
        else:
            (self.router.broke if how == "break" else self.router.abandoned)(ticket)
            self.abandoned += 1

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(ticket)
        self.router.abandoned(ticket)
        self.abandoned += 1

    @rule(a=st.integers(0, 3), b=st.integers(0, 2))
    def rescale(self, a: int, b: int) -> None:
        self.replicas = {"a": a, "b": b}
        self.router.update(fleet(table({"a": 0.6, "b": 0.4}, replicas={"a": 2, "b": 1}), engines(self.replicas)))

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def counted_once(self) -> None:
        services = self.router.demand().services
        if not self.arrived:
            assert services == []
            return
        [demand] = services
        assert sum(demand.arrived) == self.arrived
        assert sum(demand.completed) == self.completed
        assert demand.waiting == len(self.waiting)
        assert demand.running == len(self.running)
        assert self.arrived == self.completed + self.abandoned + demand.waiting + demand.running

    @invariant()
    def replicas_hold_what_runs_on_them(self) -> None:
        for ticket in self.running:
            replica = ticket.replica
            assert replica is not None
            here = [other for other in self.running if other.replica is replica]
            assert replica.in_flight == len(here)
            assert replica.unstarted == sum(not other.started for other in here)


Conservation.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_every_request_is_in_exactly_one_place = Conservation.TestCase


def test_the_bucket_of_a_completed_request_is_that_of_its_real_size() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 1})
    ticket, _ = send(router)
    router.completed(ticket, Usage(900, 90))
    [demand] = router.demand().services
    assert demand.completed[BUCKETS.index(900, 90)] == 1


def objective(ttft_ms: float, tpot_ms: float) -> Objective:
    return Objective(ttft=LatencyTarget(milliseconds=ttft_ms), tpot=LatencyTarget(milliseconds=tpot_ms))


def with_objective(fractions: dict[str, float], replicas: dict[str, int], aim: Objective) -> Router:
    router = Router(Clock(), "i")
    routing = table(fractions, replicas=replicas).model_copy(update={"objective": aim})
    router.update(fleet(routing, engines(replicas)))
    return router


def test_a_request_that_would_break_the_objective_goes_to_another_variant_that_keeps_it() -> None:
    router = with_objective({"a": 1.0}, {"a": 1, "b": 1}, objective(ttft_ms=200, tpot_ms=100))
    _, first = send(router, RequestShape(0, prompt_tokens=2000, max_output_tokens=5))
    assert first.variant == "a"
    # 50 ms + 0.1 ms * 2,010 tokens on `a`.
    assert send(router, RequestShape(0, prompt_tokens=10, max_output_tokens=5))[1].variant == "b"


def test_without_an_objective_the_plan_is_followed_into_a_short_queue() -> None:
    router, _ = router_with({"a": 1.0}, {"a": 1, "b": 1})
    send(router, RequestShape(0, prompt_tokens=2000, max_output_tokens=5))
    assert send(router, RequestShape(0, prompt_tokens=10, max_output_tokens=5))[1].variant == "a"


def test_where_nobody_keeps_the_objective_the_plan_is_followed() -> None:
    router = with_objective({"a": 1.0}, {"a": 1, "b": 1}, objective(ttft_ms=10, tpot_ms=100))
    assert {serve(router).variant for _ in range(10)} == {"a"}


def test_tokens_that_would_come_too_slowly_spill_over_too() -> None:
    router = with_objective({"a": 1.0}, {"a": 1, "b": 1}, objective(ttft_ms=9000, tpot_ms=25.5))
    held = [send(router) for _ in range(7)]
    assert [engine.variant for _, engine in held] == ["a"] * 6 + ["b"]


def test_what_spilled_over_is_made_up_for() -> None:
    router = with_objective({"a": 0.5, "b": 0.5}, {"a": 1, "b": 1}, objective(ttft_ms=200, tpot_ms=100))
    long, first = send(router, RequestShape(0, prompt_tokens=9000, max_output_tokens=5))
    counts = Counter([first.variant])
    tickets = [send(router, RequestShape(0, prompt_tokens=500, max_output_tokens=5)) for _ in range(1)]
    counts.update(engine.variant for _, engine in tickets)
    router.started(long)
    for ticket, _ in tickets:
        router.started(ticket)
    for _ in range(20):
        counts[serve(router, RequestShape(0, prompt_tokens=500, max_output_tokens=5)).variant] += 1
    assert abs(counts["a"] - counts["b"]) <= 2


def test_others_on_an_engine_turn_requests_away_from_it() -> None:
    router, clock = router_with({"a": 1.0}, {"a": 2})
    router.report("a-0", EngineReport(clock.now, waiting=0, running=50))
    router.report("nobody", EngineReport(clock.now, waiting=0, running=50))
    assert {serve(router).id for _ in range(10)} == {"a-1"}
    clock.now += FRESH_S
    assert {serve(router).id for _ in range(10)} == {"a-0", "a-1"}


def test_gateways_that_hear_the_same_reports_do_not_all_send_to_the_same_engine() -> None:
    clock = Clock()
    first: Counter[str] = Counter()
    for number in range(40):
        router = Router(clock, f"gateway-{number}")
        router.update(fleet(table({"a": 1.0}, replicas={"a": 10}), engines({"a": 10})))
        for engine in range(10):
            router.report(f"a-{engine}", EngineReport(clock.now, waiting=0, running=engine))
        first[send(router)[1].id] += 1
    # The best of two of ten: the freest is in a fifth of the pairs, the fullest never wins.
    assert first["a-0"] <= 16
    assert first["a-9"] == 0
    assert len(first) >= 5
