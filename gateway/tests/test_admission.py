"""Who is next among those who wait, how fair that is, and what waiting is predicted to cost."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmfleet.gateway.keys import ApiKey, Priority
from llmfleet.gateway.policy import Claim, RateBook, WaitingRoom, service_of
from llmfleet.gateway.policy.rates import Bucket

HIGH, STANDARD, BATCH = Priority.HIGH, Priority.STANDARD, Priority.BATCH


def claim(tenant: str = "a", service: float = 10.0, priority: Priority = STANDARD, deadline_s: float = 300.0) -> Claim:
    return Claim(priority, tenant, deadline_s, service)


def serve(room: WaitingRoom[str], now: float = 0.0) -> str:
    """Admits the next one."""
    item = next(room.order())
    room.admitted(item, now)
    return item


def test_higher_classes_come_first() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    for name, priority in (("batch", BATCH), ("standard", STANDARD), ("high", HIGH), ("standard-2", STANDARD)):
        room.add(name, claim(priority=priority), 0.0)
    assert [serve(room) for _ in range(4)] == ["high", "standard", "standard-2", "batch"]
    assert len(room) == 0


def test_within_a_tenant_the_earliest_deadline_comes_first_then_the_earliest_arrival() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    for name, deadline_s in (("late", 9.0), ("soon", 1.0), ("late-2", 9.0), ("sooner", 0.5)):
        room.add(name, claim(deadline_s=deadline_s), 0.0)
    assert [serve(room) for _ in range(4)] == ["sooner", "soon", "late", "late-2"]


def test_tenants_take_turns_by_service_not_by_requests() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    for number in range(20):
        room.add(f"large-{number}", claim("large", service=100.0), 0.0)
        room.add(f"small-{number}", claim("small", service=25.0), 0.0)
    served = [serve(room).partition("-")[0] for _ in range(15)]
    assert (served.count("large"), served.count("small")) == (3, 12)


def test_idle_time_cannot_be_saved_up() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    room.passed(claim("late", service=10.0))
    for number in range(9):
        room.add(f"busy-{number}", claim("busy"), 0.0)
    for _ in range(5):
        serve(room)
    for number in range(5):
        room.add(f"late-{number}", claim("late"), 0.0)
    served = [serve(room).partition("-")[0] for _ in range(4)]
    assert served.count("late") == 2, "its turn, not all that it has not used"


def test_a_tenant_that_comes_to_an_empty_room_is_lifted_to_who_was_served_last() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    for _ in range(50):
        room.passed(claim("busy"))
    for number in range(4):
        room.add(f"new-{number}", claim("new"), 0.0)
        room.add(f"busy-{number}", claim("busy"), 0.0)
    served = [serve(room).partition("-")[0] for _ in range(4)]
    assert served.count("new") == 2


def test_what_a_request_took_counts_and_not_what_was_expected() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    for number in range(9):
        room.add(f"modest-{number}", claim("modest"), 0.0)
        room.add(f"greedy-{number}", claim("greedy"), 0.0)
    first = claim("greedy")
    while serve(room) != "greedy-0":
        pass
    room.settled(first, service_of(10, 25))
    assert [serve(room).partition("-")[0] for _ in range(5)].count("modest") >= 4


def test_a_request_that_leaves_is_not_charged() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    room.add("gone", claim("a", service=1e9), 0.0)
    room.add("stays", claim("a"), 0.0)
    room.add("other", claim("b"), 0.0)
    room.remove("gone")
    assert "gone" not in room
    assert [serve(room), serve(room)] == ["stays", "other"]


def test_nobody_waits_twice() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    room.add("one", claim(), 0.0)
    with pytest.raises(ValueError, match="'one' waits already"):
        room.add("one", claim(), 0.0)


@given(
    services=st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100), st.floats(1, 100)), min_size=20, max_size=30),
    head_start=st.lists(st.integers(0, 2), max_size=20),
)
def test_two_tenants_that_always_wait_differ_by_at_most_twice_the_largest_charge(
    services: list[tuple[float, float, float]], head_start: list[int]
) -> None:
    """Theorem 4.4 of the paper, over every interval of the run, whatever was served before it."""
    room: WaitingRoom[tuple[int, int]] = WaitingRoom()
    for tenant in head_start:
        room.passed(claim(str(tenant), service=services[0][tenant]))
    for number, sizes in enumerate(services):
        for tenant, size in enumerate(sizes):
            room.add((tenant, number), claim(str(tenant), service=size), 0.0)
    served = [0.0, 0.0, 0.0]
    moments = [(0.0, 0.0, 0.0)]
    for _ in range(len(services)):  # no tenant can run out within as many as it has
        tenant, number = next(room.order())
        room.admitted((tenant, number), 0.0)
        served[tenant] += services[number][tenant]
        moments.append((served[0], served[1], served[2]))
    largest = max(map(max, services))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        apart = [moment[one] - moment[other] for moment in moments]
        assert max(apart) - min(apart) <= 2 * largest + 1e-6


class Room(RuleBasedStateMachine):
    """Arrivals, departures, services and corrections in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.room: WaitingRoom[int] = WaitingRoom()
        self.claims: dict[int, Claim] = {}
        self.running: list[Claim] = []
        self.now = 0.0
        self.count = 0

    @rule(
        tenant=st.sampled_from("abc"),
        priority=st.sampled_from(Priority),
        service=st.floats(0.5, 1000),
        deadline_s=st.floats(0, 1000),
    )
    def arrive(self, tenant: str, priority: Priority, service: float, deadline_s: float) -> None:
        self.count += 1
        self.claims[self.count] = Claim(priority, tenant, deadline_s, service)
        wait_s = self.room.predicted_wait_s(self.claims[self.count])
        assert wait_s is None or (wait_s >= 0.0 and math.isfinite(wait_s))
        self.room.add(self.count, self.claims[self.count], self.now)

    @precondition(lambda self: self.claims)
    @rule(passed_s=st.floats(0, 20), place=st.integers(0, 5))
    def serve(self, passed_s: float, place: int) -> None:
        self.now += passed_s
        order = list(self.room.order())
        item = order[min(place, len(order) - 1)]
        self.room.admitted(item, self.now)
        self.running.append(self.claims.pop(item))

    @precondition(lambda self: self.running)
    @rule(service=st.floats(0, 2000))
    def end(self, service: float) -> None:
        self.room.settled(self.running.pop(), service)

    @precondition(lambda self: self.claims)
    @rule()
    def leave(self) -> None:
        item, expected = self.claims.popitem()
        assert self.room.remove(item) == expected

    @invariant()
    def everybody_who_waits_is_in_the_order_once(self) -> None:
        order = list(self.room.order())
        assert sorted(order) == sorted(self.claims)
        assert len(self.room) == len(order)

    @invariant()
    def the_order_is_by_class_and_within_a_tenant_by_deadline(self) -> None:
        waiting = [self.claims[item] for item in self.room.order()]
        assert all(before.priority >= after.priority for before, after in pairwise(waiting))
        own = sorted(waiting, key=lambda one: one.tenant)
        assert all(
            before.deadline_s <= after.deadline_s
            for before, after in pairwise(own)
            if (before.tenant, before.priority) == (after.tenant, after.priority)
        )


