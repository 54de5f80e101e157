"""Whatever happens on the way, reconcile brings a simulated cluster to its plan, and keeps it serving meanwhile."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmfleet.api import Refusal
from llmfleet.api.meta import ANNOTATION_DRAINING
from llmfleet.operator.model import ANNOTATION_INPUTS, AnnotatePod, ApplyDeployment
from llmfleet.operator.reconcile import reconcile
from operator_testing.simulated_cluster import POLICY, TYPES, Cluster, roomy

Seeds = st.integers(min_value=0, max_value=2**32 - 1).map(random.Random)
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""A seed does not shrink to anything simpler; a failure is reported as it was found."""
SLOW = settings(max_examples=15, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))


def plans(most: int = 4) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries({kind: st.integers(0, most) for kind in TYPES})


@SLOW
@given(Seeds, st.lists(plans(), min_size=1, max_size=4))
def test_a_fleet_left_alone_converges_to_its_plan(rng: random.Random, sequence: list[dict[str, int]]) -> None:
    cluster = Cluster(dict.fromkeys(TYPES, 4), rng)
    cluster.add(sequence[0])
    for replicas in sequence:
        cluster.plan(replicas)
        for _ in range(rng.randint(0, 25)):
            cluster.reconcile()
            cluster.tick()
    cluster.settle()
    cluster.assert_follows_plan()


@SLOW
@given(Seeds, plans(), plans())
def test_with_room_serving_replicas_never_fall_below_old_and_new(
    rng: random.Random, old: dict[str, int], new: dict[str, int]
) -> None:
    cluster = roomy(rng)
    cluster.add(old)
    cluster.settle()
    cluster.plan(new)
    floor = min(sum(old.values()), sum(new.values()))
    for _ in range(80):
        cluster.reconcile()
        assert cluster.serving() >= floor
        cluster.tick()
        assert cluster.serving() >= floor
        assert cluster.condition("NoSurgeCapacity")[0] == "absent"
    cluster.settle()
    cluster.assert_follows_plan()


@SLOW
@given(Seeds)
def test_a_change_from_one_type_to_another_leaves_no_hole(rng: random.Random) -> None:
    """The transition of AIBrix #637: an engine of `a` does the work of three of `b`, and none may leave before all that
    takes its work over serves."""
    cluster = roomy(rng)
    cluster.add({"a": 4})
    cluster.settle()
    cluster.plan({"a": 1, "b": 9})
    for _ in range(80):
        cluster.reconcile()
        cluster.tick()
        serving = cluster.serving_by_variant()
        assert 3 * serving.get("a", 0) + serving.get("b", 0) >= 12
    cluster.settle()
    cluster.assert_follows_plan()


@SLOW
@given(Seeds, st.integers(1, 4))
def test_without_room_one_replica_at_a_time_makes_way(rng: random.Random, count: int) -> None:
    """Two variants on the same devices, all of them in use: the old leaves one by one, drained first."""
    cluster = Cluster({"a": count, "b": 40}, rng)
    cluster.add({"a": count}, "other")
    cluster.settle()
    cluster.add({"b": count}, "chat")
    cluster.settle()
    cluster.plan({"b": count}, "other")
    cluster.plan({"a": count}, "chat")
    for _ in range(200):
        for name in rng.sample(["other", "chat"], 2):
            cluster.reconcile(name)
        assert cluster.serving("chat") >= count - 1
        assert cluster.serving("other") >= count
        cluster.tick()
        if cluster.serving_by_variant("chat") == {"a": count}:
            break
    cluster.settle()
    cluster.assert_follows_plan("chat")
    cluster.assert_follows_plan("other")


@SLOW
@given(Seeds, st.integers(1, 3))
def test_two_services_that_swap_types_without_any_room_do_not_wait_for_each_other(rng: random.Random, n: int) -> None:
    cluster = Cluster({"a": n, "b": n}, rng)
    cluster.add({"a": n}, "one")
    cluster.add({"b": n}, "two")
    cluster.settle()
    cluster.plan({"b": n}, "one")
    cluster.plan({"a": n}, "two")
    blocked = False
    for _ in range(300):
        for name in rng.sample(["one", "two"], 2):
            cluster.reconcile(name)
            blocked |= cluster.condition("NoSurgeCapacity", name)[0] == "True"
            assert cluster.serving(name) >= n - 1
        cluster.tick()
        if cluster.serving_by_variant("one") == {"b": n} and cluster.serving_by_variant("two") == {"a": n}:
            break
    assert blocked
    cluster.settle()
    cluster.assert_follows_plan("one")
    cluster.assert_follows_plan("two")


@SLOW
@given(Seeds, plans(3), st.booleans())
def test_a_template_change_rolls_one_variant_at_a_time_and_keeps_serving(
    rng: random.Random, replicas: dict[str, int], room: bool
) -> None:
    cluster = roomy(rng) if room else Cluster({k: max(1, n) for k, n in replicas.items()}, rng)
    cluster.add(replicas)
    cluster.settle()
    cluster.edit("chat", args=["--enforce-eager"])
    total = sum(replicas.values())
    floor = total if room else total - POLICY.max_unavailable_engines
    for _ in range(100):
        cluster.reconcile()
        cluster.tick()
        assert cluster.serving() >= min(floor, total)
        mixed = [
            obj["metadata"]["name"]
            for obj in cluster.deployments.values()
            if len({pod["metadata"]["annotations"][ANNOTATION_INPUTS] for pod in cluster._pods_of(obj)}) > 1
        ]
        assert len(mixed) <= 1
    cluster.settle()
    cluster.assert_follows_plan()
    assert all("--enforce-eager" in pod["spec"]["containers"][0]["args"] for pod in cluster.pods.values())


