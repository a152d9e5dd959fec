"""The Gradio page: a picture and a question in, the streamed answer and its speed out; nothing leaves the machine."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from switchkd.serve import Answer, ConversationError, Engine, PictureError, PromptError

from .examples import Example

TITLE = "Ask a picture"
_SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Inter", "Noto Sans", "sans-serif")
_FIXED_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    radius_size="lg",
    # Fonts of the visitor's own system: Gradio's default asks a server for files, a Google font asks Google.
    font=_SYSTEM_FONTS,
    font_mono=_FIXED_FONTS,
).set(
    body_background_fill="*neutral_50",
    # Soft's pale greys and mint labels are hard to read: these keep a contrast of 4.5 and more in both modes.
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    block_title_padding="0",
    block_label_border_width="0",
    block_label_shadow="none",
    block_shadow="none",
    block_border_width="1px",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
)

CSS = """
.gradio-container { width: 100%; max-width: 1080px !important; margin: 0 auto !important; }
#head .html-container, #speed .html-container { padding: 0; }
#head h1 { font-size: 2rem; line-height: 1.15; letter-spacing: -.02em; margin: 1rem 0 .4rem; }
#head p { font-size: 1.05rem; margin: 0; color: var(--body-text-color-subdued); max-width: 46rem; }
#head ul { display: flex; flex-wrap: wrap; gap: .4rem; margin: .9rem 0 .25rem; padding: 0; list-style: none; }
#head li { font-size: .82rem; line-height: 1.2; padding: .35rem .7rem; margin: 0; border-radius: 999px;
  color: var(--body-text-color-subdued); background: var(--background-fill-primary);
  border: 1px solid var(--border-color-primary); }
#head li b { font-weight: 600; color: var(--body-text-color); }
#picture .image-frame, #picture .image-frame img { width: 100%; height: 100%; object-fit: contain; }
#answer textarea { font-size: 1.25rem; line-height: 1.5; }
#speed dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; margin: 0; }
#speed dl > div { padding: .75rem .9rem; border-radius: var(--block-radius); background: var(--background-fill-primary);
  border: 1px solid var(--border-color-primary); }
