"""The independent check: the inputs and a plan in, the constraints that the plan breaks out.

    PlanInputs, Plan, the plan before --violations--> [] or what, where, the figure, and what is allowed

A solver is a large program, and this is what keeps a mistake in it from reaching engines. So it shares no code with
the solver, the planner or the routing, and starts from what users and clusters said (objects, devices, rates) and from
the model of performance, which is what a promise is made of. Every figure of a plan that somebody acts on is computed
again: replicas against the service's bounds, devices against inventory and limit beside the plans that stay in force,
shares of each bucket, unserved demand, cost, watts, and what the requests of each variant will see with the replicas
that it has: they keep the objective, and the plan says no other figures. So a plan in force may be kept up to the whole
load that it holds; the headroom that new plans leave (`utilizationTarget`) is no promise, and not asked for. What is
merely said (bindings, alternatives, words) is not checked. Whether the plan is a good one is not asked here either; the
solver's bound is the proof of that, and here it only must not contradict itself.

Comparisons are written so that NaN breaks them. The tolerances are wide of a solver's rounding and far below anything
that matters, since a plan that is dropped for nothing costs an operator its plan.

It runs after every solve: a thousand services take about a tenth of a second, where the model remembers what the
planner has asked it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from llmfleet.api import (
    DEFAULT_CONFIGURATION,
    LLMService,
    ModelProfile,
    Plan,
    PlannedVariant,
    PowerDomain,
    ServiceForecast,
    ServicePlan,
)
from llmfleet.placement.checker_nodes import idle_cost, kept_by_nodes
from llmfleet.placement.checker_routes import kept_after_losses, kept_by_routes
from llmfleet.placement.checker_stages import handover_of, kept_by_stage
from llmfleet.placement.inputs import PlanInputs
from llmfleet.placement.performance.figures import VariantFigures, figures_of_variant
from llmfleet.placement.variants import memory_needed_gib, memory_usable_gib
from llmfleet.placement.violation import (
    FREE_DEVICE_PER_HOUR,
    LOAD_TOLERANCE,
    MONEY_TOLERANCE,
    STAGE_PREMIUM,
    Constraint,
    Violation,
    money,
)
from llmfleet.placement.workload import known_sizes, planned_sizes, settled_demand

PerReplica = Callable[[ServicePlan, PlannedVariant], float]
"""What one replica of a service's variant takes of a limit."""


def violations(inputs: PlanInputs, plan: Plan, previous: Plan | None = None) -> list[Violation]:
    """Every constraint that the plan breaks; empty for a sound one.

    `previous` is what was in force when it was made: the plans of services that cannot be planned come from there.
    """
    before = {} if previous is None else {part.key: part for part in (*previous.kept, *previous.services)}
    return list(_Check(settled_demand(inputs, before), plan).all(previous))


