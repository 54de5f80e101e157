"""Prompts that begin alike go where the beginning is, as long as that is worth it."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway_testing.tables import engines, fleet, table
from llmfleet.gateway.policy import EngineReport, RequestShape, Router, Usage
from llmfleet.gateway.policy import prefix as prefix_module
from llmfleet.gateway.policy.choice import COMPARED
from llmfleet.gateway.policy.prefix import BLOCK_CHARS, MOST_BLOCKS, Chain, PrefixMemory, chain_of
from llmfleet.gateway.transport.body import parse_completion


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_chains_are_equal_exactly_as_far_as_whole_blocks_are(begin: str, one: str, other: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_module, "BLOCK_CHARS", 4)
        first, second = chain_of([begin + one]), chain_of([begin + other])
    same = 0
    while same < min(len(begin + one), len(begin + other)) and (begin + one)[same] == (begin + other)[same]:
        same += 1
    blocks = same // 4
    assert first[:blocks] == second[:blocks]
    assert all(a != b for a, b in zip(first[blocks:], second[blocks:], strict=False))


def test_a_conversations_next_turn_begins_with_its_last() -> None:
    turns = ["You are helpful. " * 200, "First question " * 50, "An answer " * 300]
    earlier, later = chain_of(turns), chain_of([*turns, "Second question " * 100])
    assert len(earlier) == (sum(map(len, turns)) + len(turns) - 1) // BLOCK_CHARS
    assert later[: len(earlier)] == earlier


def test_the_same_text_in_other_messages_is_another_prompt() -> None:
    assert chain_of(["a" * 1024, "b" * 1024])[1:] != chain_of(["a" * 1024 + "b" * 1024])[1:]


def test_short_prompts_have_no_chain_and_long_ones_a_bounded_one() -> None:
    assert chain_of([]) == chain_of(["x" * (BLOCK_CHARS - 1)]) == ()
    assert len(chain_of(["x" * BLOCK_CHARS * (MOST_BLOCKS + 50)])) == MOST_BLOCKS


def test_each_replica_has_as_much_as_it_was_sent() -> None:
    memory: PrefixMemory[str] = PrefixMemory()
    memory.sent("a", (1, 2, 3))
    memory.sent("b", (1, 2, 9))
    memory.sent("c", (7,))
    hits = memory.hits((1, 2, 3, 4))
    assert [hits.blocks(name) for name in "abcd"] == [3, 2, 0, 0]
    assert hits.deepest(2) == ["a"]
    assert not memory.hits((5, 1))
    memory.forget("a")
    assert [memory.hits((1, 2, 3)).blocks(name) for name in "ab"] == [0, 2]


def test_the_least_recently_used_is_forgotten_first_and_of_a_prompt_its_end() -> None:
    memory: PrefixMemory[str] = PrefixMemory()
    memory.sent("a", (1, 2, 3), 5)
    memory.sent("a", (7, 8), 5)
    memory.sent("a", (1, 2), 5)
    memory.sent("a", (50, 51), 5)
    assert memory.hits((1, 2, 3)).blocks("a") == 2
    assert memory.hits((7, 8)).blocks("a") == 1
    assert len(memory) == 5


class Memory(RuleBasedStateMachine):
    """The memory against a plain list of what each replica was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: PrefixMemory[int] = PrefixMemory()
        self.order: dict[int, list[int]] = {}

    @rule(replica=st.integers(0, 3), chain=st.lists(st.integers(0, 12), unique=True, max_size=6))
    def send(self, replica: int, chain: list[int]) -> None:
        self.memory.sent(replica, tuple(chain), 8)
        held = [block for block in self.order.get(replica, []) if block not in chain] + chain[::-1]
        if held:
            self.order[replica] = held[-8:]

    @rule(replica=st.integers(0, 3))
    def forget(self, replica: int) -> None:
        self.memory.forget(replica)
        self.order.pop(replica, None)

    @rule(chain=st.lists(st.integers(0, 12), unique=True, max_size=6))
    def ask(self, chain: list[int]) -> None:
        hits = self.memory.hits(tuple(chain))
        expected = {}
        for replica in range(4):
            depth = 0
            while depth < len(chain) and chain[depth] in self.order.get(replica, []):
                depth += 1
            expected[replica] = depth
        assert {replica: hits.blocks(replica) for replica in range(4)} == expected
        best = max(expected.values())
        assert set(hits.deepest(9)) == {r for r, depth in expected.items() if depth == best and best}

    @invariant()
    def bounded(self) -> None:
        assert len(self.memory) == sum(map(len, self.order.values()))


