"""Theme and style: system fonts, nothing from the network, light and dark from the same variables."""

from __future__ import annotations

import gradio as gr

CSS = """
.gradio-container { max-width: 1360px !important; margin: 0 auto; }
.tk-title h1 { font-size: 1.35rem; font-weight: 650; margin: 0; letter-spacing: -.01em; }
.tk-title p { margin: .15rem 0 0; color: var(--body-text-color-subdued); font-size: .92rem; }
.tk-state { display: flex; align-items: center; gap: .5rem; font-size: .9rem; color: var(--body-text-color-subdued);
  min-height: 1.6rem; overflow-wrap: anywhere; }
.tk-state i { width: .6rem; height: .6rem; border-radius: 50%; background: #9aa0a8; flex: none; }
.tk-ready i { background: #009e73; }
.tk-failed i { background: #d55e00; }
.tk-loading i { background: #e69f00; animation: tk-pulse 1s ease-in-out infinite alternate; }
@keyframes tk-pulse { to { opacity: .25; } }
.tk-progress p { margin: .4rem 0 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
.tk-bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.tk-bar b { display: block; height: 100%; background: var(--color-accent); border-radius: 4px;
  transition: width .25s linear; }
.tk-live { display: flex; gap: 12px; margin-top: .6rem; }
.tk-live figure { margin: 0; flex: 0 1 200px; }
.tk-live img { width: 100%; border-radius: 8px; display: block; }
.tk-live figcaption { font-size: .82rem; color: var(--body-text-color-subdued); text-align: center; }
.tk-note { margin: 0; font-size: .92rem; color: var(--body-text-color-subdued); }
.tk-verdict { font-size: 1.08rem; line-height: 1.5; }
.tk-scroll { overflow-x: auto; }
.tk-table { border-collapse: collapse; width: 100%; border: none !important;
  font-size: .92rem; font-variant-numeric: tabular-nums; }
.tk-table th, .tk-table td { padding: .42rem .6rem; border-width: 0 0 1px !important; white-space: nowrap;
  border-style: solid !important; border-color: var(--border-color-primary) !important;
  text-align: left; vertical-align: top; color: var(--body-text-color); }
.tk-table tbody th { font-weight: 500; color: var(--body-text-color-subdued); }
.tk-table em { font-style: normal; font-size: .8rem; border: 1px solid currentColor; border-radius: 4px;
  padding: 0 .3rem; }
.tk-notes { margin: .7rem 0 0; padding-left: 1.1rem; font-size: .85rem; color: var(--body-text-color-subdued); }
.tk-notes li { list-style: disc; margin: .15rem 0; }
.tk-legend { font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; }
.tk-legend ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; margin: 0; padding: 0; }
.tk-legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; margin-right: .35rem;
  border: 1px solid var(--body-text-color-subdued); vertical-align: -1px; }
.tk-plot { color: var(--body-text-color); }
.tk-plot svg { width: 100%; height: auto; max-width: 720px; display: block; margin: 0 auto; }
.tk-plot figcaption { font-size: .85rem; color: var(--body-text-color-subdued); text-align: center; }
.tk-slider img { width: 100%; object-fit: contain; }
.tk-side { border-left: 3px solid #0072b2; padding-left: 10px; gap: 8px !important; }
.tk-b { border-left-color: #d55e00; }
.tk-theme { flex: none !important; max-width: 2.6rem !important; min-width: 2.6rem !important; }
"""

# Outside of `css`, whose media rules gradio moves inside of the page's content.
HEAD = """<style>
.gradio-container .tk-table, .gradio-container .tk-table :is(thead, tbody, tr) { border: 0 !important; }
@media (max-width: 640px) {
  .gradio-container.gradio-container { padding: 0 !important; }
  .gradio-container .main.fillable.app { padding: 8px !important; }
  .gradio-container .tk-table :is(th, td) { padding: .38rem .4rem !important; font-size: .82rem !important; }
  .gradio-container .tk-table :is(th) { white-space: normal !important; min-width: 5.5rem; }
  .gradio-container .tk-scroll, .gradio-container .cm-editor { max-width: calc(100vw - 40px); }
  .gradio-container [data-testid="block-label"] { max-width: 70%; overflow: hidden; white-space: nowrap; }
  .gradio-container #history .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  .gradio-container .tk-live figure { flex: 1 1 0; }
}
</style>"""

TOGGLE = "() => { document.body.classList.toggle('dark'); }"


def theme() -> gr.themes.Base:
    """Gradio's own, with the fonts that the system has."""
    return gr.themes.Default(
        primary_hue="teal", neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
        radius_size="md",
    ).set(
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_800",
        button_large_text_size="*text_md",
    )  # fmt: skip
