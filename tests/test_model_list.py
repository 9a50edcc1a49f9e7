"""`models` in serve_config.yaml: what is planned of it, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.errors import ConfigError
from serve_app.app_args import deployment_names
from serve_app.launch_plan import LaunchPlan, make_plan
from serve_app.serve_schema import to_schema

ENGINE = {"model": "some-model", "device": "cpu"}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "some-model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return path


def planned(args: dict[str, Any], *deployments: dict[str, Any], **options: Any) -> LaunchPlan:
    app = {"import_path": "serve_app.app:build_app", "args": args, "deployments": [*deployments]}
    Path("serve_config.yaml").write_text(yaml.dump({"applications": [app]}))
    return make_plan(**options)


def two(**second: Any) -> dict[str, Any]:
    first = {"engine": ENGINE, "model_name": "a"}
    return {"models": [first, {"engine": ENGINE, "model_name": "org/b", **second}]}


def test_each_model_has_a_deployment_and_its_ranks_count(checkpoint: Path) -> None:
    args = two(engine={**ENGINE, "tp": 2}, cpus_per_rank=1)
    replicas = {"name": "org-b", "num_replicas": 3}
    plan = planned(args, {"name": "LLMReplica", "num_replicas": 2}, replicas, port=0)
    assert [(m.name, m.num_replicas, m.num_ranks) for m in plan.models] == [
        ("a", 2, 2),
        ("org/b", 3, 6),
    ]
    assert (plan.model_name, plan.num_replicas, plan.num_ranks) == ("a,org/b", 5, 8)
    assert plan.models[1].args.cpus_per_rank == 1
    (app,) = to_schema(plan.serve_config).applications
    assert {each.name: each.num_replicas for each in app.deployments} == {
        "LLMReplica": 2,
        "org-b": 3,
    }
    assert [each["engine"]["model"] for each in app.args["models"]] == [str(checkpoint)] * 2


def test_a_given_model_takes_the_place_of_all(checkpoint: Path) -> None:
    plan = planned(two(), {"name": "org-b"}, model=str(checkpoint), tp=2)
    assert (plan.model_name, plan.engine.tp) == ("some-model", 2)
    to_schema(plan.serve_config)


@pytest.mark.parametrize(
    ("args", "options", "reason"),
    [
        ({}, {}, "args.engine must be the path of an engine config or a mapping, or models a list"),
        ({**two(), "engine": ENGINE}, {}, "args.models: engine belongs into an entry of that list"),
        (two(), {"model_name": "c"}, "args.models: model_name belongs into an entry"),
        (two(), {"tp": 2}, "has several models: give tp there"),
        (two(), {"num_replicas": 2}, "has several models: give num_replicas there"),
        (two(), {"max_replicas": 2}, "has several models: give max_replicas there"),
        (two(model_nam="c"), {}, "args.models.1.model_nam is no key of it; did you mean"),
        (two(engine=[]), {}, "args.models.1.engine must be the path of an engine config"),
        (two(model_name="a"), {}, "'a' needs a model_name that no other model has"),
        ({"models": {"a": 1}}, {}, "args.models: "),
    ],
)
def test_a_mistake_is_said_with_its_place(
    checkpoint: Path, args: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        planned(args, **options)
    assert reason in str(raised.value)


def test_deployments_are_those_of_the_models(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no deployment 'org-c'; did you mean 'org-b'"):
        planned(two(), {"name": "org-c"})
    with pytest.raises(ConfigError, match="needs a model_name that no other model has"):
        deployment_names(["x", "a b", "a/b"])