class _Check:
    """One plan beside its inputs, indexed."""

    def __init__(self, inputs: PlanInputs, plan: Plan) -> None:
        self.inputs, self.plan = inputs, plan
        self.services = {service.key: service for service in inputs.services}
        self.profiles = {profile.key: profile for profile in inputs.profiles}
        self.gpu_types = {gpu_type.metadata.name: gpu_type for gpu_type in inputs.gpu_types}
        self._known: dict[tuple[object, ...], VariantFigures | None] = {}

    def all(self, previous: Plan | None) -> Iterator[Violation]:
        yield from self._coverage()
        yield from self._kept(previous)
        yield from self._devices()
        yield from self._budget()
        for planned in self.plan.services:
            service = self.services.get(planned.key)
            if service is not None:
                yield from self._service(service, planned)
        yield from self._totals()
        yield from self._proof(previous)

    # The fleet

    def _coverage(self) -> Iterator[Violation]:
        answered = Counter([part.key for part in self.plan.services] + [refusal.key for refusal in self.plan.refusals])
        for key in self.services:
            if answered[key] != 1:
                yield Violation("coverage", key, answered[key], "one plan or one refusal")
        for key in answered:
            if key not in self.services:
                yield Violation("coverage", key, "planned or refused", "services of the inputs only")

    def _kept(self, previous: Plan | None) -> Iterator[Violation]:
        idle = {refusal.key for refusal in self.plan.refusals} | set(self.inputs.unreadable)
        before = {} if previous is None else {part.key: part for part in (*previous.kept, *previous.services)}
        kept = {part.key: part for part in self.plan.kept}
        for key in sorted(idle & before.keys() - kept.keys()):
            yield Violation("kept", key, "dropped", "the plan in force, since it cannot be planned")
        for key, part in kept.items():
            if key not in idle:
                yield Violation("kept", key, "kept", "nothing: the service was planned, or is gone")
            elif key not in before:
                yield Violation("kept", key, "kept", "nothing: it had no plan before")
            elif part != before[key]:
                yield Violation("kept", key, "changed", "the plan in force, untouched")

    def _devices(self) -> Iterator[Violation]:
        used, held = _devices_of(self.plan.services), _devices_of(self.plan.kept)
        for name in sorted(used):
            gpu_type = self.gpu_types.get(name)
            exist = self.inputs.inventory.get(name, 0)
            if gpu_type is not None and gpu_type.spec.limit is not None:
                exist = min(exist, gpu_type.spec.limit)
            # Engines of plans that stay in force are there even where devices have gone.
            free = max(0, exist - held[name])
            if not used[name] <= free:
                yield Violation("devices", f"GPUType {name}", used[name], f"at most {free} beside {held[name]} kept")

    def _budget(self) -> Iterator[Violation]:
        allowed = self.inputs.policy.budget_per_hour
        if allowed is not None:
            yield from self._within(
                "budget", "fleet", allowed, self._price, *idle_cost(self.plan, self.gpu_types.values())
            )
        for domain in self.inputs.power_domains:
            where = f"PowerDomain {domain.metadata.name}"
            yield from self._within("power", where, domain.spec.budget_watts, self._power(domain))
        for limit in self.inputs.policy.namespace_limits:
            where, mine = f"namespace {limit.namespace}", self._only_in(limit.namespace)
            if limit.cost_per_hour is not None:
                yield from self._within("namespace", f"cost of {where}", limit.cost_per_hour, mine(self._price))
            for name, most in (limit.devices or {}).items():
                yield from self._within("namespace", f"GPUType {name} of {where}", most, mine(_devices_of_type(name)))

    def _within(
        self,
        constraint: Constraint,
        where: str,
        allowed: float,
        per_replica: PerReplica,
        held_beside: float = 0.0,
        used_beside: float = 0.0,
    ) -> Iterator[Violation]:
        """What is planned stays within what the plans that stay in force leave of a limit. `held_beside` and
        `used_beside`: what else counts, of what stays and of what is planned."""

        def total(parts: list[ServicePlan]) -> float:
            return math.fsum(v.replicas * per_replica(part, v) for part in parts for v in part.variants)

        used, held = total(self.plan.services) + used_beside, total(self.plan.kept) + held_beside
        free = max(0.0, allowed - held)
        if not used <= free + MONEY_TOLERANCE * max(1.0, allowed):
            yield Violation(constraint, where, used, f"at most {free:g} beside {held:g} kept")

    @staticmethod
    def _only_in(namespace: str) -> Callable[[PerReplica], PerReplica]:
        """What a replica takes where its service is of a namespace, else 0."""
        return lambda taken: lambda part, variant: taken(part, variant) if part.namespace == namespace else 0.0

    def _price(self, _: ServicePlan, variant: PlannedVariant) -> float:
        gpu_type = self.gpu_types.get(variant.gpu_type)
        if gpu_type is None:
            return variant.cost_per_replica_hour
        return gpu_type.spec.device_price_per_hour * variant.devices

    def _power(self, domain: PowerDomain) -> PerReplica:
        """Watts of a replica that count in a domain; 0 where a type's power is not known."""

        def watts(_: ServicePlan, variant: PlannedVariant) -> float:
            if variant.gpu_type not in domain.spec.gpu_types:
                return 0.0
            gpu_type = self.gpu_types.get(variant.gpu_type)
            if gpu_type is None:
                return variant.watts_per_replica or 0.0
            return 0.0 if gpu_type.spec.watts is None else gpu_type.spec.watts.peak * variant.devices

        return watts

    def _totals(self) -> Iterator[Violation]:
        plan = self.plan
        yield from money("cost", "fleet", plan.cost_per_hour, sum(part.cost_per_hour for part in plan.services))
        yield from kept_by_nodes(plan, self.gpu_types.values())
        watts = [
            variant.replicas * variant.watts_per_replica
            for part in plan.services
            for variant in part.variants
            if variant.watts_per_replica is not None
        ]
        if (plan.watts is None) != (not watts):
            yield Violation("watts", "fleet", str(plan.watts), "a figure where the power of a type in use is known")
        elif plan.watts is not None:
            yield from money("watts", "fleet", plan.watts, sum(watts))
        short = any(part.unserved_rps > 0 for part in plan.services)
        if short != (plan.status == "partial"):
            yield Violation("status", "fleet", plan.status, "partial if and only if demand is unserved")
        asked = self.inputs.policy.optimality_gap
        if plan.status == "optimal" and (plan.gap_cost is None or not plan.gap_cost <= asked + LOAD_TOLERANCE):
            yield Violation("status", "fleet", f"optimal at a gap of {plan.gap_cost}", f"a proven gap of {asked:g}")

    def _proof(self, previous: Plan | None) -> Iterator[Violation]:
        """Bound, gaps and costs do not contradict each other."""
        plan, bound = self.plan, self.plan.bound
        for gap in (plan.gap_cost, plan.gap_unserved):
            if gap is not None and not 0 <= gap <= 1:
                yield Violation("gap", "fleet", gap, "0 to 1: a bound is no higher than what it bounds")
        if (bound is None) != (plan.gap_cost is None):
            yield Violation("bound", "fleet", str(bound), "a bound and a gap of the cost, or neither")
        if bound is None or plan.gap_cost is None:
            return
        most = plan.cost_per_hour + self._change(previous)
        most += FREE_DEVICE_PER_HOUR * _devices_of(plan.services).total()
        staged = (variant for part in plan.services for variant in part.variants if variant.role is not None)
        most += STAGE_PREMIUM * math.fsum(one.replicas * one.cost_per_replica_hour for one in staged)
        if not 0 <= bound <= most + MONEY_TOLERANCE * max(1.0, most):
            yield Violation("bound", "fleet", bound, f"0 to {most:g}, the cost with the price of change")
        least = plan.cost_per_hour * (1 - plan.gap_cost)
        least -= FREE_DEVICE_PER_HOUR * sum(one.idle_devices for one in plan.nodes or [])
        if not bound >= least - MONEY_TOLERANCE * max(1.0, least):
            yield Violation("bound", "fleet", bound, f"{least:g} or more at a gap of {plan.gap_cost:g}")

    def _change(self, previous: Plan | None) -> float:
        """The most that the step from the plan before can be charged with, per hour."""
        if previous is None:
            return 0.0
        before = {part.key: part for part in (*previous.kept, *previous.services)}
        charged = 0.0
        for part in self.plan.services:
            old = before.get(part.key)
            variants = {variant.name: variant for variant in ([] if old is None else old.variants)}
            counts = {name: variant.replicas for name, variant in variants.items()}
            now = {variant.name: variant for variant in part.variants}
            for name, variant in {**variants, **now}.items():
                moved = abs((now[name].replicas if name in now else 0) - counts.get(name, 0))
                gpu_type = self.gpu_types.get(variant.gpu_type)
                price = 0.0 if gpu_type is None else gpu_type.spec.device_price_per_hour
                premium = 1.0 if variant.role is None else 1.0 + STAGE_PREMIUM
                charged += premium * moved * variant.devices * max(price, FREE_DEVICE_PER_HOUR)
        return self.inputs.policy.switching_cost_fraction * charged

    # One service

    def _service(self, service: LLMService, planned: ServicePlan) -> Iterator[Violation]:
        key, bounds = service.key, service.spec.replicas
        total = sum(variant.replicas for variant in planned.variants)
        if bounds.max is not None and not total <= bounds.max:
            yield Violation("replicas_max", key, total, f"at most {bounds.max}")
        in_use = sum(variant.replicas > 0 for variant in planned.variants)
        if bounds.max_variants is not None and not in_use <= bounds.max_variants:
            yield Violation("variants_max", key, in_use, f"at most {bounds.max_variants}")
        if total < bounds.min and planned.shortfall is None:
            yield Violation("replicas_min", key, total, f"at least {bounds.min}, or a shortfall that says so")
        profile = self.profiles.get(f"{service.metadata.namespace}/{service.spec.profile}")
        if profile is None:
            yield Violation("variant", key, "planned", f"a refusal: ModelProfile {service.spec.profile} is unknown")
            return
        names = Counter(variant.name for variant in planned.variants)
        for name, times in names.items():
            if times > 1:
                yield Violation("variant", f"{key} {name}", times, "once")
        sound: dict[str, VariantFigures] = {}
        seen = known_sizes(service, profile.spec.buckets, self.inputs.demand.get(key))
        sizes = None if seen is None else planned_sizes(profile.spec.buckets, seen)
        for variant in planned.variants:
            found = list(self._variant(service, profile, variant))
            yield from found
            figures = self._figures(service, profile, variant)
            if not found and figures is not None:
                sound[variant.name] = figures if sizes is None else figures.of_sizes(sizes)
        cost = math.fsum(variant.replicas * variant.cost_per_replica_hour for variant in planned.variants)
        cost += planned.idle_cost_per_hour or 0.0
        yield from money("cost", key, planned.cost_per_hour, cost)
        if planned.buckets != profile.spec.buckets or len(planned.demand) != planned.buckets.count:
            yield Violation("buckets", key, len(planned.demand), f"the {profile.spec.buckets.count} of {profile.key}")
            return
        yield from self._demand(service, planned)
        yield from kept_by_routes(service, planned, sound)
        spot = {name for name, gpu_type in self.gpu_types.items() if gpu_type.spec.capacity_class == "spot"}
        yield from kept_after_losses(service, planned, sound, spot)

    def _variant(self, service: LLMService, profile: ModelProfile, variant: PlannedVariant) -> Iterator[Violation]:
        where = f"{service.key} {variant.name}"
        gpu_type = self.gpu_types.get(variant.gpu_type)
        allowed = service.spec.gpu_types
        degree = variant.devices
        if gpu_type is None:
            yield Violation("variant", where, variant.gpu_type, "a known GPUType")
            return
        if allowed and variant.gpu_type not in allowed:
            yield Violation("variant", where, variant.gpu_type, f"one of {', '.join(allowed)}")
        if self._figures(service, profile, variant) is None:
            allowed_in_words = f"what {profile.key} has measured, or what can be predicted"
            yield Violation("variant", where, f"{degree} x {variant.gpu_type}", allowed_in_words)
        if not variant.replicas >= 0:
            yield Violation("variant", where, variant.replicas, "0 replicas or more")
        if gpu_type.spec.capacity_class == "spot" and service.spec.spot is None:
            yield Violation("variant", where, variant.gpu_type, "a type on demand: the service has no spec.spot")
        yield from kept_by_stage(service, variant, gpu_type, can_hand_over=self.inputs.can_hand_over)
        yield from self._how_it_runs(service, profile, variant)
        view = _view(profile, variant)
        if view is not None:
            needed = memory_needed_gib(view, service.spec.model.context_length, degree)
            usable = memory_usable_gib(gpu_type)
            if not needed <= usable:
                yield Violation("variant", where, needed, f"at most {usable:g} GiB per device")
        most = gpu_type.spec.devices_per_node
        if most is not None and not degree <= most:
            yield Violation("variant", where, degree, f"at most the {most} devices of a node")
        price = gpu_type.spec.device_price_per_hour * degree
        yield from money("cost", where, variant.cost_per_replica_hour, price)
        watts = None if gpu_type.spec.watts is None else gpu_type.spec.watts.peak * degree
        if (watts is None) != (variant.watts_per_replica is None):
            yield Violation("watts", where, str(variant.watts_per_replica), str(watts))
        elif watts is not None and variant.watts_per_replica is not None:
            yield from money("watts", where, variant.watts_per_replica, watts)

    def _how_it_runs(self, service: LLMService, profile: ModelProfile, variant: PlannedVariant) -> Iterator[Violation]:
        """Its configuration is one that the service names, as the profile has it, and nothing else sets its options."""
        where, name, planned = f"{service.key} {variant.name}", _configuration(variant), variant.configuration
        if name not in service.spec.configurations:
            yield Violation("configuration", where, name, f"one of {', '.join(service.spec.configurations)}")
        if planned is None:
            return
        if planned not in profile.spec.configurations:
            yield Violation("configuration", where, name, f"one of ModelProfile {profile.key}, as it is there")
        argument = planned.contradicted_by(service.spec.engine.args)
        if argument is not None:
            yield Violation("configuration", where, name, f"nothing that spec.engine.args sets, as {argument} does")
        others = planned.model is not None or planned.revision is not None
        if others and service.spec.model.name != profile.spec.model:
            yield Violation("configuration", where, name, f"the weights of {service.spec.model.name}")

    def _demand(self, service: LLMService, planned: ServicePlan) -> Iterator[Violation]:
        traffic = service.spec.traffic
        observed = self.inputs.demand.get(service.key)
        expected = [0.0] * len(planned.demand)
        if traffic.mode == "observe" and observed is not None:
            expected = observed.rps
        elif traffic.requests_per_second is not None and traffic.sizes is not None:
            whole = sum(size.share for size in traffic.sizes)
            for size in traffic.sizes:
                bucket = planned.buckets.index(size.input_tokens, size.output_tokens)
                expected[bucket] += traffic.requests_per_second * size.share / whole
        if planned.sizes != known_sizes(service, planned.buckets, observed):
            right_sizes = "those that were seen or written, or that the plan in force has"
            yield Violation("demand", planned.key, "other sizes", right_sizes)
        forecast = self.inputs.forecast.get(service.key)
        if forecast is not None:
            yield from self._forecast(service, planned, forecast, expected)
            return
        if planned.forecast is not None:
            yield Violation("demand", planned.key, f"a forecast of {planned.forecast.rps:g}", "none: there is none")
        for bucket, (rate, right) in enumerate(zip(planned.demand, expected, strict=True)):
            if not abs(rate - right) <= LOAD_TOLERANCE * right:
                yield Violation("demand", f"{planned.key} bucket {bucket}", rate, f"{right:g} requests per second")

    def _forecast(
        self, service: LLMService, planned: ServicePlan, forecast: ServiceForecast, now: list[float]
    ) -> Iterator[Violation]:
        """Demand is no less than that of now and than what is forecast before what is planned could serve, and no more
        than what is forecast at all."""
        types = [self.gpu_types[v.gpu_type].spec for v in planned.variants if v.gpu_type in self.gpu_types]
        nodes = [spec.provisionable.startup_seconds for spec in types if spec.provisionable is not None]
        ready = service.spec.engine.startup_seconds + max(nodes, default=0)
        for bucket, (rate, asked) in enumerate(zip(planned.demand, now, strict=True)):
            before = [point.rps[bucket] for point in forecast.points if point.after_seconds <= ready]
            least, most = max([asked, *before]), max([asked, *(point.rps[bucket] for point in forecast.points)])
            if not least * (1 - LOAD_TOLERANCE) <= rate <= most * (1 + LOAD_TOLERANCE):
                allowed = f"{least:g} to {most:g} requests per second, by demand and forecast"
                yield Violation("demand", f"{planned.key} bucket {bucket}", rate, allowed)
        more = sum(planned.demand) - sum(now)
        said = 0.0 if planned.forecast is None else planned.forecast.rps
        if not abs(said - more) <= LOAD_TOLERANCE * max(1.0, sum(planned.demand)):
            yield Violation("demand", f"{planned.key} forecast", said, f"{more:g} requests per second")

    def _figures(self, service: LLMService, profile: ModelProfile, variant: PlannedVariant) -> VariantFigures | None:
        view, share = _view(profile, variant), service.spec.traffic.prefix_cache_hit_share
        layout, handover = (variant.tensor_parallel, variant.pipeline_parallel), handover_of(view, variant)
        slot = (profile.key, share, variant.gpu_type, *layout, _configuration(variant), handover)
        if slot not in self._known:
            gpu_type = self.gpu_types.get(variant.gpu_type)
            self._known[slot] = (
                None
                if gpu_type is None or view is None
                else figures_of_variant(
                    view, gpu_type, *layout, now=self.inputs.at, prefix_share=share, handover=handover
                )
            )
        return self._known[slot]


def _devices_of_type(name: str) -> PerReplica:
    return lambda _, variant: float(variant.devices) if variant.gpu_type == name else 0.0


def _configuration(variant: PlannedVariant) -> str:
    return DEFAULT_CONFIGURATION if variant.configuration is None else variant.configuration.name


def _view(profile: ModelProfile, variant: PlannedVariant) -> ModelProfile | None:
    """The profile as the variant's configuration runs it; None where it does not have it."""
    try:
        return profile.configured(_configuration(variant))
    except KeyError:
        return None


def _devices_of(parts: Iterable[ServicePlan]) -> Counter[str]:
    devices: Counter[str] = Counter()
    for part in parts:
        for variant in part.variants:
            devices[variant.gpu_type] += variant.replicas * variant.devices
    return devices
