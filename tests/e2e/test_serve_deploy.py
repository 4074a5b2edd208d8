"""`serve deploy infra/serve.yaml` on a Ray cluster of its own: changes without a restart, engines that come and go."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from d2l.base_model import BaseModel
from tests.conftest import tiny_hypernetwork
from tests.ports import free_ports

YAML = Path(__file__).parents[2] / "infra" / "serve.yaml"
TEXT = "The magic number of the blue harbour is 4821."
BIN = Path(sys.executable).parent

ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled"}  # where this machine has a token, Ray would ask for it

pytestmark = pytest.mark.slow


@dataclass
class Cluster:
    """A head node, and what is deployed on it."""

    dashboard: str
    metrics: str
    config: dict[str, Any]
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config['http_options']['port']}/v1"

    def deploy(self, *deployments: dict[str, Any]) -> None:
        """Deploy the application, with changes to some of its deployments."""
        (application,) = self.config["applications"]
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(self.config | {"applications": [application | {"deployments": deployments}]}))
        command = [BIN / "serve", "deploy", "--address", self.dashboard, file]
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
        self.wait(lambda: self.status()["status"] == "RUNNING")

    def status(self) -> dict[str, Any]:
        return requests.get(f"{self.dashboard}/api/serve/applications/", timeout=30).json()["applications"]["d2l"]

    def running(self, deployment: str) -> set[str]:
        """Its replicas that answer."""
        replicas = self.status()["deployments"][deployment]["replicas"]
        return {replica["replica_id"] for replica in replicas if replica["state"] == "RUNNING"}

    def wait(self, done: Callable[[], bool], seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, self.status()
            time.sleep(0.5)

    def adapter_bytes(self) -> float:
        """Adapters that engines have in memory."""
        families = text_string_to_metric_families(requests.get(self.metrics, timeout=30).text)
        found = [family.samples for family in families if family.name == "ray_d2l_adapter_bytes"]
        return sum(sample.value for samples in found for sample in samples)

    def upload(self) -> dict[str, Any]:
        """The document as it is then."""
        response = requests.post(f"{self.url}/documents", json={"id": "harbour", "text": TEXT}, timeout=60)
        assert response.status_code == 201, response.text
        return response.json()


@pytest.fixture(scope="module")
def cluster(tiny_llama: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("deploy")
    for name, seed in (("old", 0), ("new", 1)):
        tiny_hypernetwork(tiny_llama, seed=seed).save_pretrained(folder / name)
    gcs, dashboard, http, metrics = free_ports(4)
    config = yaml.safe_load(YAML.read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": http}
    (application,) = config["applications"]
    application["args"] |= {
        "store": str(folder / "store"),
        "base": tiny_llama.name,
        "alias": "tiny",
        "hypernetwork": str(folder / "old"),
        "keys": None,
        "embedding": "none",
        "gpus_per_replica": 0,
        "gpus_per_internalizer": 0,
        "max_replicas": 2,
        "max_batch_size": 2,
    }
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"]
    command += [
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--metrics-export-port={metrics}",
        "--object-store-memory=200000000",
    ]
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True)
    try:
        running = Cluster(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", config, folder)
        until = time.monotonic() + 120
        while not _up(running.dashboard):
            assert head.poll() is None, (folder / "ray.log").read_text()
            assert time.monotonic() < until, (folder / "ray.log").read_text()
            time.sleep(0.5)
        running.deploy()
        yield running
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)


def _up(dashboard: str) -> bool:
    with suppress(requests.ConnectionError):
        return requests.get(f"{dashboard}/api/version", timeout=30).ok
    return False


def test_uploads_move_to_another_hypernetwork_without_a_restart(cluster: Cluster):
    before, replicas = cluster.upload(), cluster.running("Internalizer")
    assert cluster.upload()["hypernetwork"] == before["hypernetwork"]
    cluster.deploy({"name": "Internalizer", "user_config": {"hypernetwork": str(cluster.folder / "new")}})
    cluster.wait(lambda: cluster.upload()["hypernetwork"] != before["hypernetwork"])
    assert cluster.running("Internalizer") == replicas


def test_engines_give_adapters_less_memory_without_a_restart(cluster: Cluster):
    cluster.upload()
    client = OpenAI(base_url=cluster.url, api_key="none", max_retries=0, timeout=60)
    client.chat.completions.create(model="tiny:harbour", messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
    cluster.wait(lambda: cluster.adapter_bytes() > 0)
    replicas = cluster.running("Engine")
    cluster.deploy({"name": "Engine", "user_config": {"adapter_cache_bytes": 1}})
    cluster.wait(lambda: cluster.adapter_bytes() == 0)
    assert cluster.running("Engine") == replicas


def test_engines_come_with_the_load_and_go_with_it(cluster: Cluster):
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
    }
    cluster.deploy({"name": "Engine", "num_replicas": "auto", "autoscaling_config": scaling})
    cluster.wait(lambda: len(cluster.running("Engine")) == 1)
    cluster.upload()
    client = OpenAI(base_url=cluster.url, api_key="none", max_retries=0, timeout=60)
    loaded = True

    def ask(number: int) -> int:
        """One client, that asks without pause; how many answers it has."""
        answers = 0
        while loaded:
            model = "tiny:harbour" if number % 2 else "tiny"
            messages: Any = [{"role": "user", "content": f"What is number {number}?"}]
            answer = client.chat.completions.create(model=model, messages=messages, max_tokens=100)
            assert answer.choices[0].finish_reason in ("stop", "length")
            answers += 1
        return answers

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask, number) for number in range(8)]
        try:
            cluster.wait(lambda: len(cluster.running("Engine")) == 2)
            time.sleep(3)
        finally:
            loaded = False
    assert all(client.result() for client in clients)
    cluster.wait(lambda: len(cluster.running("Engine")) == 1)
    assert client.chat.completions.create(model="tiny:harbour", messages=[{"role": "user", "content": "?"}])
