"""The least time that a decode step of a Llama can take: its bytes and FLOPs at measured rates."""

from dataclasses import dataclass

from benchmarks.gpu.bench import Bench, Report
from benchmarks.random_checkpoint import LlamaShape

GROUP_BYTES = 3  # a scale of two bytes and a zero point of one
PARAMS_BYTES = 4  # of a quantised token's keys or values of one head


@dataclass(frozen=True, slots=True)
class StepFloor:
    """Microseconds of each phase; they follow each other."""

    linears: float
    head: float
    attention: float

    @property
    def us(self) -> float:
        return self.linears + self.head + self.attention


def int4_bytes(num_weights: float, group_size: int) -> float:
    """Of packed weights as the kernels read them."""
    return num_weights / 2 + GROUP_BYTES * num_weights / group_size


def kv_bytes_per_token(shape: LlamaShape, policy: int) -> float:
    """Of all layers."""
    values = {0: 2.0, 8: 1.0, 4: 0.5, 16: 1.0}[policy] * shape.head_dim
    params = PARAMS_BYTES if policy else 0
    return 2 * shape.num_layers * shape.num_kv_heads * (values + params)


def kernel_floors(bench: Bench, int4: bool, policy: int, streams: int, context: float) -> Report:
    """Microseconds of a step's phases, by the name that `step_kernels` has for them."""
    step = step_floor(bench, int4, policy, streams, context)
    floors: Report = {"attention": step.attention, "head": step.head}
    if int4:
        shape = bench.plan.model
        for name, (n, k) in merged_linears(shape).items():
            num_weights = shape.num_layers * n * k
            num_bytes = int4_bytes(num_weights, shape.group_size)
            floors[f"int4 {name}"] = _phase(bench, num_bytes, 2.0 * num_weights * streams)
    return floors


def merged_linears(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of a layer's products in their order, as the engine computes
    them.
    """
    linears = list(shape.linears().values())
    k = shape.hidden_size
    return {
        "qkv": (sum(n for n, _ in linears[:3]), k),
        "o": linears[3],
        "gate_up": (sum(n for n, _ in linears[4:6]), k),
        "down": linears[6],
    }


def step_floor(bench: Bench, int4: bool, policy: int, streams: int, context: float) -> StepFloor:
    shape = bench.plan.model
    num_weights = shape.num_layers * sum(n * k for n, k in shape.linears().values())
    num_bytes = int4_bytes(num_weights, shape.group_size) if int4 else 2.0 * num_weights
    head_weights = shape.vocab_size * shape.hidden_size
    kv_bytes = streams * context * kv_bytes_per_token(shape, policy)
    return StepFloor(
        linears=_phase(bench, num_bytes, 2.0 * num_weights * streams),
        head=_phase(bench, 2.0 * head_weights, 2.0 * head_weights * streams),
        attention=_phase(bench, kv_bytes, 0.0),
    )


def prefill_floor_us(bench: Bench, num_tokens: int) -> float:
    """Of the linears, which nearly all of a prompt of 1,000 tokens is."""
    shape = bench.plan.model
    num_weights = shape.num_layers * sum(n * k for n, k in shape.linears().values())
    return _phase(bench, 0.0, 2.0 * num_weights * num_tokens)


def _phase(bench: Bench, num_bytes: float, flops: float) -> float:
    return 1e6 * max(num_bytes / bench.read_rate, flops / bench.matmul_rate)
