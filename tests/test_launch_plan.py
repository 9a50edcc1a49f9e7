"""Plans of `manta serve`: the command line over serve_config.yaml, and mistakes in that file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from serve_app.launch_plan import make_plan
from serve_app.serve_config import IMPORT_PATH, POLICY, read_serve_config
from serve_app.serve_schema import to_schema
from tests.command_line import DEMO, ROOT, manta

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_engine_config_loads_and_explains_itself(path: Path) -> None:
    EngineConfig.from_yaml(path)
    lines = [line for line in path.read_text().splitlines() if ":" in line.partition("#")[0]]
    assert len(lines) == len(yaml.safe_load(path.read_text()))
    assert all("  # " in line for line in lines)


def test_without_a_model_the_plan_is_serve_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # from anywhere: the repository's own
    plan = make_plan()
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    assert plan.engine.model == str(DEMO)
    assert (plan.host, plan.port) == ("127.0.0.1", 8000)
    assert plan.model_name == config["applications"][0]["args"]["model_name"]
    assert plan.serve_config["logging_config"] == config["logging_config"]
    assert plan.engine.max_num_seqs == 64


def test_options_win_over_files(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("model: elsewhere\nmax_num_seqs: 7\nsession_len: 99\n")
    plan = make_plan(
        model=str(checkpoint),
        engine_config=file,
        host="0.0.0.0",
        port=0,
        num_replicas=3,
        log_level="debug",
        session_len=128,
        tp=2,
        dtype=None,
    )
    assert plan.engine.model == str(checkpoint)
    assert (plan.engine.max_num_seqs, plan.engine.session_len, plan.engine.tp) == (7, 128, 2)
    assert plan.model_name == "some-model-awq"
    assert plan.port > 0
    assert plan.num_ranks == 6
    config = plan.serve_config
    assert config["http_options"] == {"host": "0.0.0.0", "port": plan.port}
    assert config["logging_config"] == {"log_level": "DEBUG", "enable_access_log": True}
    assert config["applications"][0]["deployments"] == [{"name": "LLMReplica", "num_replicas": 3}]
    assert config["applications"][0]["args"]["engine"] == plan.engine.to_dict()


def test_a_given_model_does_not_get_the_demo_s_numbers(checkpoint: Path) -> None:
    plan = make_plan(model=str(checkpoint))
    assert plan.engine == EngineConfig(model=str(checkpoint))


def _write_config(path: Path, config: object) -> None:
    (path / "serve_config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The content of a serve_config.yaml that works, in the working directory."""
    monkeypatch.chdir(tmp_path)
    engine = {"model": checkpoint.name, "tp": 2}
    app = {"name": "x", "import_path": IMPORT_PATH, "args": {"engine": engine}}
    return {"http_options": {"port": 8123}, "applications": [app]}


