"""The page of demo.py, made with Gradio: nothing is fetched from elsewhere, counted or shared."""

from __future__ import annotations

import hmac
from typing import Any

import fastapi
import gradio as gr

FONTS = ("ui-sans-serif", "system-ui", "sans-serif"), ("ui-monospace", "monospace")


def application(blocks: gr.Blocks, api_key: str | None = None) -> Any:
    """The page as an ASGI application. With an api_key, it is also the password, for any user name."""

    def is_known(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), api_key.encode())

    return gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        theme=gr.themes.Base(font=FONTS[0], font_mono=FONTS[1]),
        auth=None if api_key is None else is_known,
        auth_message="Any user name; the password is the API key.",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=True,
    )


def page(about: str) -> gr.Blocks:
    """The tabs."""
    with gr.Blocks(title="Llama", analytics_enabled=False) as blocks:
        gr.Markdown(about)
    return blocks
