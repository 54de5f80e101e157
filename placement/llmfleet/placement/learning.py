"""From what gateways saw of a fleet's engines to what its profiles have learnt: one step of online correction.

    ObservedVariant (service, variant, sums by bucket and load)  \\
    services, profiles, GPU types                                 >  learn  -->  Learnt, one for each profile
    corrections so far, by profile                               /

Services that share a profile teach it together. What is learnt of a pool counts for its hardware (`pools`), unless the
profile has measured the pool itself, so all pools of a type learn from each other.

An observation is set against the model as it was before any correction, so that an error of the correction heals. What
cannot be a model's error is dropped and said: an engine that seems more than `BOUND` times as fast as predicted (other
weights, an engine that is not loaded as it was thought), and a variant that the service cannot have. An engine that is
more than that slower is not dropped: its factor stays at the bound, which is on the safe side.

Pure; the caller says what time it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from llmfleet.api import Correction, GPUType, Learnt, LLMService, ModelProfile, ObservedCell, ObservedVariant
from llmfleet.api.gputype import objection
from llmfleet.placement.configurations import VariantKey, permitted, variant_name
from llmfleet.placement.performance.correction import BOUND, effects, observe, since
from llmfleet.placement.performance.observation import Seen, against
from llmfleet.placement.performance.prefix import prefix_cached
from llmfleet.placement.performance.variant_model import variant_model
from llmfleet.placement.pools import with_figures, with_measurements
from llmfleet.placement.variants import offered

_STEP_OF_NEWS = 0.03  # of a logarithm


def learn(
    services: Mapping[str, LLMService],
    profiles: Mapping[str, ModelProfile],
    gpu_types: Mapping[str, GPUType],
    corrections: Mapping[str, Sequence[Correction]],
    observed: Sequence[ObservedVariant],
    *,
    at: float,
) -> list[Learnt]:
    """What profiles learn from these observations, of those that learn or drop something; all mappings by key.

    `corrections`: what each profile says so far; `at`: seconds since 1970.
    """
    types = {one.metadata.name: one for one in with_figures(list(gpu_types.values()))}
    by_profile: defaultdict[str, list[tuple[LLMService, ObservedVariant]]] = defaultdict(list)
    for one in observed:
        service = services.get(one.service)
        if service is None:
            continue
        key = f"{service.metadata.namespace}/{service.spec.profile}"
        if key in profiles and profiles[key].spec.buckets == one.buckets:
            by_profile[key].append((service, one))
    found = []
    for key, some in sorted(by_profile.items()):
        learnt = _Profile(profiles[key], types, corrections.get(key, ())).take(some, at)
        if learnt.dropped or learnt.corrections != list(corrections.get(key, ())):
            found.append(learnt)
    return found


class _Profile:
    """One profile that learns."""

    def __init__(self, profile: ModelProfile, types: Mapping[str, GPUType], so_far: Sequence[Correction]) -> None:
        self._own = profile
        self._types = types
        plain = profile.model_copy(update={"status": profile.status.model_copy(update={"corrections": []})})
        [self._profile] = with_measurements([plain], types.values())
        self._known = {VariantKey.of(one): one for one in so_far}
        self._dropped: list[str] = []

    def take(self, some: Sequence[tuple[LLMService, ObservedVariant]], at: float) -> Learnt:
        configurations = {"default", *(one.name for one in self._own.spec.configurations)}
        for key in sorted(self._known):
            if key.configuration not in configurations:
                self._dropped.append(f"what was learnt of {variant_name(key)}: the profile has no such configuration")
                del self._known[key]
        seen: defaultdict[tuple[VariantKey, float], list[Seen]] = defaultdict(list)
        for service, one in some:
            views, _ = permitted(service, self._profile)
            names = {variant_name(key): key for key in offered(service, views, dict(self._types))}
            if one.variant not in names:
                self._dropped.append(
                    f"what was seen of variant {one.variant} of LLMService {one.service}: it can have "
                    f"{', '.join(sorted(names)) or 'none'}"
                )
                continue
            taught = self._taught(names[one.variant]), service.spec.traffic.prefix_cache_hit_share
            seen[taught] += [_seen(cell) for cell in one.cells]
        for (key, prefix_share), cells in sorted(seen.items()):
            self._learn(key, prefix_share, cells, at)
        return Learnt(
            profile=self._own.key,
            corrections=[self._known[key] for key in sorted(self._known)],
            dropped=self._dropped,
        )

    def _taught(self, key: VariantKey) -> VariantKey:
        """The variant that an observation of this one is kept under."""
        same = self._types[key.gpu_type].spec.same_hardware_as
        if same is None or objection(self._types[key.gpu_type], self._types) is not None:
            return key
        measured = {VariantKey.of(one) for one in self._own.spec.measurements}
        hardware = key._replace(gpu_type=same)
        return hardware if hardware in measured and key not in measured else key

    def _learn(self, key: VariantKey, prefix_share: float, cells: Sequence[Seen], at: float) -> None:
        layout = (key.tensor_parallel, key.pipeline_parallel)
        # A type that was deleted has left its measurements; its pools have its figures.
        gpu_type = self._types.get(key.gpu_type) or next(
            one for one in self._types.values() if one.spec.same_hardware_as == key.gpu_type
        )
        model = variant_model(self._profile.configured(key.configuration), gpu_type, *layout, now=at)
        if model is None:
            return
        measurement = next((one for one in self._profile.spec.measurements if VariantKey.of(one) == key), None)
        correction = since(
            self._known.get(key)
            or Correction(
                gpu_type=key.gpu_type,
                tensor_parallel=key.tensor_parallel,
                pipeline_parallel=key.pipeline_parallel,
                configuration=key.configuration,
            ),
            measurement,
        )
        for observation, predicted in against(prefix_cached(model, prefix_share), cells, at):
            if observation.tpot_ms * BOUND < float(predicted.tpot_ms):
                self._dropped.append(
                    f"what was seen of {variant_name(key)} at {observation.concurrency:.0f} requests in flight: "
                    f"{observation.tpot_ms:.3g} ms per token where {float(predicted.tpot_ms):.3g} ms are predicted; "
                    f"more than {BOUND:g} times as fast is another engine than the profile's"
                )
                continue
            correction = observe(correction, observation, predicted)
        if correction.tpot or correction.ttft:
            self._known[key] = correction


def news(before: ModelProfile, after: ModelProfile) -> bool:
    """Whether a plan may be another one with `after`: what was learnt is told at every step, and mostly says the same
    again. A step smaller than `_STEP_OF_NEWS` is none; several add up, as long as `before` stays the same."""
    if (before.metadata, before.spec) != (after.metadata, after.spec):
        return True
    old = {VariantKey.of(one): one for one in before.status.corrections}
    new = {VariantKey.of(one): one for one in after.status.corrections}
    if old.keys() != new.keys():
        return True
    measured = {VariantKey.of(one) for one in after.spec.measurements}
    for key, correction in new.items():
        for had, has in ((old[key].ttft, correction.ttft), (old[key].tpot, correction.tpot)):
            now = max((one.at for one in has), default=0.0)
            was, is_ = effects(had, now), effects(has, now)
            # Of a variant that was measured no correction makes it faster.
            least = 0.0 if key in measured else -math.inf
            if was.keys() != is_.keys() or any(
                abs(max(least, is_[octave]) - max(least, was[octave])) > _STEP_OF_NEWS for octave in is_
            ):
                return True
    return False


def _seen(cell: ObservedCell) -> Seen:
    return Seen(
        concurrency=cell.concurrency,
        requests=cell.requests,
        input_tokens=cell.input_tokens,
        ttft_ms=cell.ttft_ms,
        decoded_tokens=cell.decoded_tokens,
        decode_ms=cell.decode_ms,
    )
