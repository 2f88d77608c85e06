"""The page: a method and its main options, one prompt and seed, two pictures and what the difference cost."""

from __future__ import annotations

from typing import Any

import gradio as gr

import diffusion_tokred as tokred
from diffusion_tokred.evaluation.compare import PROMPT, Comparison, compare
from diffusion_tokred.evaluation.images import difference_map, token_map
from diffusion_tokred.evaluation.models import load_model
from diffusion_tokred.evaluation.tables import comparison_rows

MOST_PIXELS = 1024  # a side
MOST_STEPS = 100


def build(model: str = "toy-dit", device: str | None = None) -> gr.Blocks:
    """The app on one model: a zoo name, a local folder or a hub id.

    Raises:
        ConfigError: no such model (see `tokred compare --model`).
    """
    pipe = load_model(model, device=device)

    def run(
        prompt: str, method: str, ratio: float, factor: float, seed: float, steps: float, side: float, repeat: float
    ) -> tuple[Any, Any, Any, Any]:
        options = {"ratio": ratio} if method == "tome" else {"factor": int(factor)}
        if not prompt.strip():
            raise gr.Error("An empty prompt: write what the picture should show.", print_exception=False)
        if not (16 <= side <= MOST_PIXELS and 1 <= steps <= MOST_STEPS and 1 <= repeat <= 10):
            raise gr.Error(f"Sizes go up to {MOST_PIXELS} px, steps up to {MOST_STEPS}.", print_exception=False)
        try:
            found = compare(
                pipe, method=method, prompt=prompt, seeds=(int(seed),), steps=int(steps), size=(int(side), int(side)),
                repeat=int(repeat), model=model, **options,
            )  # fmt: skip
        except (tokred.ConfigError, tokred.UnsupportedError, tokred.StateError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        row = found.rows[0]
        return (row.unpatched, row.patched), difference_map(row), token_map(row), _rows(found)

    with gr.Blocks(title="diffusion_tokred", analytics_enabled=False) as page:
        gr.Markdown(f"## diffusion_tokred: `{model}` without and with token reduction")
        with gr.Row():
            with gr.Column(scale=1):
                prompt = gr.Textbox(PROMPT, label="Prompt", lines=2)
                method = gr.Radio([info.name for info in tokred.methods()], value="tome", label="Method")
                ratio = gr.Slider(0, 0.75, 0.5, step=0.05, label="tome: ratio", info="share of tokens merged away")
                factor = gr.Slider(1, 4, 2, step=1, label="todo: factor", info="pooling factor a side", visible=False)
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0)
                    steps = gr.Number(20, label="Steps", precision=0)
                with gr.Row():
                    side = gr.Number(128, label="Size in pixels", precision=0)
                    repeat = gr.Number(1, label="Timed pairs", precision=0)
                button = gr.Button("Run both", variant="primary")
            with gr.Column(scale=2):
                slider = gr.ImageSlider(label="unpatched | patched", max_height=512)
                with gr.Row():
                    heat = gr.Image(label="Difference", height=240)
                    tokens = gr.Image(label="Tokens left out, over the run", height=240)
                figures = gr.Dataframe(headers=["", "unpatched", "patched"], label="Measured", interactive=False)
        method.change(
            lambda name: (gr.update(visible=name == "tome"), gr.update(visible=name == "todo")), method, [ratio, factor]
        )
        # One at a time: the pipeline is shared, and so are the cores that the times are measured on.
        button.click(
            run, [prompt, method, ratio, factor, seed, steps, side, repeat], [slider, heat, tokens, figures],
            concurrency_limit=1, api_name="compare",
        )  # fmt: skip
    return page


def _rows(found: Comparison) -> list[list[str]]:
    return [list(row) for row in comparison_rows(found)]