#speed dt { font-size: .8rem; color: var(--body-text-color-subdued); }
#speed dd { font-size: 1.3rem; font-weight: 600; margin: .15rem 0 0; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
#speed dd small { font-size: .75rem; font-weight: 400; color: var(--body-text-color-subdued); }
#examples td { padding: .3rem .6rem; text-align: left; }
#examples td .container { width: 44px; height: 44px; }
@media (max-width: 640px) {
  #head h1 { font-size: 1.6rem; margin-top: .25rem; }
  #speed dl { gap: .4rem; }
  #speed dl > div { padding: .6rem; }
  #speed dd { font-size: 1.05rem; }
}
"""


def build_app(engine: Engine, uploads: Path, examples: Sequence[Example] = ()) -> gr.Blocks:
    """Lay out the page for one engine, to be opened by `launch`.

    Pictures are taken from the folder `uploads` alone, where Gradio puts what it is sent.
    """

    def ask(picture: str | None, question: str | None) -> Iterator[tuple[str, str]]:
        """Answer a question about a picture; yields the answer so far and its speed as HTML."""
        if picture is None:
            raise _error("Drop in a picture first.")
        try:
            stream = engine.stream(question or "", [picture])
        except (PictureError, ConversationError, PromptError) as error:
            # The upload's folder means nothing to the person who dropped the file.
            raise _error(str(error).replace(picture, Path(picture).name)) from error
        yield "", speed_html()
        for _ in stream:
            yield stream.answer.text, speed_html(stream.answer)
        yield stream.answer.text, speed_html(stream.answer)

    app = gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True)
    with app:
        gr.HTML(head_html(engine), elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                picture = _picture_input()
                question = gr.Textbox(label="Question", placeholder="What is in the picture?", max_lines=4)
                button = gr.Button("Ask", variant="primary", size="lg")
            with gr.Column(min_width=300):
                answer = gr.Textbox(label="Answer", lines=5, interactive=False, elem_id="answer")
                speed = gr.HTML(speed_html(), elem_id="speed")
                if examples:
                    gr.Examples(
                        [[str(e.picture), e.question] for e in examples],
                        [picture, question],
                        label="Try one",
                        elem_id="examples",
                    )
        gr.on(
            [button.click, question.submit],
            ask,
            [picture, question],
            [answer, speed],
            api_name="ask",
            show_progress="minimal",
            show_progress_on=answer,
        )
    _take_only_uploads(app, picture, uploads)
    return app


def launch(app: gr.Blocks, host: str, port: int, examples: Sequence[Path]) -> str:
    """Open the page to visitors, in threads of its own; returns its address. `examples` are folders of pictures."""
    _, url, _ = app.launch(
        server_name=host,
        server_port=port,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        theme=THEME,
        css=CSS,
        allowed_paths=[str(folder.resolve()) for folder in examples],
        footer_links=[],
        run_history=False,
        share=False,
        ssr_mode=False,
        mcp_server=False,
    )
    return str(url)


def _take_only_uploads(app: gr.Blocks, picture: gr.Image, uploads: Path) -> None:
    """Refuse any other picture in one and the same way, before Gradio looks at it.

    Gradio checks only payloads that say of themselves that they are files, fetches addresses, and its errors tell which
    files there are.
    """
    preprocess = app.preprocess_data

    async def check_first(block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        checked = [
            _upload(value, uploads) if block is picture else value
            for block, value in zip(block_fn.inputs, inputs, strict=False)
        ]
        return await preprocess(block_fn, checked, *args, **kwargs)

    app.preprocess_data = check_first  # type: ignore[method-assign]


def _upload(payload: Any, uploads: Path) -> dict[str, Any] | None:
    """What Gradio is to take for an uploaded picture, None without one; raises its error for everything else."""
    if payload is None:
        return None
    name = payload.get("path") if isinstance(payload, dict) else None
    try:
        path = Path(name).resolve(strict=True) if isinstance(name, str) else None
    except (OSError, ValueError):  # ValueError: a name with a NUL
        path = None
    if path is None or not path.is_relative_to(uploads) or not path.is_file():
        raise _error("Only an uploaded picture is taken.")
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def _picture_input() -> gr.Image:
    picture = gr.Image(
        label="Picture",
        sources=["upload", "clipboard"],
        height=340,
        buttons=["fullscreen"],
        alt_text="The picture to ask about",
        elem_id="picture",
    )

    def keep_path(payload: Any) -> str | None:
        return str(payload.path) if payload else None

    # Gradio would open the file itself, with other rules than ours and a stack trace where it is broken. On the
    # object and not in a subclass: Gradio writes a .pyi file beside the source of every class of components.
    picture.preprocess = keep_path  # type: ignore[method-assign]
    return picture


def _error(message: str) -> gr.Error:
    return gr.Error(html.escape(message), print_exception=False)


def head_html(engine: Engine) -> str:
    """Say what the page is, which model answers, how big it is and in which precision."""
    bundle = engine.bundle
    graphs = {graph.name: graph.file for graph in bundle.manifest.graphs if graph.precision == bundle.precision}
    megabytes = {name: bundle.manifest.files[file].bytes / 1e6 for name, file in graphs.items()}
    sizes = ", ".join(f"{name.split('_')[0]} {_megabytes(size)}" for name, size in megabytes.items())
    facts = [
        ("model", bundle.path.resolve().name),
        ("precision", bundle.precision),
        ("size", f"{_megabytes(sum(megabytes.values()))} MB ({sizes})"),
        ("a picture", f"{bundle.model.tokens_per_picture} tokens"),
    ]
    card = "".join(f"<li>{name} <b>{html.escape(value)}</b></li>" for name, value in facts)
    return f"""<header><h1>{TITLE}</h1>
<p>Drop in a picture and ask about it: a small vision-language model answers on this machine's processor, and neither
picture nor question leaves it.</p><ul aria-label="The model">{card}</ul></header>"""


def speed_html(answer: Answer | None = None) -> str:
    """Show time to first token, tokens a second and the time to encode the picture, or dashes before an answer."""
    first = encode = rate = "–"
    if answer is not None:
        first = _milliseconds(answer.seconds.first_token)
        encode = _milliseconds(answer.seconds.pictures)
        rate = f"{answer.tokens_per_second:.0f} <small>tokens/s</small>" if answer.tokens_per_second else "–"
    tiles = (("First token", first), ("Writing", rate), ("Encoding", encode))
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles) + "</dl>"


def _megabytes(size: float) -> str:
    return f"{size:.1f}" if size >= 1 else f"{size:.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} <small>ms</small>" if seconds < 10 else f"{seconds:.1f} <small>s</small>"
