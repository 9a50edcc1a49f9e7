"""`manta lite …`: the commands that quantise, prune and measure a checkpoint.

Knows their options and defaults; imports torch or Ray only once a command needs them.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from serve_app.command_errors import command_errors

app = typer.Typer(
    help="Quantise a checkpoint, offline and resumable, and report what was lost.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Device = Literal["auto", "cpu", "cuda"]
ComputeDType = Literal["float32", "bfloat16", "float16"]
Format = Literal["awq", "gptq", "compressed-tensors"]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a dense checkpoint.")]
WorkDir = Annotated[Path, typer.Option(help="Where the result goes; it must not exist yet.")]
CalibData = Annotated[
    str, typer.Option(help="Text to calibrate on: a .jsonl or .txt file, or builtin.")
]
CalibSamples = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
CalibSeqlen = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens of a sample; none: 2048, or the model's context."),
]
Data = Annotated[str, typer.Option(help="Text to measure on: a .jsonl or .txt file, or builtin.")]
Samples = Annotated[
    int, typer.Option(min=1, help="Samples of the text; a quarter of them is measured on.")
]
Seqlen = CalibSeqlen
Bits = Annotated[int, typer.Option(help="Bits of a weight: 4. For 8 use smooth_quant.")]
GroupSize = Annotated[
    int,
    typer.Option(help="Weights with one scale: 128, 64 or 32; -1: all of an output."),
]
Symmetric = Annotated[
    bool, typer.Option("--w-sym/--w-asym", help="Without zero points, or with them.")
]
OutputFormat = Annotated[Format, typer.Option("--format", help="Layout of the checkpoint.")]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Leave linears with this in their name dense; may be repeated."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples computed at once.")]
DeviceOption = Annotated[Device, typer.Option(help="auto: cuda when there is one.")]
DTypeOption = Annotated[ComputeDType, typer.Option(help="Of the computation, not of the result.")]
NumWorkers = Annotated[
    int | None, typer.Option(min=1, help="Ray actors that share the samples; none: no Ray.")
]
Tp = Annotated[
    int, typer.Option(min=1, help="Of those, how many share the outputs of each linear.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Drop what an earlier run left.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint in the work dir.")
]
Seed = Annotated[int, typer.Option(help="Of the choice of samples.")]
Eval = Annotated[bool, typer.Option("--eval/--no-eval", help="Measure the loss and report it.")]

WORK_DIR = Path("./work_dir")
BUILTIN = "builtin"


@app.command(name="auto_awq")
def auto_awq(
    model: Model,
    work_dir: WorkDir = WORK_DIR,
    calib_data: CalibData = BUILTIN,
    calib_samples: CalibSamples = 128,
    calib_seqlen: CalibSeqlen = None,
    w_bits: Bits = 4,
    w_group_size: GroupSize = 128,
    w_sym: Symmetric = False,
    search_scale: Annotated[
        bool,
        typer.Option(
            "--search-scale/--no-search-scale",
            help="Search the scales of inputs by output error, or take the ratio 0.5.",
        ),
    ] = True,
    output_format: OutputFormat = "awq",
    skip: Skip = None,
    batch_size: BatchSize = 1,
    device: DeviceOption = "auto",
    dtype: DTypeOption = "float32",
    num_workers: NumWorkers = None,
    tp: Tp = 1,
    seed: Seed = 0,
    evaluate: Eval = True,
    restart: Restart = False,
    overwrite: Overwrite = False,
) -> None:
    """4 bits with AWQ.

    Scales and clipped ranges save the weights that large inputs make important.
    """
    _run(dict(locals()), "awq")


@app.command(name="auto_gptq")
def auto_gptq(
    model: Model,
    work_dir: WorkDir = WORK_DIR,
    calib_data: CalibData = BUILTIN,
    calib_samples: CalibSamples = 128,
    calib_seqlen: CalibSeqlen = None,
    w_bits: Bits = 4,
    w_group_size: GroupSize = 128,
    w_sym: Symmetric = True,
    desc_act: Annotated[
        bool,
        typer.Option("--desc-act/--no-desc-act", help="Quantise the largest inputs first."),
    ] = False,
    damp: Annotated[
        float, typer.Option(help="Share of the Hessian's mean that is added to its diagonal.")
    ] = 0.01,
    output_format: OutputFormat = "gptq",
    skip: Skip = None,
    batch_size: BatchSize = 1,
    device: DeviceOption = "auto",
    dtype: DTypeOption = "float32",
    num_workers: NumWorkers = None,
    tp: Tp = 1,
    seed: Seed = 0,
    evaluate: Eval = True,
    restart: Restart = False,
    overwrite: Overwrite = False,
) -> None:
    """4 bits with GPTQ.

    The error of each weight's rounding is made up for by the weights after it.
    """
    _run(dict(locals()), "gptq")


@app.command(name="smooth_quant")
def smooth_quant(
    model: Model,
    work_dir: WorkDir = WORK_DIR,
    quant_dtype: Annotated[Literal["int8", "fp8"], typer.Option(help="Of the weights.")] = "int8",
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="How much of the inputs' range goes to weights.")
    ] = 0.5,
    calib_data: CalibData = BUILTIN,
    calib_samples: CalibSamples = 128,
    calib_seqlen: CalibSeqlen = None,
    skip: Skip = None,
    batch_size: BatchSize = 1,
    device: DeviceOption = "auto",
    dtype: DTypeOption = "float32",
    num_workers: NumWorkers = None,
    seed: Seed = 0,
    evaluate: Eval = True,
    restart: Restart = False,
    overwrite: Overwrite = False,
) -> None:
    """8 bits with SmoothQuant.

    Outliers of the inputs move into the weights, so that both suit 8 bits.
    """
    _run(dict(locals()), "smooth_quant")


@app.command()
def rtn(
    context: typer.Context,
    model: Model,
    work_dir: WorkDir = WORK_DIR,
    w_bits: Bits = 4,
    w_group_size: GroupSize = 128,
    w_sym: Symmetric = False,
    output_format: OutputFormat = "awq",
    skip: Skip = None,
    device: DeviceOption = "auto",
    data: Data = BUILTIN,
    samples: Samples = 128,
    seqlen: Seqlen = None,
    batch_size: BatchSize = 1,
    evaluate: Eval = True,
    restart: Restart = False,
    overwrite: Overwrite = False,
) -> None:
    """4 bits by rounding to nearest.

    Takes seconds and no calibration, and loses more than the others.
    """
    options = dict(locals())
    del options["context"]
    if not evaluate:
        measuring = ("data", "samples", "seqlen", "batch_size")
        _refuse_given(context, "--no-eval measures nothing", measuring)
    _run(options, "rtn")


@app.command()
def prune(
    model: Model,
    work_dir: WorkDir = WORK_DIR,
    pattern: Annotated[str, typer.Option(help="Zeros in every so many weights.")] = "2:4",
    method: Annotated[
        Literal["wanda", "sparsegpt"],
        typer.Option(help="By weight and input (wanda), or with the rest made up for (sparsegpt)."),
    ] = "wanda",
    damp: Annotated[
        float | None, typer.Option(help="As of auto_gptq, for sparsegpt; none: 0.01.")
    ] = None,
    calib_data: CalibData = BUILTIN,
    calib_samples: CalibSamples = 128,
    calib_seqlen: CalibSeqlen = None,
    skip: Skip = None,
    batch_size: BatchSize = 1,
    device: DeviceOption = "auto",
    dtype: DTypeOption = "float32",
    num_workers: NumWorkers = None,
    tp: Tp = 1,
    seed: Seed = 0,
    evaluate: Eval = True,
    restart: Restart = False,
    overwrite: Overwrite = False,
) -> None:
    """Zeros in a pattern, such as 2:4.

    The checkpoint stays dense and as large; the report says what it costs.
    """
    _run(dict(locals()), "prune")


@app.command()
def kv(
    model: Model,
    quant_policy: Annotated[
        str, typer.Option(help="Policies to measure, by comma: 8, 4 or 16, as `manta serve` takes.")
    ] = "8,4",
    work_dir: WorkDir = WORK_DIR,
    data: Data = BUILTIN,
    samples: Samples = 128,
    seqlen: Seqlen = None,
    batch_size: BatchSize = 1,
    device: DeviceOption = "auto",
    overwrite: Overwrite = False,
) -> None:
    """What a KV cache in 8 or 4 bits costs.

    Nothing is calibrated, and no checkpoint is written: the report says what is lost.
    """
    options = dict(locals())
    with command_errors():
        from serve_app.lite_measure import run_kv

        run_kv(options)


@app.command(name="eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Any checkpoint's directory.")],
    reference: Annotated[
        str | None, typer.Option(help="The checkpoint it was made from; none: perplexity alone.")
    ] = None,
    work_dir: WorkDir = WORK_DIR,
    data: Data = BUILTIN,
    samples: Samples = 128,
    seqlen: Seqlen = None,
    batch_size: BatchSize = 1,
    device: DeviceOption = "auto",
    overwrite: Overwrite = False,
) -> None:
    """What a checkpoint lost, beside its reference.

    Perplexity, KL divergence and top-1 agreement on held-out text, as a report.
    """
    options = dict(locals())
    with command_errors():
        from serve_app.lite_measure import run_eval

        run_eval(options)


def _refuse_given(context: typer.Context, why: str, names: tuple[str, ...]) -> None:
    """Of options that would do nothing, those that were given."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{why}, so {flag} would do nothing; leave one of them out")


def _run(options: dict[str, Any], method: str) -> None:
    with command_errors():
        from serve_app.lite_command import run_quantization

        run_quantization(method, options)