TestRoom = Room.TestCase
TestRoom.settings = settings(max_examples=20, stateful_step_count=20)


def test_a_full_room_gives_up_the_lowest_class_first() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    for number in range(3):
        room.add(f"batch-{number}", claim("b", priority=BATCH), 0.0)
        room.add(f"standard-{number}", claim("s"), 0.0)
    assert room.victim(claim("h", priority=HIGH)) == "batch-2"
    assert room.victim(claim("b", priority=BATCH)) is None


def test_nobody_fills_the_room_alone() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    for number in range(5):
        room.add(f"flood-{number}", claim("flood"), 0.0)
    room.add("modest", claim("modest"), 0.0)
    assert room.victim(claim("new")) == "flood-4"
    assert room.victim(claim("flood")) is None
    assert room.victim(claim("new", priority=BATCH)) is None


def test_the_predicted_wait_is_what_comes_before_by_the_rate_of_late() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    assert room.predicted_wait_s(claim()) is None, "nothing was seen yet"
    for number in range(30):
        room.add(f"a-{number}", claim("a"), 0.0)
    assert room.predicted_wait_s(claim()) is None
    for number in range(20):
        serve(room, 0.5 * (number + 1))
    # 10 units of service each half second, 10 requests of 10 units still wait.
    assert room.predicted_wait_s(claim("a")) == pytest.approx(5.0, rel=0.1)
    assert room.predicted_wait_s(claim("a", priority=HIGH)) == 0.0
    assert room.predicted_wait_s(claim("a", priority=BATCH)) == pytest.approx(5.0, rel=0.1)
    assert room.predicted_wait_s(claim("b")) == 0.0, "it has had less than the others"
    room.add("b-0", claim("b"), 10.0)
    assert room.predicted_wait_s(claim("b")) == pytest.approx(1.0, rel=0.1), "its own, and as much of the other's"


@pytest.mark.parametrize("passed_s", [0.0, 1e-300, 1e-17, 0.05])
def test_nothing_is_predicted_from_next_to_nothing(passed_s: float) -> None:
    room: WaitingRoom[str] = WaitingRoom()
    room.add("one", claim(), 0.0)
    room.add("two", claim(), 0.0)
    serve(room, passed_s)
    assert room.predicted_wait_s(claim()) is None


