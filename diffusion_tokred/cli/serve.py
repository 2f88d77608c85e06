"""`tokred app`: the A/B app in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
from .common import Device, Dtype, Threads, app, quiet_libraries, working


@app.command(
    "app",
    epilog="""Examples:

    tokred app

    tokred app --model toy-sd --model ./my-pipeline --port 8080

    tokred app --share --auth ada:secret --queue-size 8""",
)
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model that may be chosen, the first to begin with. (default: toy-dit and toy-sd)"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port. (default: the first free from 7860)")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also a public link, through gradio's servers.")] = False,
    auth: Annotated[
        str | None,
        typer.Option(metavar="USER:PASSWORD", envvar="TOKRED_AUTH", help="Who may come in; also from the environment."),
    ] = None,
    queue_size: Annotated[int, typer.Option(min=1, help="Runs that may wait.")] = 16,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Compare two ways to draw a picture in the browser: pictures, tokens over time, times, history, batches.

    The page is there within seconds; the model loads behind it.
    """
    quiet_libraries()
    with working("starting"):
        try:
            from diffusion_tokred.app import serve as start
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("gradio", "pandas", "matplotlib"):
                raise
            raise ConfigError(f'the app needs {error.name}: pip install "diffusion-tokred[app]"') from None
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
    start(
        tuple(model or ("toy-dit", "toy-sd")), device=device, dtype=dtype, host=host, port=port, share=share, auth=auth,
        queue_size=queue_size,
    )  # fmt: skip
