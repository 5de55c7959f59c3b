"""Makes raw gRPC calls for the tests from inside a network namespace (see RpcTool in harness.py).

One JSON object a line on stdin: `id`, `target` (10.77.0.42:9092: the address that the call goes to
is also the one that it comes from), `method`, `request` (hex). One line a call on stdout, in the
order in which the calls end: `id` with `reply` (hex), or with `code`, `message` and `reason`.
"""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

CALLS_AT_ONCE = 48
CALL_TIMEOUT_S = 10


class Caller:
    """Channels by target, and the answers on stdout."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()

    def channel(self, target: str) -> grpc.Channel:
        """The one channel to a target."""
        with self._lock:
            if target not in self._channels:
                options = [("grpc.enable_http_proxy", 0)]
                self._channels[target] = grpc.insecure_channel(target, options=options)
            return self._channels[target]

    def call(self, order: dict[str, Any]) -> None:
        """Make one call and print how it ended."""
        answer: dict[str, Any] = {"id": order["id"]}
        method: Any = self.channel(order["target"]).unary_unary(
            f"/openinfra.v1.AgentApi/{order['method']}"
        )
        try:
            answer["reply"] = method(
                bytes.fromhex(order["request"]), timeout=CALL_TIMEOUT_S, wait_for_ready=True
            ).hex()
        except grpc.RpcError as error:
            call: Any = error
            trailing = dict(call.trailing_metadata() or ())
            answer["code"], answer["message"] = call.code().name, call.details()
            answer["reason"] = trailing.get("openinfra-reason", "")
        with self._lock:
            print(json.dumps(answer), flush=True)


def main() -> None:
    """Answer until stdin ends."""
    caller = Caller()
    with ThreadPoolExecutor(CALLS_AT_ONCE) as workers:
        for line in sys.stdin:
            workers.submit(caller.call, json.loads(line))


if __name__ == "__main__":
    main()