def test_the_serve_config_of_the_working_directory_wins(
    config: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    _write_config(tmp_path, config)
    assert read_serve_config()[0] == tmp_path / "serve_config.yaml"
    plan = make_plan()
    assert (plan.engine.model, plan.engine.tp, plan.port) == (str(checkpoint), 2, 8123)
    assert plan.model_name == "some-model-awq"  # as build_app calls it without a model_name
    config["applications"][0]["args"]["engine"] = {"model": "gone"}
    _write_config(tmp_path, config)
    with pytest.raises(CheckpointError, match="no such directory"):
        make_plan()


def test_a_foreign_serve_config_is_passed_over_aloud(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config["applications"][0]["import_path"] = "shop.app:build"
    _write_config(tmp_path, config)
    assert make_plan().engine.model == str(DEMO)
    note = capsys.readouterr().err
    assert f"{tmp_path / 'serve_config.yaml'} deploys shop.app:build and is not used" in note


def test_sections_of_serve_config_may_be_empty(config: dict[str, Any], tmp_path: Path) -> None:
    config |= {"http_options": None, "logging_config": None}
    app = config["applications"][0]
    app["deployments"] = None
    del app["name"]
    _write_config(tmp_path, config)
    plan = make_plan(log_level="info")
    assert (plan.app_name, plan.host, plan.port) == ("default", "127.0.0.1", 8000)
    assert to_schema(plan.serve_config).applications[0].name == "default"
    app["deployments"] = [{"name": "LLMReplica", "num_replicas": "auto"}]
    _write_config(tmp_path, config)
    plan = make_plan()
    assert plan.num_replicas == 1  # as many as start; Serve's bound is its own
    assert to_schema(plan.serve_config).applications[0].deployments[0].num_replicas == "auto"


def _at(*path: str | int, **values: object) -> Callable[[dict[str, Any]], object]:
    """An edit of a config: these values at that place."""

    def edit(config: Any) -> object:
        for key in path:
            config = config[key]
        return config.update(values)

    return edit


APP = ("applications", 0)


def _replica(**values: object) -> Callable[[dict[str, Any]], object]:
    return _at(*APP, deployments=[{"name": "LLMReplica", **values}])


def _policy(**values: object) -> Callable[[dict[str, Any]], object]:
    return _replica(autoscaling_config={"max_replicas": 2, "policy": values})


def _ours(**settings: object) -> Callable[[dict[str, Any]], object]:
    return _policy(policy_function=POLICY, policy_kwargs=settings)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_at(applications=None), "`applications` must be a list of one mapping, got None"),
        (_at(applications=["foo"]), "`applications` must be a list of one mapping, got ['foo']"),
        (_at(applications=[{}, {"import_path": IMPORT_PATH}]), "deployed with `serve run`"),
        (_at(http_options=[1]), "`http_options` must be a mapping, got [1]"),
        (_at("http_options", port="a"), "port must be between 0 and 65535, got 'a'"),
        (_at("http_options", port=70000), "port must be between 0 and 65535, got 70000"),
        (_at("http_options", host=1), "http_options.host must be an address, got 1"),
        (_at(*APP, args=None), "args.engine must be the path"),
        (_at(*APP, args={"engine": 3}), "args.engine must be the path"),
        (_at(*APP, args=[1]), "`args` must be a mapping, got [1]"),
        (_at(*APP, "args", model_nam="x"), "args.model_nam is no key of it; did you mean 'model_n"),
        (_at(*APP, "args", max_body_bytes="x"), "args.max_body_bytes: Input should be a valid int"),
        (_at(*APP, "args", "engine", max_num_seq=1), "did you mean 'max_num_seqs'?"),
        (_at(*APP, deployments={"a": 1}), "`deployments` must be a list"),
        (_at(*APP, deployments=["LLMReplic"]), "did you mean 'LLMReplica'?"),
        (_at(*APP, deployments=[{"name": "other"}]), "no deployment 'other'"),
        (_at(http_option={}), "unknown key http_option; did you mean 'http_options'?"),
        (_at("http_options", prt=1), "unknown key http_options.prt; did you mean 'port'?"),
        (_at(logging_config={"level": 1}), "unknown key logging_config.level; did you mean"),
        (_at(logging_config={"log_level": "LOUD"}), 'Got "LOUD" for log_level'),
        (_at(proxy_location="Nowhere"), "proxy_location: Input should be 'Disabled', 'HeadOnly'"),
        (_at(*APP, route_prefx="/"), "applications.0.route_prefx; did you mean 'route_prefix'?"),
        (_replica(num_replica=2), "LLMReplica.num_replica; did you mean 'num_replicas'?"),
        (_replica(num_replicas="three"), 'must be an int or "auto", but got: three'),
        (_replica(num_replicas=0), "Input should be greater than 0, got 0"),
        (_replica(ray_actor_options={"num_cpu": 1}), "did you mean 'num_cpus'?"),
        (_replica(autoscaling_config={"min_replica": 1}), "did you mean 'min_replicas'?"),
        (_replica(autoscaling_config={"min_replicas": 2}), "max_replicas (1) must be greater"),
        (_policy(policy_functio=POLICY), "policy.policy_functio; did you mean 'policy_function'?"),
        (_policy(policy_function="serve_app.autoscaling:Queue"), "policy.policy_function: "),
        (_policy(policy_kwargs=1), "policy_kwargs: Input should be a valid dictionary, got 1"),
        (_ours(drain=1), "policy.policy_kwargs.drain; did you mean 'drain_s'?"),
        (_ours(drain_s=0), "policy_kwargs: drain_s must be a number of seconds above 0, got 0"),
        (_ours(utilization=True), "utilization must be a share above 0 and at most 1, got True"),
    ],
)
def test_a_mistake_in_serve_config_is_said_in_one_line(
    edit: Callable[[dict[str, Any]], object], reason: str, config: dict[str, Any], tmp_path: Path
) -> None:
    edit(config)
    _write_config(tmp_path, config)
    with pytest.raises(ConfigError) as raised:
        to_schema(make_plan().serve_config)
    assert reason in str(raised.value)
    assert "serve_config.yaml" in str(raised.value) or "args.engine" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [", "cannot read"),
        (b"a: b: c", "mapping values are not allowed here"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"", "must be a mapping with `applications`, got None"),
        (b"- 1", "must be a mapping with `applications`, got [1]"),
    ],
)
def test_a_serve_config_that_is_none_ends_the_command(
    content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "serve_config.yaml").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    code, text = manta("serve")
    assert code == 1
    assert text.startswith("manta: ")
    assert reason in text
    assert text.count("\n") == 1
