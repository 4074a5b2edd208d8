"""How long a gateway waits for the other deployments, and what becomes of their calls."""

import asyncio

import pytest

from d2l.errors import UserError
from serve.errors import ApiError, error_response
from serve.gateway.backend import Backend


class Call:
    """What a handle gives for a request; only its end matters here."""

    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def backend(timeout_s: float) -> Backend:
    return Backend(*[None] * 6, "tiny", timeout_s)  # type: ignore[arg-type]


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
