"""Many callers that race, each on a channel of its own, in one process inside a network namespace.

Reads one JSON object: `seed`, `at_once` (groups that race at one time), `lose` (percent of the
refusals that a caller never gets to see), `groups`: lists of calls with `id`, `target`
(10.77.0.42:9092: also the address that the call comes from), `method`, `request` (hex). The callers
of a group connect first and then send together. Each sends its one request again until it has a
final answer: a reply, or a refusal that no retry heals. Prints one JSON object for each final
answer: `id`, `reply` (hex) or `reason` and `message`, `tries`, `lost`, `began` and `ended`
(monotonic seconds).
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import grpc
import grpc.aio

CALL_TIMEOUT_S = 8
CONNECT_TIMEOUT_S = 10
PAUSE_S = (0.05, 0.4)  # the first and the longest pause before a retry
OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 500),
]
# What a caller that has no reason from the control plane tries again after.
FLEETING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")


class Group:
    """Calls that start at one time."""

    def __init__(self, plan: dict[str, Any], calls: list[dict[str, Any]]) -> None:
        self.plan = plan
        self.calls = calls
        self._connected = 0
        self._go = asyncio.Event()

    async def run(self) -> None:
        """Make every call to its end."""
        await asyncio.gather(*(self._race(call) for call in self.calls))

    async def _race(self, call: dict[str, Any]) -> None:
        dice = random.Random(f"{self.plan['seed']} {call['id']}")
        async with grpc.aio.insecure_channel(call["target"], options=OPTIONS) as channel:
            method: Any = channel.unary_unary(f"/openinfra.v1.AgentApi/{call['method']}")
            try:  # a control plane that is down now is no reason to wait for ever
                await asyncio.wait_for(channel.channel_ready(), CONNECT_TIMEOUT_S)
            except asyncio.TimeoutError:
                pass
            self._connected += 1
            if self._connected == len(self.calls):
                self._go.set()
            await self._go.wait()
            print(json.dumps(await self._insist(method, call, dice)), flush=True)

    async def _insist(self, method: Any, call: dict[str, Any], dice: random.Random) -> Any:
        answer: dict[str, Any] = {"id": call["id"], "tries": 0, "lost": 0}
        answer["began"], pause_s = time.monotonic(), PAUSE_S[0]
        request = bytes.fromhex(call["request"])
        while True:
            answer["tries"] += 1
            try:
                reply = await method(request, timeout=CALL_TIMEOUT_S, wait_for_ready=True)
                said = {"reply": reply.hex()}
            except grpc.aio.AioRpcError as error:
                trailing = dict(error.trailing_metadata() or ())
                reason = trailing.get("openinfra-reason", error.code().name)
                said = {"reason": str(reason), "message": str(error.details())}
            fleeting = said.get("reason") in (*FLEETING, "TRY_LATER")
            if not fleeting and ("reply" in said or dice.randrange(100) >= self.plan["lose"]):
                return {**answer, **said, "ended": time.monotonic()}
            answer["lost"] += not fleeting
            await asyncio.sleep(pause_s * dice.uniform(0.5, 1))
            pause_s = min(2 * pause_s, PAUSE_S[1])


async def race(plan: dict[str, Any]) -> None:
    """Run the groups in their order, some at one time."""
    room = asyncio.Semaphore(plan["at_once"])

    async def run(calls: list[dict[str, Any]]) -> None:
        async with room:
            await Group(plan, calls).run()

    await asyncio.gather(*(run(calls) for calls in plan["groups"]))


if __name__ == "__main__":
    asyncio.run(race(json.load(sys.stdin)))
