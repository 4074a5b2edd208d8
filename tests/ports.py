"""Ports of this machine that nobody listens at, nor is given by the system to who asks for any."""

import random
import socket
from contextlib import ExitStack, suppress

_BELOW_EPHEMERAL = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """So many, all different."""
    ports: list[int] = []
    with ExitStack() as stack:
        for port in random.sample(_BELOW_EPHEMERAL, 1000):
            if len(ports) == count:
                break
            with suppress(OSError):  # somebody listens there
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
    assert len(ports) == count
    return ports
