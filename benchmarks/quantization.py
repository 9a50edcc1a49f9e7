"""What quantisation costs in quality, time and memory, beside independent tools.

    python -m benchmarks.quantization [--peer TOOL=PYTHON ...] [--models demo ...] [--work-dir DIR]

Every checkpoint is made by a process of its own (tools/peers), ours too, from the same calibration
tokens; all are measured by our evaluation, float32, on the same held-out tokens. A peer is a
module of tools/peers with the interpreter that has it; peers without one are skipped, and the
record says so. What is in the work dir already is not made again.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.kv_quality import encode_chats
from benchmarks.outlier_model import sample_text, write_outlier_model
from benchmarks.random_checkpoint import LlamaShape
from benchmarks.record import Table, save, show
from engine.quantize.calibration import HeldOut, samples
from engine.quantize.comparison import Evaluation
from engine.quantize.evaluation import Lane, compare, open_model, weight_bytes
from engine.quantize.kv_loss import bytes_per_token, kv_loss
from engine.tokenizer import Tokenizer
from tools.peers.job import Job, save_samples

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
OURS = "manta"
KV_POLICIES = {8: "8 bits", 16: "fp8", 4: "4 bits"}
# As ours computes, and a multiple faster on a CPU without bf16. GPTQModel keeps its own choice.
FLOAT32 = {"dtype": "float32"}
# What each tool is asked for. GPTQ is symmetric, as every tool has it by default.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    OURS: {
        "rtn": {"layout": "awq"},
        "awq": {"layout": "awq"},
        "gptq": {"layout": "gptq", "symmetric": True},
    },
    "llmcompressor": {"awq": FLOAT32, "gptq": FLOAT32 | {"symmetric": True}},
    "gptqmodel": {"gptq": {"layout": "gptq", "symmetric": True}},
    "autoawq": {"awq": FLOAT32 | {"layout": "gemm"}},
}
LOAD_RUNS = 3
DEMO_CHATS = 40  # of each task: a per cent of perplexity shows in some ten thousand tokens


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, what tools calibrate on, and what the result is measured on."""

    name: str
    path: Path
    calibration: Path
    held_out: HeldOut
    about: str


@dataclass(frozen=True, slots=True)
class Made:
    """A quantised checkpoint, and what its tool said of the run."""

    tool: str
    method: str
    group_size: int
    path: Path
    run: Mapping[str, Any]