test_what_is_remembered_is_what_was_sent_last = Memory.TestCase


def prompt(chain: Chain, tokens: int) -> RequestShape:
    return RequestShape(prompt_bytes=tokens * 4, max_output_tokens=5, chain=chain)


def run(router: Router, shape: RequestShape) -> str:
    ticket = router.admit("team/chat", shape)
    engine = router.assign(ticket)
    assert engine is not None
    router.started(ticket)
    router.completed(ticket, Usage(max(1, shape.prompt_bytes // 4), 5))
    return engine.id


def test_a_conversation_stays_where_it_is_while_nobody_is_in_its_way() -> None:
    router = Router(lambda: 0.0, "i")
    router.update(fleet(table({"a": 1.0}, replicas={"a": 4}), engines({"a": 4})))
    chain = tuple(range(100, 108))
    places = [run(router, prompt(chain[: 4 + turn], 1024 + 256 * turn)) for turn in range(5)]
    assert len(set(places)) == 1
    assert len({run(router, prompt((), 100)) for _ in range(4)}) == 4


def test_a_conversation_leaves_an_engine_whose_queue_costs_more_than_its_prefix_saves() -> None:
    router = Router(lambda: 0.0, "i")
    router.update(fleet(table({"a": 1.0}, replicas={"a": 2}), engines({"a": 2})))
    chain = tuple(range(8))
    home = run(router, prompt(chain, 2048))
    # 8 blocks of 1,024 bytes save 2,047 tokens: 205 ms. Two prompts of 2,000 tokens there cost 400 ms.
    for _ in range(4):
        router.assign(router.admit("team/chat", prompt((), 2000)))
    router.report(home, EngineReport(0.0, 20, 20))
    assert run(router, prompt(chain, 2048)) != home


def test_of_many_engines_the_one_that_has_the_prefix_is_always_compared() -> None:
    router = Router(lambda: 0.0, "i")
    count = 3 * COMPARED
    router.update(fleet(table({"a": 1.0}, replicas={"a": count}), engines({"a": count})))
    chain = tuple(range(6))
    home = run(router, prompt(chain, 1600))
    assert {run(router, prompt(chain, 1600)) for _ in range(20)} == {home}


def test_an_engine_that_failed_is_thought_to_have_lost_its_cache() -> None:
    router = Router(lambda: 0.0, "i")
    router.update(fleet(table({"a": 1.0}, replicas={"a": 2}), engines({"a": 2})))
    chain = tuple(range(6))
    home = run(router, prompt(chain, 1600))
    ticket = router.admit("team/chat", prompt(chain, 1600))
    engine = router.assign(ticket)
    assert engine is not None
    assert engine.id == home
    router.started(ticket)
    router.broke(ticket)
    assert run(router, prompt(chain, 1600)) != home


def body(**fields: object) -> RequestShape:
    return parse_completion(json.dumps({"model": "m", **fields}).encode()).shape


def test_the_chain_of_a_chat_is_that_of_its_texts() -> None:
    system, question = "s" * 3000, "q" * 3000
    turns = [{"role": "system", "content": system}, {"role": "user", "content": [{"type": "text", "text": question}]}]
    assert body(messages=turns).chain == chain_of([system, question])
    assert body(messages=[{"role": "user", "content": "hi"}]).chain == ()
    grown = [body(messages=turns[:1] + turns[1:] * n).chain for n in (1, 2, 3)]
    for shorter, longer in pairwise(grown):
        assert longer[: len(shorter)] == shorter


@pytest.mark.parametrize("messages", [7, "x" * 5000, [7], [{"content": 7}], [{"content": [{"text": 7}, 7]}], [{}]])
def test_what_is_no_text_has_no_chain(messages: object) -> None:
    assert body(messages=messages).chain == ()
