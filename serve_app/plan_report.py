"""A plan as a table for people and as JSON for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from engine.models import DecoderSpec
from kernels.kv_layout import POLICY_NAMES
from serve_app.plan import RANK_BYTES, Plan, TpPlan

GiB, MiB = 1024**3, 1024**2


def to_json(model: str, checkpoint_bytes: int, plan: Plan) -> str:
    return json.dumps(
        {
            "model": model,
            "checkpoint_bytes": checkpoint_bytes,
            "device": plan.device,
            "memory": asdict(plan.memory),
            "dtype": _dtype(plan),
            "quant_policy": plan.quant_policy,
            "session_len": plan.session_len,
            "pp": plan.pp,
            "best_tp": plan.best.tp if plan.best else None,
            "plans": [asdict(row) | {"fits": row.fits} for row in plan.rows],
        },
        indent=1,
    )


def to_text(model: str, spec: DecoderSpec, checkpoint_bytes: int, plan: Plan) -> str:
    """Head, table, how to read it, and the verdict."""
    form = spec.quantization.description if spec.quantization else spec.dtype
    bandwidth = plan.memory.bandwidth
    speed = "" if bandwidth is None else f" at {bandwidth / 1e9:g} GB/s"
    return "\n".join(
        [
            f"{model}: {spec.num_layers} layers, {spec.num_heads} heads on {spec.num_kv_heads}, "
            f"{form}; {_size(checkpoint_bytes)} on disk",
            f"{plan.memory.name}: {_size(plan.memory.num_bytes)}{speed}; context "
            f"{plan.session_len} tokens, computing in {_dtype(plan)}"
            + (f", KV in {POLICY_NAMES[plan.quant_policy]}" if plan.quant_policy else "")
            + (f", {plan.pp} stages of tp ranks each" if plan.pp > 1 else ""),
            "",
            *_aligned([_header(plan), *(_cells(plan, row) for row in plan.rows)]),
            "",
            *_notes(spec, plan),
            "",
            _verdict(plan),
        ]
    )


def _header(plan: Plan) -> list[str]:
    return [
        "tp",
        *(["replicas"] if plan.rows[0].num_replicas is not None else []),
        "weights/rank",
        "KV/token",
        "free",
        "KV tokens",
        "sequences",
        *(["tokens/s <", "all <"] if plan.memory.bandwidth is not None else []),
    ]


def _cells(plan: Plan, row: TpPlan) -> list[str]:
    return [
        str(row.tp),
        *([str(row.num_replicas)] if row.num_replicas is not None else []),
        _size(row.weight_bytes),
        f"{row.kv_bytes_per_token / 1024:g} KiB",
        _size(row.free_bytes),
        str(row.kv_tokens),
        str(row.num_sequences) if row.fits else "none",
        *([_rate(row.decode_bound), _rate(row.decode_bound_all)] if plan.memory.bandwidth else []),
    ]


def _notes(spec: DecoderSpec, plan: Plan) -> list[str]:
    per = "GPU" if plan.device == "cuda" else "machine, which all ranks share"
    notes = [
        f"free: of the {per}, after weights and {_size(RANK_BYTES)} for each process "
        "(assumed); the KV cache takes its share of that (cache_max_entry_count).",
        "sequences: at the whole context each, in one replica; shorter ones are more, up to "
        "max_num_seqs.",
    ]
    if plan.device == "cpu":
        notes.append(
            "KV tokens: within max_cpu_cache_bytes, 2 GiB unless an engine config (--config) says "
            "more; weights: mapped from one file, which the replicas of a machine share."
        )
    if plan.memory.bandwidth is not None:
        notes.append(
            "tokens/s: bounds, not forecasts: memory bandwidth over the bytes a decode step must "
            "read, for one sequence and for all, at the whole context."
        )
    return notes


def _verdict(plan: Plan) -> str:
    best = plan.best
    if best is not None:
        return f"--tp {best.tp} fits: {best.num_sequences} sequences of {plan.session_len} tokens."
    most = max(plan.rows, key=lambda row: row.kv_tokens)
    if most.kv_tokens == 0:
        return f"No tp up to {most.tp} fits: the weights leave no room for a KV cache."
    return (
        f"No tp up to {plan.rows[-1].tp} holds one context of {plan.session_len} tokens; tp "
        f"{most.tp} holds {most.kv_tokens} (--session-len)."
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _size(num_bytes: int) -> str:
    if abs(num_bytes) < GiB:
        return f"{num_bytes / MiB:.1f} MiB"
    return f"{num_bytes / GiB:.1f} GiB"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _dtype(plan: Plan) -> str:
    return str(plan.dtype).removeprefix("torch.")
