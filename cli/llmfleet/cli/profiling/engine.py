"""The engine under measurement: one streamed completion at a time, with the times at which its tokens came.

Prompts are sent as token ids to `/v1/completions`, so their length is exact whatever the tokenizer does. Answers are
kept at their length by `ignore_eos`, `min_tokens` and `max_tokens`. The usage that the engine reports at the end of
each stream must agree with both, or the measurement would be filed under the wrong sizes.

Times are the client's, on the event loop's clock, from before the request is sent: what a user sees.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from llmfleet.cli.refused import RefusedError, shown

_CONNECT_DEADLINE_S = 10.0
_SILENCE_DEADLINE_S = 300.0
"""Longest wait for the next byte; a long prompt behind many others takes a while on a slow engine."""
_KEEPALIVE_S = 2.0
"""Shorter than vLLM's five seconds, so that no request meets a connection that is just being closed."""


@dataclass(frozen=True)
class Completed:
    """One finished request; times in seconds on the event loop's clock."""

    started_s: float
    first_token_s: float
    finished_s: float
    output_tokens: int

    @property
    def ttft_ms(self) -> float:
        """Time to first token."""
        return (self.first_token_s - self.started_s) * 1000

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token after the first."""
        return (self.finished_s - self.first_token_s) * 1000 / (self.output_tokens - 1)


@dataclass(frozen=True)
class ServedModel:
    """A model as the engine names it. max_tokens: prompt and answer together; weights: repository or path that they
    came from. None where it does not say."""

    name: str
    max_tokens: int | None
    weights: str | None = None


class MeasuredEngine:
    """An OpenAI-compatible engine. Every method raises RefusedError, in one line, where the engine fails to answer."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._root = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.AsyncClient(
            base_url=self._root,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(_SILENCE_DEADLINE_S, connect=_CONNECT_DEADLINE_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_S),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def served_model(self, wanted: str | None) -> ServedModel:
        """The model `wanted`, or the only one that is served."""
        listed = (await self._json("GET", "/v1/models")).get("data", [])
        names = [model["id"] for model in listed]
        if wanted is None and len(names) != 1:
            raise RefusedError(f"{self._root} serves {len(names)} models, say which: {', '.join(names)}")
        for model in listed:
            if wanted in (None, model["id"]):
                return ServedModel(model["id"], model.get("max_model_len"), model.get("root"))
        raise RefusedError(f"{self._root} does not serve {wanted!r}; it serves {', '.join(names) or 'nothing'}")

    async def version(self) -> str:
        """`vllm 0.32.0`; empty for an engine without vLLM's `/version`."""
        try:
            response = await self._client.get("/version")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        return f"vllm {response.json()['version']}" if response.status_code == httpx.codes.OK else ""

    async def cache_dtype(self) -> str | None:
        """Type of the numbers in the KV cache, as vLLM's metrics say; None for an engine that does not."""
        try:
            response = await self._client.get("/metrics")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != httpx.codes.OK:
            return None
        found = re.search(r'^vllm:cache_config_info.*[{,]cache_dtype="([^"]*)"', response.text, re.MULTILINE)
        return None if found is None else found.group(1)

    async def tokenize(self, model: str, text: str) -> list[int]:
        """Token ids of a text, without those that mark its beginning."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        tokens: list[int] = (await self._json("POST", "/tokenize", body))["tokens"]
        return tokens

    async def complete(self, model: str, prompt: Sequence[int], output_tokens: int) -> Completed:
        """Streams one answer of exactly `output_tokens` tokens to a prompt of token ids."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        clock = asyncio.get_running_loop().time
        started = clock()
        first = last = None
        usage: dict[str, Any] | None = None
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    raise self._refused("POST", "/v1/completions", response)
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RefusedError(f"{self._root} broke off an answer: {shown(event['error'])}")
                    if event.get("choices"):
                        last = clock()
                        first = first or last
                    usage = event.get("usage") or usage
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if first is None or last is None or usage is None:
            raise RefusedError(f"{self._root} ended an answer without tokens or without their number")
        sizes = (usage["prompt_tokens"], usage["completion_tokens"])
        if sizes != (len(prompt), output_tokens):
            raise RefusedError(
                f"{self._root} counted {sizes[0]} input and {sizes[1]} output tokens for a request of "
                f"{len(prompt)} and {output_tokens}: a measurement of it would be filed under the wrong sizes"
            )
        return Completed(started, first, last, output_tokens)

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            response = await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != httpx.codes.OK:
            raise self._refused(method, path, response)
        return response.json()

    def _unreachable(self, error: httpx.HTTPError) -> RefusedError:
        return RefusedError(f"{self._root} does not answer: {str(error) or type(error).__name__}")

    def _refused(self, method: str, path: str, response: httpx.Response) -> RefusedError:
        return RefusedError(f"{self._root} answered {method} {path} with {response.status_code}: {response.text[:400]}")