def main() -> None:
    arguments = parse()
    peers = dict(each.split("=", 1) for each in arguments.peer)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        plan = PLANS[name]
        subject = plan.subject(arguments)
        made = [
            make(arguments.work_dir, subject, tool, method, group_size, peers.get(tool))
            for group_size in plan.groups
            for tool, methods in METHODS.items()
            if tool == OURS or (tool in peers and group_size in plan.peer_groups)
            for method in methods
            if method in plan.methods
        ]
        if plan.timed_alone:
            found = [cost(subject, made), loading(subject, made, arguments.work_dir)]
        else:
            found = [quality(subject, made, peers), cost(subject, made), kv(subject)]
        for table in found:
            show(table)
        if arguments.save:
            title = f"Quality and cost of quantised weights: {subject.name}"
            print(save(f"quantization_{name}", title, found), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantise models and measure what is lost.")
    parser.add_argument("--peer", action="append", default=[], metavar="TOOL=PYTHON")
    parser.add_argument("--models", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--samples", type=int, default=32, help="to calibrate on")
    parser.add_argument("--held-out", type=int, default=8, help="350m: samples to measure on")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "manta-q")
    parser.add_argument("--no-save", dest="save", action="store_false")
    return parser.parse_args()


def demo(arguments: argparse.Namespace) -> Subject:
    text = samples(
        Tokenizer.load(DEMO),
        "builtin-demo",
        num_samples=arguments.samples,
        seqlen=arguments.seqlen,
    )
    path = arguments.work_dir / "demo-samples.safetensors"
    save_samples(path, text.calibration)
    about = f"the demo model; {len(text.calibration)} x {arguments.seqlen} tokens of its "
    held_out = _demo_held_out(arguments.seqlen)
    return Subject("demo", DEMO, path, held_out, about + "own corpus to calibrate on")


def _demo_held_out(seqlen: int) -> HeldOut:
    """Chats that neither training nor calibration saw, end to end; their answers are counted."""
    chats = encode_chats(DEMO_CHATS, seqlen)
    ids = torch.tensor([token for tokens, _ in chats for token in tokens])
    counted = torch.cat([answer.bool() for _, answer in chats])
    whole = len(ids) - len(ids) % seqlen
    return HeldOut(ids[:whole].view(-1, seqlen), counted[:whole].view(-1, seqlen))


def short_350m(arguments: argparse.Namespace) -> Subject:
    path = _write_350m(arguments, num_layers=4)
    every, num_samples = path / "samples.safetensors", arguments.samples + arguments.held_out
    if not every.exists():
        save_samples(every, sample_text(path, num_samples, arguments.seqlen))
    ids = load_file(every)["ids"]
    if ids.shape != (num_samples, arguments.seqlen):
        sys.exit(f"{every} holds samples of other sizes: delete {path}")
    calibration = arguments.work_dir / f"{path.name}-samples.safetensors"
    save_samples(calibration, ids[: arguments.samples])
    about = (
        f"a random model of the 350M shape with a trained one's outliers "
        f"(benchmarks/outlier_model.py), 4 layers; its own text, "
        f"{arguments.samples} x {arguments.seqlen} tokens to calibrate on"
    )
    held_out = HeldOut.all_of(ids[arguments.samples :])
    return Subject(path.name, path, calibration, held_out, about)


def whole_350m(arguments: argparse.Namespace) -> Subject:
    """Calibrated on random tokens, as time does not ask what they say."""
    path = _write_350m(arguments, num_layers=LlamaShape().num_layers)
    shape, generator = (arguments.samples, arguments.seqlen), torch.Generator().manual_seed(0)
    ids = torch.randint(3, LlamaShape().vocab_size, shape, generator=generator)
    calibration = arguments.work_dir / f"{path.name}-samples.safetensors"
    save_samples(calibration, ids)
    about = f"{arguments.samples} x {arguments.seqlen} random tokens"
    return Subject(path.name, path, calibration, HeldOut.all_of(ids[:0]), about)


def _write_350m(arguments: argparse.Namespace, num_layers: int) -> Path:
    path: Path = arguments.work_dir / f"350m-{num_layers}"
    if not (path / "tokenizer_config.json").exists():
        write_outlier_model(path, LlamaShape(num_layers=num_layers))
        for file in ("tokenizer.json", "tokenizer_config.json"):  # some tools want one
            shutil.copy(DEMO / file, path)
    return path


@dataclass(frozen=True, slots=True)
class Plan:
    """What is made of a subject: all of it with every tool would take hours."""

    subject: Callable[[argparse.Namespace], Subject]
    groups: tuple[int, ...]
    peer_groups: tuple[int, ...] = ()
    methods: tuple[str, ...] = ("rtn", "awq", "gptq")
    timed_alone: bool = False  # time and memory, of starts too, and no quality


PLANS = {
    "demo": Plan(demo, (128, 64, 32), (128,)),
    "350m-4": Plan(short_350m, (128, 64, 32), (128,)),
    "350m-24": Plan(whole_350m, (128,), methods=("awq",), timed_alone=True),
}


def make(
    work_dir: Path, subject: Subject, tool: str, method: str, group_size: int, python: str | None
) -> Made:
    """Have a tool quantise, unless the work dir has it."""
    out = work_dir / f"{subject.name}-{tool}-{method}-{group_size}"
    result = out.with_suffix(".json")
    if not result.exists():
        shutil.rmtree(out, ignore_errors=True)
        settings: dict[str, Any] = {"method": method, "group_size": group_size}
        job = Job(
            model=subject.path,
            out=out,
            samples=subject.calibration,
            **{**settings, **METHODS[tool][method]},
        )
        job.save(out.with_suffix(".job"))
        command = [python or sys.executable, "-m", "tools.peers", tool]
        print(f"{out.name} ...", flush=True)
        with open(out.with_suffix(".log"), "w") as log:
            subprocess.run(
                [*command, str(out.with_suffix(".job")), str(result)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                check=True,
            )
    return Made(tool, method, group_size, out, json.loads(result.read_text()))


def quality(subject: Subject, made: list[Made], peers: Mapping[str, str]) -> Table:
    """All checkpoints in one pass over the held-out text, beside the bf16 model."""
    with ExitStack() as stack:
        lanes = [
            Lane(stack.enter_context(open_model(path, torch.float32, "cpu")))
            for path in (subject.path, *(each.path for each in made))
        ]
        found = compare(lanes, subject.held_out, batch_size=4)
    ours = {
        (each.method, each.group_size): evaluation.perplexity
        for each, evaluation in zip(made, found, strict=True)
        if each.tool == OURS
    }
    missing = [tool for tool in METHODS if tool != OURS and tool not in peers]
    skipped = f" Not installed here: {', '.join(missing)}." if missing else ""
    return Table(
        title=f"Quality of int4 weights: {subject.name}",
        columns=["tool", "method", "group", "perplexity", "of bf16's", "ours to it", "KL, nats",
                 "99th percentile", "same top token", "MB"],
        rows=[
            [each.tool, each.method, str(each.group_size), *_losses(evaluation, ours, each)]
            for each, evaluation in zip(made, found, strict=True)
        ],
        notes=[
            f"Model: {subject.about}; measured in float32 on {found[0].num_tokens:,} other "
            f"tokens, on which the bf16 model has a perplexity of "
            f"{found[0].reference_perplexity:.4f}. \"Ours to it\": our perplexity with the same "
            "method and group over the tool's; **goal**: at most 1.01. RTN and AWQ are asymmetric, "
            f"GPTQ symmetric with the largest inputs first.{skipped}"
        ],
    )  # fmt: skip


def _losses(
    found: Evaluation, ours: Mapping[tuple[str, int], float], each: Made
) -> list[str | float]:
    assert found.reference_perplexity is not None
    assert found.kl_mean is not None
    assert found.kl_p99 is not None
    assert found.top1_agreement is not None
    ratio = ours[each.method, each.group_size] / found.perplexity
    return [
        f"{found.perplexity:.4f}",
        f"{100 * (found.perplexity / found.reference_perplexity - 1):+.2f} %",
        "" if each.tool == OURS else f"{ratio:.4f}",
        f"{found.kl_mean:.4f}",
        f"{found.kl_p99:.3f}",
        f"{100 * found.top1_agreement:.2f} %",
        f"{weight_bytes(each.path) / 1e6:.1f}",
    ]


def cost(subject: Subject, made: list[Made]) -> Table:
    size = weight_bytes(subject.path)
    return Table(
        title=f"Time and memory of quantising: {subject.name}",
        columns=["tool", "method", "group", "s", "peak memory, MB", "after imports, MB"],
        rows=[
            [
                each.tool,
                each.method,
                str(each.group_size),
                f"{each.run['seconds']:.0f}",
                f"{each.run['peak_memory'] / 1e6:.0f}",
                f"{each.run['memory_before'] / 1e6:.0f}",
            ]
            for each in made
        ],
        notes=[
            f"Of a checkpoint of {size / 1e6:.0f} MB ({subject.about}), without measuring it. "
            "Memory is the process's resident set at its largest, mapped files included. Versions: "
            f"{_versions(made)}."
        ],
    )


def _versions(made: list[Made]) -> str:
    found = {each.tool: each.run["versions"] for each in made}
    return "; ".join(
        ", ".join(f"{package} {version}" for package, version in versions.items())
        for versions in found.values()
    )


def kv(subject: Subject) -> Table:
    found = kv_loss(subject.path, tuple(KV_POLICIES), subject.held_out, batch_size=4)
    sizes = bytes_per_token(subject.path, tuple(KV_POLICIES))
    return Table(
        title=f"Quality of quantised keys and values: {subject.name}",
        columns=["quant_policy", "cache", "bytes per token", "perplexity of plain's", "KL, nats",
                 "same top token"],
        rows=[
            [
                str(policy),
                KV_POLICIES[policy],
                str(sizes[policy]),
                f"{100 * (each.perplexity / (each.reference_perplexity or 1) - 1):+.3f} %",
                f"{each.kl_mean or 0:.2g}",
                f"{100 * (each.top1_agreement or 0):.2f} %",
            ]
            for policy, each in found.items()
        ],
        notes=["With the bf16 model's weights."],
    )  # fmt: skip


def loading(subject: Subject, made: list[Made], work_dir: Path) -> Table:
    """From a process's start to its first token."""
    rows: list[list[str | float]] = []
    for each in made:
        if each.tool == OURS:
            for kind, runs in _first_tokens(each.path, work_dir / "cache").items():
                parts = [statistics.median(run[part] for run in runs) for part in runs[0]]
                *seconds, memory = parts
                name = each.path.name.removeprefix(f"{subject.name}-{OURS}-")
                rows.append([name, kind, *seconds, sum(seconds), f"{memory / 1e6:.0f}"])
    return Table(
        title=f"From a process's start to the first token, s: {subject.name}",
        columns=["checkpoint", "packed weights", "imports", "load", "first token", "sum",
                 "peak memory, MB"],
        rows=rows,
        notes=[
            f"Medians of {LOAD_RUNS} runs, the checkpoint in the page cache, bf16. **Goal**: load "
            "and first token in 5 s."
        ],
    )  # fmt: skip


def _first_tokens(model: Path, cache: Path) -> dict[str, list[dict[str, float]]]:
    """Alternately with nothing packed, and with what the run before packed."""
    found: dict[str, list[dict[str, float]]] = {"none yet": [], "of an earlier start": []}
    for _ in range(LOAD_RUNS):
        shutil.rmtree(cache, ignore_errors=True)
        for runs in found.values():
            output = subprocess.run(
                [sys.executable, "-m", "benchmarks.first_token", str(model)],
                cwd=ROOT,
                env=os.environ | {"XDG_CACHE_HOME": str(cache)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            runs.append(json.loads(output.splitlines()[-1]))
    shutil.rmtree(cache, ignore_errors=True)
    return found


if __name__ == "__main__":
    main()
