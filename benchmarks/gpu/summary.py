"""The short tables of a run, on the screen and for docs/benchmarks.md."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.bench import Report
from benchmarks.gpu.targets import linear_sums, targets
from benchmarks.record import Table, text
from benchmarks.record import save as save_record
from benchmarks.record import show as show_table

SHOWN = 12  # kernels of a step
DENSE_KERNELS = ("gemm", "gemv", "nvjet", "cutlass")  # in names of cuBLAS's


def show(report: Report) -> None:
    for table in tables(report):
        show_table(table)
        print("\n".join(table.notes))


def show_stages(report: Report) -> None:
    table = _stages(report)
    show_table(table)
    print("\n".join(table.notes))


def tables(report: Report) -> list[Table]:
    makers = (_linears, _decode_attention, _prefill_attention, _rope_store, _sampling, _engine,
              _prompts, _targets, _stages)  # fmt: skip
    made = [*(make(report) for make in makers), *_kernels(report)]
    return [table for table in made if table.rows]


def save(report: Report, folder: Path) -> Path:
    """A record beside those of the other benchmarks."""
    device = report.get("ceilings", {}).get("device", {})
    facts = {key: str(device[key]) for key in ("name", "triton", "cuda") if key in device}
    return save_record("gpu", "GPU", tables(report), folder, facts)


def _stages(report: Report) -> Table:
    rows: list[list[str | float]] = []
    notes = []
    for name, section in report.items():
        if "ended" not in section:
            continue
        checks, errors = section.get("checks", {}), section.get("errors", {})
        wrong = [label for label, check in checks.items() if not check["ok"]]
        rows.append([name, section["ended"], f"{section.get('seconds', 0):.0f}", len(checks),
                     len(wrong), len(errors)])  # fmt: skip
        notes += [f"{name}: {label} is wrong, {checks[label]['error']:.1e}" for label in wrong[:8]]
        absent = section.get("left out", {})
        notes += [f"{name}: left out: {label}: {reason}" for label, reason in absent.items()]
        notes += [
            f"{name}: {label}: {trace.strip().splitlines()[-1][:150]}"
            for label, trace in list(errors.items())[:8]
        ]
    return Table("Stages", ["stage", "ended", "seconds", "checks", "wrong", "errors"], rows, notes)


def _linears(report: Report) -> Table:
    names = ("floor", "cublas", "marlin", "tinygemm", "ours", "partial")
    sums = {name: linear_sums(report, name) for name in names}
    rows: list[list[str | float]] = [
        [str(m), *[_cell(sums[name].get(m)) for name in names],
         _cell(_over(sums["cublas"].get(m), ours))]
        for m, ours in sorted(sums["ours"].items())
    ]  # fmt: skip
    columns = ["M", "floor", "cuBLAS bf16", "Marlin", "tinygemm", "int4", "int4, parts left",
               "over cuBLAS"]  # fmt: skip
    return Table("Int4 linears, four shapes of Llama-3-8B, us", columns, rows)


def _decode_attention(report: Report) -> Table:
    rows: list[list[str | float]] = []
    for context, kinds in report.get("decode_attention", {}).get("contexts", {}).items():
        peers = kinds.get("peers") or {}
        for kind, point in kinds.items():
            if kind != "peers" and point is not None:
                rows.append([context, kind, point["us"], point["floor_us"], point["tb_s"]])
        rows += [[context, name, us, "", ""] for name, us in peers.items()]
    return Table("Decode attention, us", ["context", "kind", "us", "floor", "TB/s"], rows)


def _rope_store(report: Report) -> Table:
    times = report.get("rope_store", {}).get("times", {})
    rows: list[list[str | float]] = [
        [label, point["us"], point["floor_us"], point["tb_s"]]
        for label, point in times.items()
        if point is not None
    ]
    return Table("Norm, rotation and cache writes, us", ["step", "us", "floor", "TB/s"], rows)


def _prefill_attention(report: Report) -> Table:
    rows: list[list[str | float]] = []
    for length, kinds in report.get("prefill_attention", {}).get("prompts", {}).items():
        for kind, point in kinds.items():
            if kind != "peers" and point is not None:
                rows.append([length, kind, point["us"], point["tflop_s"]])
        peers = kinds.get("peers") or {}
        rows += [[length, name, us, ""] for name, us in peers.items()]
    return Table("Prompt attention, us", ["tokens", "kind", "us", "TFLOP/s"], rows)


def _sampling(report: Report) -> Table:
    times = report.get("sampling", {}).get("us", {})
    rows: list[list[str | float]] = [[kind, us] for kind, us in times.items() if us is not None]
    return Table("Sampling, 64 rows of 128,256 logits, us", ["kind", "us"], rows)


def _prompts(report: Report) -> Table:
    rows: list[list[str | float]] = [
        [label, _cell(section.get("ttft_ms")), _cell(section.get("prefill_tokens_per_s")),
         _cell(section.get("tokens_per_s"))]
        for label, section in (
            ("int4", report.get("engine_int4", {}).get("plain")),
            ("bf16", report.get("engine_bf16", {}).get("plain")),
            ("transformers generate", report.get("transformers_speed", {}).get("generate")),
            ("transformers generate_batch, 64 streams",
             report.get("transformers_speed", {}).get("generate_batch")),
        )
        if section is not None
    ]  # fmt: skip
    columns = ["engine", "first token, ms", "prompt tok/s", "decode tok/s"]
    return Table("Prompts of 1,024 tokens, and transformers", columns, rows)


def _engine(report: Report) -> Table:
    rows: list[list[str | float]] = []
    for stage, weights in (("engine_int4", "int4"), ("engine_bf16", "bf16")):
        for kv, engine in report.get(stage, {}).items():
            if not isinstance(engine, dict) or "decode" not in engine:
                continue
            for streams, row in engine["decode"].items():
                rows.append([
                    weights, kv, streams, row["tokens_per_s"], row["step_us"] / 1e3,
                    row["floor_us"] / 1e3, _cell(row.get("waiting_share")),
                    _cell(row.get("idle_share")),
                ])  # fmt: skip
    columns = ["weights", "KV", "streams", "tok/s", "ms/step", "floor", "waiting", "no kernel"]
    return Table("Engine, Llama-3-8B, context 1,024", columns, rows)


def _kernels(report: Report) -> Iterator[Table]:
    """Of each engine's decode step: the kernels that take longest with the most streams."""
    for stage, weights in (("engine_int4", "int4"), ("engine_bf16", "bf16")):
        for kv, engine in report.get(stage, {}).items():
            if not isinstance(engine, dict) or "decode" not in engine:
                continue
            decode = {s: row for s, row in engine["decode"].items() if row.get("kernels")}
            names = list(dict.fromkeys(
                name for row in reversed(decode.values()) for name in list(row["kernels"])[:SHOWN]
            ))  # fmt: skip
            rows: list[list[str | float]] = [
                [
                    name,
                    *(
                        cell
                        for row in decode.values()
                        for cell in _kernel_cells(row, name, weights)
                    ),
                ]
                for name in names
            ]
            columns = ["kernel", *(column for s in decode for column in (f"{s} streams", "floor"))]
            yield Table(f"Decode step, {weights} weights, {kv} KV, us by kernel", columns, rows)


def _kernel_cells(row: Report, name: str, weights: str) -> tuple[str | float, str | float]:
    phase = "attention" if name.startswith("decode_") else name
    if weights == "int4" and any(word in name for word in DENSE_KERNELS):
        phase = "head"  # the one dense product of such a step
    kernel = row["kernels"].get(name)
    return _cell(kernel and kernel["us"]), _cell(row.get("floors_us", {}).get(phase))


def _targets(report: Report) -> Table:
    verdicts = {True: "met", False: "missed", None: "not measured"}
    rows: list[list[str | float]] = [
        [
            target.what,
            f"{'≤' if target.at_most else '≥'} {text(target.goal)} {target.unit}".strip(),
            _cell(target.found),
            _cell(target.ratio),
            verdicts[target.met],
        ]
        for target in targets(report)
    ]
    return Table("Goals", ["what", "goal", "found", "of the goal", ""], rows)


def _over(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def _cell(value: float | None) -> str | float:
    return "-" if value is None else value
