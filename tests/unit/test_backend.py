"""How long a gateway waits for the other deployments, and what becomes of their calls."""

import asyncio
import dataclasses
import math
from pathlib import Path

import httpx
import pytest
from ray.serve.exceptions import BackPressureError

from d2l.catalogue import Catalogue
from d2l.errors import UserError
from serve.errors import ApiError, error_response
from serve.gateway.backend import Backend
from serve.gateway.deployment import build_app
from serve.gateway.directory import Directory


class Call:
    """What a handle gives for a request; only its end matters here."""

    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def backend(timeout_s: float) -> Backend:
    return Backend(*[None] * 5, "tiny", 0.3, timeout_s)  # type: ignore[arg-type]


async def wait(call: Call, timeout_s: float = 60.0, error: Exception | None = None) -> None:
    async with backend(timeout_s).deadline(call):  # type: ignore[arg-type]
        if error:
            raise error
        await asyncio.sleep(60)


def test_nobody_waits_for_ever() -> None:
    call = Call()
    with pytest.raises(ApiError, match=r"No complete answer within 0\.05 s") as error:
        asyncio.run(wait(call, 0.05))
    assert (error.value.status, error.value.code) == (504, "timeout")
    assert call.cancelled
    response = error_response(error.value)
    assert response.headers["x-should-retry"] == "false"


def test_a_call_ends_with_who_waits_for_it() -> None:
    call = Call()

    async def leave() -> None:
        waiting = asyncio.create_task(wait(call))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(leave())
    assert call.cancelled


def test_errors_are_those_of_the_interface() -> None:
    call = Call()
    with pytest.raises(ApiError, match="what was wrong") as error:
        asyncio.run(wait(call, error=UserError("what was wrong")))
    assert error.value.status == 400
    assert call.cancelled


class Full:
    """Engines whose queue is full: of two requests."""

    complete: "Full"

    async def remote(self, request: object) -> None:
        raise BackPressureError(2, 2, 429, 1)


@pytest.mark.parametrize(("answers", "status"), [(2, 429), (3, 400)])
def test_more_answers_than_ever_find_room_at_once_are_the_client_s_mistake(
    tmp_path: Path, answers: int, status: int
) -> None:
    directory, engine = Directory(Catalogue(tmp_path), None), Full()  # type: ignore[arg-type]
    directory._lease, engine.complete = math.inf, engine
    app = build_app(dataclasses.replace(backend(60), directory=directory, engine=engine))  # type: ignore[arg-type]

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return await client.post("/v1/completions", json={"model": "tiny", "prompt": ["One"] * answers})

    response = asyncio.run(ask())
    assert response.status_code == status
    assert ("2 at most on this server, not 3" in response.json()["error"]["message"]) == (status == 400)
