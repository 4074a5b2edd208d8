"""API keys and their limits."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from d2l.errors import UserError
from serve.catalogue.keys import AddKeyConfig, Keys, add_key
from serve.catalogue.limits import Limiter, Limits, TokenBucket


def test_a_key_is_found_by_its_secret_and_kept_as_a_digest(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    limits = Limits(requests_per_minute=60, documents=3)
    acme = add_key(AddKeyConfig(file=str(file), tenant="acme", limits=limits))
    rival = add_key(AddKeyConfig(file=str(file), tenant="rival"))
    keys = Keys.read(file)
    assert acme["key"] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert keys.find(acme["key"]).tenant == "acme"  # type: ignore[union-attr]
    assert keys.find(acme["key"]).limits == limits  # type: ignore[union-attr]
    assert keys.find(rival["key"]).tenant == "rival"  # type: ignore[union-attr]
    for wrong in ("", acme["key"][:-1], acme["key"] + "x", keys.by_id[acme["id"]].sha256, "\udcff"):
        assert keys.find(wrong) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "JSON object"),
        ("{}", "keys add"),
        ('{"keys": [{"id": "a", "tenant": "acme"}]}', "missing field"),
        ('{"keys": [{"id": "a", "tenant": "acme", "sha256": "secret"}]}', "64 hex digits"),
        (json.dumps({"keys": [{"id": "a", "tenant": "A B", "sha256": "0" * 64}]}), "tenant"),
        (json.dumps({"keys": [{"id": "a", "tenant": "acme", "sha256": "0" * 64}] * 2}), "same id"),
        (json.dumps({"keys": [{"id": "a", "tenant": "t", "sha256": "0" * 64, "limits": {"x": 1}}]}), "unknown field"),
        (
            json.dumps({"keys": [{"id": "a", "tenant": "t", "sha256": "0" * 64, "limits": {"documents": -1}}]}),
            "documents",
        ),
    ],
)
def test_files_that_are_none_of_keys(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Keys.read(tmp_path / "keys.json")


def test_a_key_needs_a_tenant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tenant"):
        add_key(AddKeyConfig(file=str(tmp_path / "keys.json"), tenant="../acme"))
    assert not list(tmp_path.iterdir())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_refills_and_may_be_overdrawn() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    assert bucket.wait_s() == 0
    bucket.take(60)
    assert bucket.wait_s() == pytest.approx(1)
    clock.now = 2
    assert bucket.wait_s() == 0
    bucket.take(12)
    assert bucket.wait_s() == pytest.approx(11)
    clock.now = 1000
    bucket.take(60)
    assert bucket.wait_s() == pytest.approx(1)


def test_requests_and_tokens_are_counted_apart() -> None:
    clock = Clock()
    limiter = Limiter(Limits(requests_per_minute=2, tokens_per_minute=600), clock)
    assert limiter.admit() == (0, "")
    limiter.charge(700)
    wait, what = limiter.admit()
    assert (round(wait), what) == (10, "tokens")
    clock.now = 11
    assert limiter.admit() == (0, "")
    assert limiter.admit()[1] == "requests"
    assert Limiter(Limits(), clock).admit() == (0, "")


def test_a_key_that_cannot_be_kept_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/keys\.json: cannot be written \(No such file or directory\)"):
        add_key(AddKeyConfig(file=str(tmp_path / "nowhere/keys.json"), tenant="acme"))


def test_of_keys_that_are_added_at_a_time_none_is_lost(tmp_path: Path) -> None:
    config = AddKeyConfig(file=str(tmp_path / "keys.json"), tenant="acme")
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda _: add_key(config), range(16)))
    assert set(Keys.read(config.file).by_id) == {key["id"] for key in added}
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]
