"""Named endpoints for programs (`gradio_client`): the same runs as on the page, with plain data in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError
from diffusion_tokred.evaluation.compare import PROMPT
from diffusion_tokred.evaluation.results import plain

from . import export
from .errors import answered
from .limits import UNPATCHED, setup_of, side_of
from .models import QUEUE, usual_of
from .runs import Result, Stopped

if TYPE_CHECKING:
    from .page import Page


def add(page: Page) -> None:
    """The endpoints /compare, /explain, /methods, /models and /stop."""
    models = page.models
    usual = usual_of(models.names[0])

    def compare(
        request: gr.Request, prompt: Any, a: Any, b: Any, seed: Any, steps: Any, width: Any, height: Any, guidance: Any,
        repeat: Any, model: Any, protect: Any,
    ) -> Any:  # fmt: skip
        """Draw a prompt with two sides from the same noise, and time both.

        A side is text, such as "unpatched" or "tome:ratio=0.5,merge_ff", or an object {"method", "options", "policy"}.
        `protect`: a picture, white where tokens are computed in any case.

        Returns both pictures, a tokred.result/1, and the Python that makes the pictures again. Until then, a stream of
        {"state", "share", "left"}.
        """
        setup = setup_of(
            model or models.names[0], prompt, seed, steps, width, height, guidance, repeat, models.names, 4096
        )
        if protect is not None and not page.can_protect:
            raise ConfigError("this release of diffusion_tokred cannot protect regions")
        sides = side_of(UNPATCHED if a is None else a, protect), side_of("tome" if b is None else b, protect)
        found = None
        try:
            for told in page.drawing(request.session_hash or "", setup, sides):
                if isinstance(told, Result):
                    found = told
                else:
                    yield None, None, {"state": told.what, "share": told.share, "left": told.left}, ""
        except Stopped:
            raise ConfigError("stopped") from None
        assert found is not None  # the last that `drawing` gives
        yield found.a.picture, found.b.picture, found.to_dict(), export.code(found)

    def explain(side: Any, steps: Any, width: Any, height: Any, guidance: Any, model: Any) -> Any:
        """What a side would change and save, without running it: the plan step by step, FLOPs, bytes, warnings."""
        setup = setup_of(model or models.names[0], "-", 0, steps, width, height, guidance, 0, models.names, 4096)
        chosen, found = side_of("tome" if side is None else side), models.get(setup.model)
        if chosen.config is None:
            raise ConfigError("the unpatched pipeline changes nothing: name a method")
        explanation = tokred.explain(
            found.pipe, chosen.config, policy=chosen.policy, width=setup.width, height=setup.height,
            num_inference_steps=setup.steps, guidance=setup.guidance > 1, text_tokens=found.text_tokens,
        )  # fmt: skip
        return plain(explanation.to_dict())

    def methods(model: Any) -> Any:
        """The methods, with their options, and why not on this model."""
        found = models.get(model or models.names[0])
        return {
            info.name: {
                "paper": info.paper,
                "options": {k: v for k, v in info.config().to_dict().items() if not k.startswith("_")},
                "refused": found.refused.get(info.name),
            }
            for info in tokred.methods()
        }

    def list_models() -> Any:
        """The models that may be chosen, and their state."""
        return {name: dict(zip(("state", "text"), models.state(name), strict=True)) for name in models.names}

    def stop(request: gr.Request) -> Any:
        """Stop what this session runs, within one step."""
        return {"stopped": page.stops.stop(request.session_hash or "")}

    width, height = usual["size"]
    with gr.Group(visible=False):
        prompt = gr.Textbox(PROMPT, label="prompt")
        a, b = gr.JSON(label="a"), gr.JSON(label="b")
        seed, steps = gr.Number(0, label="seed"), gr.Number(usual["steps"], label="steps")
        w, h = gr.Number(width, label="width"), gr.Number(height, label="height")
        guidance, repeat = gr.Number(usual["guidance"], label="guidance"), gr.Number(1, label="repeat")
        model = gr.Textbox(models.names[0], label="model")
        protect = gr.File(label="protect", type="filepath")
        pictures = [gr.Image(format="png", label=f"picture_{letter}") for letter in "ab"]
        figures, python, go = gr.JSON(label="result"), gr.Textbox(label="python"), gr.Button()
    heavy: dict[str, Any] = dict(concurrency_limit=1, concurrency_id=QUEUE)
    go.click(
        answered(compare), [prompt, a, b, seed, steps, w, h, guidance, repeat, model, protect],
        [*pictures, figures, python], api_name="compare", **heavy,
    )  # fmt: skip
    go.click(answered(explain), [b, steps, w, h, guidance, model], figures, api_name="explain", concurrency_limit=2)
    go.click(answered(methods), model, figures, api_name="methods", concurrency_limit=2)
    go.click(answered(list_models), None, figures, api_name="models", concurrency_limit=2)
    go.click(answered(stop), None, figures, api_name="stop", concurrency_limit=4)