def test_an_empty_room_does_not_make_engines_look_slow() -> None:
    room: WaitingRoom[str] = WaitingRoom()
    for start in (0.0, 1000.0):
        for number in range(10):
            room.add(f"{start}-{number}", claim("a"), start)
        for number in range(10):
            serve(room, start + 0.5 * (number + 1))
    assert room.rate == pytest.approx(20.0, rel=0.1)


# Rates


def test_requests_come_at_their_rate_with_a_second_s_worth_at_once() -> None:
    book, key = RateBook(), ApiKey("t", requests_per_second=2.0)
    passed = [book.take("s", key, 5.0, 100.0) for _ in range(3)]
    assert passed[:2] == [None, None]
    assert passed[2] is not None
    assert passed[2].of == "requests"
    assert passed[2].wait_s == pytest.approx(0.5)
    assert book.take("s", key, 5.0, 100.5) is None


def test_a_rate_below_one_request_per_second_lets_one_pass() -> None:
    book, key = RateBook(), ApiKey("t", requests_per_second=0.1)
    assert book.take("s", key, 1.0, 0.0) is None
    refused = book.take("s", key, 1.0, 1.0)
    assert refused is not None
    assert refused.wait_s == pytest.approx(9.0)


def test_tokens_that_an_answer_took_are_paid_afterwards() -> None:
    book, key = RateBook(), ApiKey("t", tokens_per_minute=600.0)
    assert book.take("s", key, 100.0, 0.0) is None
    book.settle("s", key, 700.0)
    refused = book.take("s", key, 100.0, 0.0)
    assert refused is not None
    assert refused.of == "tokens"
    assert refused.wait_s == pytest.approx(30.0)
    assert book.take("s", key, 100.0, 30.0) is None


def test_a_prompt_larger_than_a_minute_s_worth_passes_when_the_bucket_is_full() -> None:
    book, key = RateBook(), ApiKey("t", tokens_per_minute=60.0)
    assert book.take("s", key, 600.0, 0.0) is None
    assert book.take("s", key, 600.0, 500.0) is not None
    assert book.take("s", key, 600.0, 600.0) is None


def test_rates_are_per_tenant_and_service_and_change_with_the_key() -> None:
    book, key = RateBook(), ApiKey("t", requests_per_second=1.0)
    assert book.take("s", key, 1.0, 0.0) is None
    assert book.take("s", ApiKey("u", requests_per_second=1.0), 1.0, 0.0) is None
    assert book.take("other", key, 1.0, 0.0) is None
    assert book.take("s", key, 1.0, 0.0) is not None
    assert book.take("s", ApiKey("t", requests_per_second=5.0), 1.0, 0.0) is None
    assert book.take("s", ApiKey("t"), 1e9, 0.0) is None


def test_no_more_run_at_once_than_the_key_allows_whatever_becomes_of_its_rights() -> None:
    book, key = RateBook(), ApiKey("t", concurrent_requests=2)
    assert [book.take("s", key, 1.0, 0.0) for _ in range(2)] == [None, None]
    refused = book.take("s", key, 1.0, 0.0)
    assert refused is not None
    assert refused.of == "requests at once"
    book.settle("s", key, 1.0)
    assert book.take("s", key, 1.0, 0.0) is None
    fewer = ApiKey("t", concurrent_requests=1)
    book.settle("s", key, 1.0)
    assert book.take("s", fewer, 1.0, 0.0) is not None, "one that began with other rights still runs"
    book.settle("s", key, 1.0)
    book.settle("s", key, 1.0)
    assert book.take("s", fewer, 1.0, 0.0) is None, "one too many that ended is not counted"
    assert book.take("s", fewer, 1.0, 0.0) is not None


@given(
    rate=st.floats(0.01, 1000),
    gaps_s=st.lists(st.floats(0, 10), min_size=1, max_size=50),
)
def test_over_any_time_no_more_passes_than_rate_and_burst(rate: float, gaps_s: list[float]) -> None:
    burst = max(1.0, rate)
    bucket, now, passed = Bucket(rate, burst, 0.0), 0.0, 0
    for gap_s in gaps_s:
        now += gap_s
        if bucket.wait_s(1.0, now) == 0.0:
            bucket.take(1.0)
            passed += 1
    assert passed <= burst + rate * now + 1e-6


@given(rate=st.floats(0.01, 1000), amount=st.floats(0.1, 100), taken=st.floats(0, 500))
def test_after_the_wait_that_was_told_it_passes(rate: float, amount: float, taken: float) -> None:
    bucket = Bucket(rate, max(1.0, rate), 0.0)
    bucket.take(taken)
    wait_s = bucket.wait_s(amount, 0.0)
    assert bucket.wait_s(amount, wait_s * (1 + 1e-9)) == 0.0
