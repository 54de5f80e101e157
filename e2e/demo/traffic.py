"""The demo's clients, all of them the official `openai` client: nothing knows it talks to llmfleet.

A request counts as failed when it raises, ends without a finish reason, or returns fewer tokens than it asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import openai


@dataclass
class Tally:
    """What the clients saw."""

    succeeded: int = 0
    streamed_tokens: int = 0
    answers: dict[str, list[str]] = field(default_factory=dict)
    """By prompt, what the streams that ended well said; each prompt is asked with one length only."""
    failures: list[str] = field(default_factory=list)


class Clients:
    """Requests of one model through one gateway; every failure is kept with its cause."""

    def __init__(self, base_url: str, api_key: str, model: str) -> None:
        # No retries in the client: a retried failure would be a failure that nobody sees.
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=300)
        self._model = model
        self.tally = Tally()

    async def stream(self, prompt: str, tokens: int, show: Callable[[str], None] | None = None) -> int:
        """Streams one chat completion of exactly `tokens` tokens; returns how many arrived."""
        received = 0
        said = ""
        finish: str | None = None
        try:
            stream = await self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=tokens,
                stream=True,
                stream_options={"include_usage": True},
                # The likeliest token each time: the same question always has the same answer.
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            async for chunk in stream:
                if chunk.usage is not None:
                    received = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    finish = choice.finish_reason or finish
                    said += choice.delta.content or ""
                    if show is not None and choice.delta.content:
                        show(choice.delta.content)
        except openai.OpenAIError as error:
            self.tally.failures.append(f"stream of {tokens} tokens: {type(error).__name__}: {error}")
            return 0
        if finish is None or received != tokens:
            self.tally.failures.append(f"stream of {tokens} tokens ended with {received} and finish reason {finish}")
        else:
            self.tally.succeeded += 1
            self.tally.answers.setdefault(prompt, []).append(said)
        self.tally.streamed_tokens += received
        return received

    async def keep_streaming(self, stop: asyncio.Event, prompt: str, tokens: int) -> None:
        """Streams one answer after another until `stop` is set; the one in flight is finished first."""
        while not stop.is_set():
            if not await self.stream(prompt, tokens):
                await asyncio.sleep(0.5)

    async def keep_loading(self, stop: asyncio.Event, pause_s: float, prompt: str, tokens: int) -> None:
        """Sends one plain request after another until `stop` is set; the one in flight is finished first."""
        while not stop.is_set():
            await self._once(prompt, tokens)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause_s)

    async def _once(self, prompt: str, tokens: int) -> None:
        try:
            answer = await self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=tokens,
                extra_body={"ignore_eos": True},
            )
        except openai.OpenAIError as error:
            self.tally.failures.append(f"request of {tokens} tokens: {type(error).__name__}: {error}")
            return
        if answer.usage is None or answer.usage.completion_tokens != tokens:
            self.tally.failures.append(f"request of {tokens} tokens returned {answer.usage}")
        else:
            self.tally.succeeded += 1

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()
