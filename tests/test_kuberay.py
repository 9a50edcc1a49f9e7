"""The RayService manifest: its shape, its Serve config, and an environment that is ours."""

import os
import subprocess
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from engine.config import EngineConfig
from serve_app import launch_env
from serve_app.app_args import AppArgs
from serve_app.cli import app
from serve_app.serve_schema import to_schema
from tests.kuberay_schema import RAY_SERVICE

MANIFEST = Path(__file__).parents[1] / "configs" / "kuberay" / "rayservice.yaml"
CRD = "KUBERAY_CRD"  # the path of a release's ray.io_rayservices.yaml
GPU = "nvidia.com/gpu"


@pytest.fixture
def manifest() -> dict[str, Any]:
    values = yaml.safe_load(MANIFEST.read_text())
    assert isinstance(values, dict)
    return values


def serve_config(manifest: dict[str, Any]) -> dict[str, Any]:
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert isinstance(config, dict)
    return config


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown fields, which Kubernetes drops without a word."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: strict(part) for key, part in schema.items()}
    if "properties" in kept and not kept.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", False)
    return kept


def test_its_shape(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, RAY_SERVICE)
    wrong = deepcopy(manifest)
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(wrong, RAY_SERVICE)


@pytest.mark.skipif(CRD not in os.environ, reason=f"{CRD} names no definition of KubeRay's")
def test_its_shape_by_kuberays_own_definition(manifest: dict[str, Any]) -> None:
    definition = yaml.load(Path(os.environ[CRD]).read_text(), yaml.CSafeLoader)
    (schema,) = [
        each["schema"]["openAPIV3Schema"]
        for each in definition["spec"]["versions"]
        if each["name"] == "v1"
    ]
    schema["properties"]["metadata"]["properties"] = {"name": {"type": "string"}}
    jsonschema.validate(manifest, strict(schema))


def test_its_serve_config_is_one_that_serve_and_manta_take(manifest: dict[str, Any]) -> None:
    config = serve_config(manifest)
    schema = to_schema(config)
    assert schema.applications[0].import_path == "serve_app.app:build_app"
    args = AppArgs.model_validate(config["applications"][0]["args"])
    assert isinstance(args.engine, dict)
    engine = EngineConfig.from_dict(args.engine)
    assert engine.model.startswith("/models/")
    assert all(
        mount["mountPath"] == "/models"
        for pod in pods(manifest)
        for mount in pod["containers"][0]["volumeMounts"]
        if mount["name"] == "models"
    )


def test_every_pod_has_our_environment(manifest: dict[str, Any]) -> None:
    """KubeRay itself sets the token's variables; where the image has HAProxy is its affair."""
    paths = {"RAY_SERVE_HAPROXY_BINARY_PATH", "MANTA_HAPROXY"}
    expected = launch_env.node_environment() | {"RAY_SERVE_LOG_TO_STDERR": "1"}
    for pod in pods(manifest):
        given = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert given.keys() | {"RAY_AUTH_MODE"} == expected.keys() | paths
        assert all(given[name] == expected[name] for name in given.keys() - paths)


def test_manta_env_is_for_a_shell() -> None:
    text = CliRunner().invoke(app, ["env"]).output
    shell = subprocess.run(
        ["sh", "-c", f"{text}\nenv"], env={}, check=True, capture_output=True, text=True
    )
    assert set(shell.stdout.splitlines()) >= {
        f"{name}={value}" for name, value in launch_env.node_environment().items()
    }


def test_its_numbers_agree(manifest: dict[str, Any]) -> None:
    cluster = manifest["spec"]["rayClusterConfig"]
    (application,) = serve_config(manifest)["applications"]
    (deployment,) = application["deployments"]
    (workers,) = cluster["workerGroupSpecs"]
    scaling = deployment["autoscaling_config"]
    engine = EngineConfig.from_dict(application["args"]["engine"])
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"][GPU])
    assert cluster["rayVersion"] == version("ray")
    assert scaling["max_replicas"] == workers["maxReplicas"] * gpus // engine.num_ranks
    assert scaling["min_replicas"] == workers["minReplicas"] == workers["replicas"]
    patience = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert deployment["graceful_shutdown_timeout_s"] < patience
