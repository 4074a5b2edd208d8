"""Options of the endpoint, and the Serve YAML."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from d2l.errors import UserError
from serve.app import ServeConfig, build, from_yaml

YAML = Path(__file__).parents[2] / "infra" / "serve.yaml"


def test_the_serve_yaml_is_one_and_makes_the_application() -> None:
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(YAML.read_text())).applications
    module, function = application.import_path.split(":")
    assert (module, function) == (from_yaml.__module__, from_yaml.__name__)
    from_yaml(application.args)


def test_each_part_is_scaled_on_its_own() -> None:
    config = ServeConfig("store", replicas=2, max_replicas=8, gateways=3, internalizers=1, max_internalizers=4)
    gateway = build(config)._bound_deployment
    parts = [gateway, *(part._bound_deployment for part in gateway.init_args if isinstance(part, serve.Application))]
    scaling = {part.name: part._deployment_config.autoscaling_config for part in parts}
    limits = {
        name: (own.min_replicas, own.max_replicas, own.target_ongoing_requests) for name, own in scaling.items() if own
    }
    assert limits == {"Engine": (2, 8, config.max_batch_size), "Internalizer": (1, 4, 2)}
    assert gateway.num_replicas == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alias": "a b"}, "alias"),
        ({"replicas": 0}, "replicas"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"internalizers": 3, "max_internalizers": 2}, "max_internalizers"),
        ({"cpus_per_internalizer": -1}, "cpus_per_internalizer"),
        ({"min_similarity": 35}, "min_similarity"),
        ({"stores": "x"}, "unknown field"),
    ],
)
def test_wrong_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_yaml({"store": "store"} | fields)
    assert ServeConfig("store").url == "http://127.0.0.1:8000/v1"
