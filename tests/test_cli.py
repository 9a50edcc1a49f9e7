"""The `manta` command without a server: help, refusals, plans, chat, check_env."""

import io
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from engine.chat_template import Message
from engine.errors import ConfigError, InvalidRequestError
from engine.sampling_params import SamplingParams
from serve_app.chat import chat
from serve_app.ports import check_port, listener
from tests.command_line import DEMO, manta

MANTA = Path(sys.executable).with_name("manta")


# -- help and refusals --------------------------------------------------------------------------


def test_help_names_every_command_and_option() -> None:
    assert all(
        name in manta("--help")[1]
        for name in ("serve", "chat", "plan", "env", "check_env", "--version")
    )
    code, text = manta("serve", "--help")
    assert code == 0
    options = (
        "--config --host --port --model-name --tp --pp --placement --num-replicas --min-replicas "
        "--max-replicas --device --dtype --session-len --max-num-seqs --cache-max-entry-count "
        "--dashboard --log-level"
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
