"""The `manta` command without a server: help, refusals, plans, chat, check_env."""

import io
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from engine.chat_template import Message
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, InvalidRequestError
from engine.sampling_params import SamplingParams
from serve_app import check_env, launch_env
from serve_app.chat import chat
from serve_app.cli import app
from serve_app.launch_plan import find_serve_config, make_plan
from serve_app.ports import check_port, free_ports, listener
from serve_app.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo-awq"
MANTA = Path(sys.executable).with_name("manta")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory that looks like a checkpoint as far as a plan looks."""
    path = tmp_path / "some-model-awq"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def manta(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, args, terminal_width=200)
    return result.exit_code, result.output


# -- help and refusals --------------------------------------------------------------------------


def test_help_names_every_command_and_option() -> None:
    assert all(name in manta("--help")[1] for name in ("serve", "chat", "check_env", "--version"))
    code, text = manta("serve", "--help")
    assert code == 0
    options = (
        "--config --host --port --model-name --tp --num-replicas --device --dtype --session-len "
        "--max-num-seqs --cache-max-entry-count --dashboard --log-level"
    )
    assert all(option in text for option in options.split())


def test_version() -> None:
    code, text = manta("--version")
    assert code == 0
    assert text.startswith("manta 0.")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["serve", "--port", "70000"], "--port"),
        (["serve", "--dtype", "int8"], "bfloat16"),
        (["serve", "--nonsense"], "--nonsense"),
        (["sreve"], "sreve"),
    ],
)
def test_wrong_usage_exits_with_2(args: list[str], reason: str) -> None:
    code, text = manta(*args)
    assert code == 2
    assert reason in text


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path, checkpoint: Path) -> None:
    wrong_key = tmp_path / "engine.yaml"
    wrong_key.write_text(f"model: {checkpoint}\nmax_num_seq: 8\n")
    for args, reason in [
        (["no/such/model"], "there is no such directory"),
        ([str(tmp_path)], "it has no config.json"),
        (["--config", str(wrong_key)], "did you mean 'max_num_seqs'?"),
        (["--config", str(tmp_path / "none.yaml")], "cannot read engine config"),
        ([str(checkpoint), "--tp", "0"], "tp must be at least 1"),
        ([str(checkpoint), "--cache-max-entry-count", "much"], "a share such as 0.8"),
    ]:
        code, text = manta("serve", *args)
        assert code == 1
        assert text.startswith("manta: ")
        assert reason in text
        assert text.count("\n") == 1


def test_a_port_in_use_names_its_holder() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=r"\(pid \d+\) listens there; choose another"):
            check_port("127.0.0.1", port)
        assert listener(port) is not None
    check_port("127.0.0.1", port)
    assert listener(port) is None
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.99"):
        check_port("192.0.2.99", port)


def test_commands_load_neither_torch_nor_ray() -> None:
    code = (
        "import sys; import serve_app.cli; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- plans --------------------------------------------------------------------------------------


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


def test_the_serve_config_of_the_working_directory_wins(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = {"name": "x", "import_path": "serve_app.app:build_app", "args": {}}
    app["args"] = {"engine": {"model": checkpoint.name, "tp": 2}}
    config = {"http_options": {"port": 8123}, "applications": [app]}
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    assert find_serve_config() == tmp_path / "serve_config.yaml"
    plan = make_plan()
    assert (plan.engine.model, plan.engine.tp, plan.port) == (str(checkpoint), 2, 8123)
    config["applications"] = [app, app]
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="exactly one application"):
        make_plan()
    app["args"] = {"engine": {"model": "gone"}}
    config["applications"] = [app]
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match="no such directory"):
        make_plan()


# -- the environment ----------------------------------------------------------------------------


def test_the_user_s_variables_win() -> None:
    environ = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_AUTH_MODE": "disabled"}
    launch_env.set_local_defaults(environ, verbose=False)
    assert environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert environ["RAY_AUTH_MODE"] == "disabled"
    assert environ["RAY_SERVE_LOG_TO_STDERR"] == "0"
    ports = [environ[name] for name in launch_env.SIDE_PORTS]
    assert len(set(ports)) == len(ports)


def test_joining_leaves_serve_s_flags_to_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environ: dict[str, str] = {}
    launch_env.set_joining_defaults(environ, verbose=True)
    assert environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environ
    environ = {"RAY_AUTH_TOKEN": "secret"}
    launch_env.set_joining_defaults(environ, verbose=True)
    assert environ["RAY_AUTH_MODE"] == "token"


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_check_env_knows_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_env.report()
    assert "torch" in capsys.readouterr().out
    lines = ["no-such-package>=1", "numpy>=99", 'only-elsewhere; platform_system == "Plan9"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert not check_env.report()
    out = capsys.readouterr().out
    assert 'pip install "no-such-package>=1"' in out
    assert 'pip install "numpy>=99"' in out
    assert "only-elsewhere" not in out


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("waiting") as progress:
        progress.say("still waiting")
    assert capsys.readouterr().err == ""


def test_progress_draws_and_clears_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("serve_app.progress.INTERVAL_S", 0.001)
    with Progress("waiting"):
        while "waiting (0 s)" not in terminal.getvalue():
            pass
    assert terminal.getvalue().endswith("\r\x1b[K")


# -- chat ---------------------------------------------------------------------------------------


class Parrot:
    """Repeats how many messages there are and the last one; refuses 'long'."""

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        content = str(messages[-1]["content"])
        if content == "long":
            raise InvalidRequestError("the prompt is too long", "prompt")
        yield f"{len(messages)} "
        yield content


def test_chat_over_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["one", "", "two", "long", "/nonsense", "three", "/clear", "four", "/exit", "five"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    chat(Parrot(), SamplingParams(), system="be brief")
    out, err = capsys.readouterr()
    assert out.splitlines() == ["2 one", "4 two", "6 three", "2 four"]
    assert "too long" in err
    assert "'/nonsense' is no command" in err


@pytest.mark.slow
def test_manta_chat_remembers() -> None:
    talk = "My name is Ada.\nWhat is my name?\n"
    done = subprocess.run(
        [MANTA, "chat", str(DEMO), "--temperature", "0"],
        input=talk,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answers = done.stdout.splitlines()
    assert len(answers) == 2
    assert "Ada" in answers[1]
