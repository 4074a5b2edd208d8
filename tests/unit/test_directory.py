"""A gateway that does not hear of news any more is replaced."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.catalogue.deployment import Start
from serve.catalogue.feed import Update
from serve.gateway.deployment import Gateway
from serve.gateway.directory import Directory


class Deployment:
    """A catalogue deployment without news; its calls raise what they are told to."""

    error: BaseException | None = None

    def __init__(self) -> None:
        self.subscribe = SimpleNamespace(remote=self._subscribe)
        self.poll = SimpleNamespace(remote=self._poll)

    async def _subscribe(self, gateway: str) -> Start:
        return Start(0, None, ())

    async def _poll(self, gateway: str, seen: int) -> Update:
        await asyncio.sleep(0.001)
        if self.error:
            raise self.error
        return Update((), seen)


@pytest.mark.parametrize(("error", "healthy"), [(OSError("away"), True), (asyncio.CancelledError(), False)])
def test_a_gateway_is_healthy_while_it_follows_the_catalogue(tmp_path: Path, error: Any, healthy: bool) -> None:
    async def main() -> None:
        deployment = Deployment()
        directory = await Directory.open(str(tmp_path), deployment)  # type: ignore[arg-type]
        gateway = SimpleNamespace(_backend=SimpleNamespace(directory=directory))
        Gateway.func_or_class.check_health(gateway)
        deployment.error = error
        await asyncio.sleep(0.1)
        assert directory.following == healthy
        if not healthy:
            with pytest.raises(RuntimeError, match="not followed"):
                Gateway.func_or_class.check_health(gateway)

    asyncio.run(main())
