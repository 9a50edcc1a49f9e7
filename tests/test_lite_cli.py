"""`manta lite …` in process: every command, what it prints, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.quantize.staging import Staging
from engine.weights.checkpoint import Checkpoint
from tests.command_line import manta
from tests.tiny_models import TinyModel, copy_model, write_servable_model

FAST = ("--w-group-size", "32")
CALIB = ("--calib-samples", "4", "--calib-seqlen", "32")
MEASURE = ("--samples", "4", "--seqlen", "32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path = tmp_path_factory.mktemp("lite") / "tiny"
    return write_servable_model("llama", path, hidden_size=64, intermediate_size=128)


def lite(*args: object) -> tuple[int, str]:
    return manta("lite", *map(str, args))


def quantization_config(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return values


def test_help_names_every_command_and_option() -> None:
    code, text = lite("--help")
    assert code == 0
    for command, options in {
        "auto_awq": "--work-dir --calib-data --calib-samples --calib-seqlen --w-bits "
        "--w-group-size --w-sym --search-scale --batch-size --device --dtype --format "
        "--num-workers --tp --restart --overwrite --seed --eval --skip",
        "auto_gptq": "--desc-act --damp --format --tp",
        "smooth_quant": "--quant-dtype --alpha --num-workers",
        "rtn": "--w-group-size --data --samples --seqlen --format",
        "prune": "--pattern --method --damp",
        "kv": "--quant-policy --data",
        "eval": "--reference --data --work-dir",
    }.items():
        assert command in text
        code, own = lite(command, "--help")
        assert code == 0
        assert all(option in own for option in options.split()), command


@pytest.mark.parametrize(
    ("args", "method", "bits"),
    [
        (("auto_awq", *FAST, *CALIB), "awq", 4),
        (("auto_awq", *FAST, *CALIB, "--no-search-scale", "--format", "gptq"), "gptq", 4),
        (("auto_gptq", *FAST, *CALIB, "--desc-act"), "gptq", 4),
        (("smooth_quant", *CALIB, "--quant-dtype", "fp8"), "compressed-tensors", 8),
        (
            ("rtn", *FAST, *MEASURE, "--w-sym", "--format", "compressed-tensors"),
            "compressed-tensors",
            4,
        ),
    ],
    ids=["awq", "awq as gptq", "gptq", "fp8", "rtn"],
)
def test_a_command_writes_a_checkpoint_and_its_report(
    args: tuple[str, ...], method: str, bits: int, model: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text = lite(args[0], model.path, "--work-dir", out, *args[1:])
    assert code == 0, text
    assert f"manta serve {out}" in text
    assert f"report: {out / 'report.html'}" in text
    config = quantization_config(out)
    assert config["quant_method"] == method
    if method == "compressed-tensors":
        assert config["config_groups"]["group_0"]["weights"]["num_bits"] == bits
    else:
        assert config["bits"] == bits
    report = json.loads((out / "report.json").read_text())
    (result,) = report["results"]
    assert result["evaluation"]["reference_perplexity"] > 1
    assert 0 <= result["evaluation"]["top1_agreement"] <= 1
    assert result["verdict"]["words"] in text.replace("\n", " ")
    assert report["model"] == str(out)
    assert report["peak_memory"] > 0
    assert len(report["linear_errors"]) == (0 if args[0] == "rtn" else 2)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_prune_keeps_two_of_four(method: str, model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = (*CALIB, "--method", method, "--no-eval")
    code, text = lite("prune", model.path, "--work-dir", out, *args)
    assert code == 0, text
    assert not (out / "report.json").exists()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with Checkpoint(out) as checkpoint:
        weight = checkpoint.read("model.layers.1.mlp.up_proj.weight")
    zeros = (weight.view(weight.shape[0], -1, 4) == 0).sum(-1)
    assert bool((zeros == 2).all())


def test_kv_and_eval_report_and_leave_the_model_alone(model: TinyModel, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in model.path.iterdir()}
    code, text = lite("kv", model.path, "--work-dir", tmp_path / "kv", *MEASURE)
    assert code == 0, text
    report = json.loads((tmp_path / "kv" / "report.json").read_text())
    assert [each["name"] for each in report["results"]] == ["quant_policy 8", "quant_policy 4"]
    eight, four = (each["evaluation"]["kl_mean"] for each in report["results"])
    assert 0 < eight < four
    args = ("--reference", model.path, "--work-dir", tmp_path / "eval", *MEASURE)
    code, text = lite("eval", model.path, *args)
    assert code == 0, text
    (result,) = json.loads((tmp_path / "eval" / "report.json").read_text())["results"]
    assert result["evaluation"]["kl_mean"] == 0
    assert lite("eval", model.path, *args)[0] == 1  # a report is there
    assert lite("eval", model.path, *args, "--overwrite")[0] == 0
    assert {file: file.stat().st_mtime_ns for file in model.path.iterdir()} == before


def test_text_of_one_s_own(model: TinyModel, tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": f"What is {n} + {n}?"}]} for n in range(99)]
    text = tmp_path / "own.jsonl"
    text.write_text("\n".join(map(json.dumps, lines)))
    args = ("--calib-data", text, "--work-dir", tmp_path / "out", *FAST, *CALIB)
    code, said = lite("auto_awq", model.path, *args)
    assert code == 0, said
    assert json.loads((tmp_path / "out/report.json").read_text())["text"]["source"] == str(text)


def test_what_cannot_be_is_said_in_one_line(model: TinyModel, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    silent = copy_model(model, tmp_path / "silent").path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (silent / name).unlink()
    out = ("--work-dir", tmp_path / "out")
    for args, reason in [
        (("auto_awq", model.path, "--w-bits", 8), "--w-bits 8 cannot be made"),
        (("auto_awq", model.path, *CALIB), "64 inputs are no multiple of group size 128"),
        (("auto_awq", model.path, "--w-group-size", 48), "--w-group-size must be one of 32, 64"),
        (("auto_awq", model.path, "--calib-seqlen", 512), "beyond the 128 positions"),
        (("auto_awq", model.path, "--calib-data", short), "tokens, and 256 are needed"),
        (("auto_awq", model.path, "--calib-data", tmp_path / "no.txt"), "cannot read the calib"),
        (("auto_awq", silent, *FAST, *CALIB), "has no tokenizer"),
        (("auto_awq", tmp_path / "nothing"), "is not a directory"),
        (("auto_awq", model.path, *FAST, *CALIB, "--tp", 2), "needs as many --num-workers"),
        (("auto_gptq", model.path, "--desc-act", "--format", "awq"), "cannot store the order"),
        (("auto_gptq", model.path, "--damp", 0), "--damp must be a share between 0 and 1"),
        (("prune", model.path, "--pattern", "4:2", *CALIB), "pattern 4:2 cannot be"),
        (("kv", model.path, "--quant-policy", "9", *MEASURE), "--quant-policy takes"),
        (("kv", model.path, "--quant-policy", "eight", *MEASURE), "or several of them by comma"),
        (("rtn", model.path, "--skip", "nonsense", "--no-eval", *FAST), "matches no linear"),
    ]:
        code, text = lite(*args, *out)
        assert code == 1, (args, text)
        assert text.startswith("manta: "), text
        assert reason in text, text
        assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_options_are_answered_without_torch() -> None:
    code = (
        "import sys; from serve_app.cli import app\n"
        "try: app(['lite', 'auto_awq', 'm', '--nonsense'])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ctrl_c_exits_with_130_and_the_same_command_goes_on(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Staging.finish_layer

    def finish_one(staging: Staging, index: int, *args: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        finish(staging, index, *args)

    args = ("rtn", model.path, "--work-dir", tmp_path / "out", *FAST, "--no-eval")
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish_layer", finish_one)
        code, text = lite(*args)
    assert code == 130
    assert "stopped after 1 of 2 layers" in text
    assert "the same command goes on from there" in text
    assert lite(*args)[0] == 0
    assert quantization_config(tmp_path / "out")["bits"] == 4


def test_options_that_would_do_nothing_are_refused(model: TinyModel, tmp_path: Path) -> None:
    code, text = lite("rtn", model.path, "--work-dir", tmp_path / "w", "--no-eval", *MEASURE)
    assert code == 2
    assert "--no-eval measures nothing, so --samples would do nothing" in text
    assert not (tmp_path / "w").exists()
