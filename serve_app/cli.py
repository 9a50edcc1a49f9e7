"""The `manta` command: serve, chat, plan, lite, env, check_env.

Imports torch or Ray only once a command needs them: a wrong option is answered in 0.2 s.
"""

import contextlib
import os
import shlex
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from engine.errors import ConfigError
from serve_app import launch_env, lite_cli
from serve_app.command_errors import command_errors
from serve_app.launch_plan import default_model, make_plan
from serve_app.ports import check_port
from serve_app.processes import Guard

app = typer.Typer(
    help="Serve int4 language models with Ray: an OpenAI endpoint from one command.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(lite_cli.app, name="lite")

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "bfloat16", "float16", "float32"]
Placement = Literal["node", "stages", "ranks"]
Quantize = Literal["awq", "rtn", "int8"]
LogLevel = Literal["debug", "info", "warning", "error"]

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Checkpoint directory; none: the demo model."),
]
DeviceOption = Annotated[Device | None, typer.Option(help="Where the model runs.")]
DTypeOption = Annotated[DType | None, typer.Option(help="Of activations and KV cache.")]
SessionLenOption = Annotated[int | None, typer.Option(help="Longest prompt and answer, in tokens.")]
QuantPolicyOption = Annotated[
    int | None,
    typer.Option(help="KV cache: 0: as computed; 8, 4: so many bits; 16: fp8, as LMDeploy counts."),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        help="Quantise a dense checkpoint while loading it: int4 (awq, rtn) or int8 weights."
    ),
]


@app.command()
def serve(
    model: ModelArgument = None,
    config: Annotated[
        Path | None, typer.Option(help="Engine config (YAML); the options below win over it.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="The model id clients use; none: the directory's name.")
    ] = None,
    tp: Annotated[int | None, typer.Option(help="Engine processes that share each layer.")] = None,
    pp: Annotated[
        int | None, typer.Option(help="Stages of layers, each on --tp engine processes.")
    ] = None,
    placement: Annotated[
        Placement | None,
        typer.Option(
            help="What stays on one Ray node: all of an engine (node), each of its stages, or just "
            "each rank."
        ),
    ] = None,
    num_replicas: Annotated[
        int | None, typer.Option(min=1, help="Copies of the engine that share the requests.")
    ] = None,
    min_replicas: Annotated[
        int | None, typer.Option(min=0, help="With --max-replicas; 0: none while nobody asks.")
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="As many copies as the queue needs, and at most so many."),
    ] = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    session_len: SessionLenOption = None,
    quant_policy: QuantPolicyOption = None,
    quantize: QuantizeOption = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences running at once.")] = None,
    cache_max_entry_count: Annotated[
        str | None,
        typer.Option(
            help="KV cache: a share of the memory free after the weights (0.8) or a number of "
            "blocks (4096)."
        ),
    ] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard/--no-dashboard", help="Start Ray's dashboard as well.")
    ] = False,
    log_level: Annotated[
        LogLevel | None, typer.Option(help="info and debug also show Serve's log lines here.")
    ] = None,
) -> None:
    """Serve MODEL at http://HOST:PORT/v1 until Ctrl-C.

    Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. Whatever is not
    given comes from serve_config.yaml: the one here, else Manta's own.
    """
    started = time.monotonic()
    with command_errors():
        plan = make_plan(
            model=model,
            engine_config=config,
            model_name=model_name,
            host=host,
            port=port,
            num_replicas=num_replicas,
            min_replicas=min_replicas,
            max_replicas=max_replicas,
            log_level=log_level,
            tp=tp,
            pp=pp,
            placement=placement,
            device=device,
            dtype=dtype,
            session_len=session_len,
            quant_policy=quant_policy,
            quantize=quantize,
            max_num_seqs=max_num_seqs,
            cache_max_entry_count=_number(cache_max_entry_count),
        )
        named = os.environ.get("RAY_ADDRESS")
        address = None if named in (None, "", "local") else named
        verbose = log_level in ("debug", "info")
        with contextlib.ExitStack() as ends:
            if address is None:
                check_port(plan.host, plan.port)
                run_dir = ends.enter_context(Guard()).run_dir
                launch_env.set_local_defaults(os.environ, run_dir, verbose=verbose)
            else:
                launch_env.set_joining_defaults(os.environ, verbose=verbose)
            from serve_app import launch

            launch.run(plan, address=address, dashboard=dashboard, verbose=verbose, started=started)


@app.command()
def chat(
    model: ModelArgument = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    session_len: SessionLenOption = None,
    quant_policy: QuantPolicyOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Talk to MODEL in the terminal, without a server."""
    with command_errors():
        path = model or default_model()
        from engine import LLM, SamplingParams
        from serve_app.chat import chat as run_chat

        given = {
            "device": device,
            "dtype": dtype,
            "session_len": session_len,
            "quant_policy": quant_policy,
            "quantize": quantize,
        }
        llm = LLM(path, **{key: value for key, value in given.items() if value is not None})
        params: dict[str, Any] = dict(llm.tokenizer.sampling_defaults)
        wanted = {"temperature": temperature, "max_tokens": max_tokens}
        params |= {key: value for key, value in wanted.items() if value is not None}
        run_chat(llm, SamplingParams(**params), system)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Checkpoint directory; its config.json is all that is read."
        ),
    ],
    gpu: Annotated[str | None, typer.Option(help="A known GPU, such as H100-80GB.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many of them there are.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of another GPU, or with --cpu of the machine: 80GiB.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=1, help="Of that memory, in GB/s: bounds the tokens/s.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for a machine without GPUs.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="Engine config (YAML); the options here win over it.")
    ] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Stages of consecutive layers.")] = None,
    dtype: DTypeOption = None,
    session_len: SessionLenOption = None,
    quant_policy: QuantPolicyOption = None,
    quantize: QuantizeOption = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences running at once.")] = None,
    cache_max_entry_count: Annotated[
        str | None, typer.Option(help="Share of the free memory for the KV cache, or blocks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What MODEL needs and what fits: weights, KV cache and sequences for every tp.

    Exit code 1 when nothing fits.
    """
    with command_errors():
        from serve_app.plan_command import Wanted, run_plan

        wanted = Wanted(gpu, gpus, memory, bandwidth, cpu)
        settings = {
            "pp": pp,
            "dtype": dtype,
            "session_len": session_len,
            "quant_policy": quant_policy,
            "quantize": quantize,
            "max_num_seqs": max_num_seqs,
            "cache_max_entry_count": _number(cache_max_entry_count),
        }
        fits, text = run_plan(model, wanted, config, settings, as_json=as_json)
        typer.echo(text)
        raise typer.Exit(0 if fits else 1)


@app.command()
def env() -> None:
    """Print what `ray start` needs on every node: eval "$(manta env)"."""
    for name, value in launch_env.node_environment().items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command(name="check_env")
def check_env() -> None:
    """Report versions, CPU, memory and GPUs, and the mend of what is missing."""
    from serve_app.check_env import report

    raise typer.Exit(0 if report() else 1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"manta {metadata.version('manta-serve')}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_version, help="Print the version."),
    ] = False,
) -> None:
    pass


def _number(text: str | None) -> int | float | None:
    """An integer counts blocks, anything with a point is a share."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"--cache-max-entry-count takes a share such as 0.8 or a number of blocks, got {text!r}"
        ) from None