@SLOW
@given(Seeds, st.integers(1, 3), st.integers(1, 3))
def test_a_template_that_never_comes_up_leaves_the_old_engines_serving_and_can_be_undone(
    rng: random.Random, a: int, b: int
) -> None:
    cluster = roomy(rng)
    cluster.add({"a": a, "b": b})
    cluster.settle()
    good = {pod.template_hash for pod in cluster.observe().pods}
    cluster.edit("chat", args=["--attention-backend", "NONE"])
    for _ in range(80):
        cluster.reconcile()
        cluster.broken |= {pod.template_hash for pod in cluster.observe().pods} - good
        cluster.tick()
        assert cluster.serving() >= a + b
    assert cluster.broken
    assert cluster.condition("Ready") == ("False", "EngineCrashLooping")
    cluster.edit("chat", args=[])
    cluster.settle()
    cluster.assert_follows_plan()


@SLOW
@given(Seeds, st.lists(plans(3), min_size=2, max_size=4))
def test_faults_restarts_and_refusals_on_the_way_do_not_change_where_it_ends(
    rng: random.Random, sequence: list[dict[str, int]]
) -> None:
    cluster = Cluster(dict.fromkeys(TYPES, 4), rng)
    cluster.add(sequence[0])
    refusal = Refusal(namespace="ns", service="chat", reason="ProfileNotFound", message="no profile")
    for replicas in sequence:
        cluster.plan(replicas)
        for _ in range(rng.randint(5, 30)):
            if rng.random() < 0.1:
                cluster.lose_a_pod()
            choice = rng.random()
            if choice < 0.2:
                cluster.reconcile(desired=None)
            elif choice < 0.3:
                cluster.reconcile(desired=refusal)
            elif choice < 0.9:
                cluster.reconcile()
            else:
                _interrupted(cluster)
            if rng.random() < 0.1:
                cluster.edit("chat", args=[f"--seed={rng.randint(0, 3)}"])
            cluster.tick()
    cluster.settle()
    cluster.assert_follows_plan()


def _interrupted(cluster: Cluster) -> None:
    """The operator dies after some of its actions."""
    actions = reconcile(cluster.desired["chat"], cluster.observe())
    for action in actions[: cluster.rng.randint(0, len(actions))]:
        cluster.carry_out(action)


@SLOW
@given(Seeds, plans(3), plans(3))
def test_reconciling_its_own_result_comes_to_rest(rng: random.Random, old: dict[str, int], new: dict[str, int]) -> None:
    """With the cluster frozen at a random moment: mark, shrink, nothing."""
    cluster = Cluster(dict.fromkeys(TYPES, 4), rng)
    cluster.add(old)
    cluster.settle()
    cluster.plan(new)
    for _ in range(rng.randint(0, 15)):
        cluster.reconcile()
        cluster.tick()
    rounds = [cluster.reconcile() for _ in range(4)]
    assert rounds[-1] == ()


@SLOW
@given(Seeds, plans(3), plans(3))
def test_a_refusal_never_removes_a_running_engine(rng: random.Random, old: dict[str, int], new: dict[str, int]) -> None:
    cluster = roomy(rng)
    cluster.add(old)
    cluster.settle()
    refusal = Refusal(namespace="ns", service="chat", reason="UnknownGPUType", message="GPUType x does not exist")
    cluster.desired["chat"] = refusal
    for _ in range(40):
        cluster.reconcile()
        cluster.tick()
    assert cluster.serving() == sum(old.values())
    assert cluster.condition("Planned") == ("False", "UnknownGPUType")
    assert cluster.condition("Ready") == ("False", "UnknownGPUType")
    cluster.plan(new)
    cluster.settle()
    cluster.assert_follows_plan()


@SLOW
@given(Seeds, st.integers(2, 5), st.data())
def test_the_pods_that_leave_are_the_ones_that_were_marked(rng: random.Random, old: int, data: st.DataObject) -> None:
    new = data.draw(st.integers(1, old - 1))
    cluster = roomy(rng)
    cluster.add({"a": old})
    cluster.settle()
    before = set(cluster.pods)
    cluster.plan({"a": new})
    marked: set[str] = set()
    for _ in range(60):
        actions = cluster.reconcile()
        shrinks = any(isinstance(a, ApplyDeployment) and a.manifest["spec"]["replicas"] == new for a in actions)
        assert not (shrinks and any(isinstance(a, AnnotatePod) for a in actions)), "marks must be seen first"
        marked |= {n for n, pod in cluster.pods.items() if ANNOTATION_DRAINING in pod["metadata"]["annotations"]}
        assert before - set(cluster.pods) <= marked
        leaving = {n for n, pod in cluster.pods.items() if "deletionTimestamp" in pod["metadata"]}
        assert leaving <= marked, "a pod is deleted that still gets requests"
        cluster.tick()
    assert before - set(cluster.pods) == marked
    assert len(cluster.pods) == new
