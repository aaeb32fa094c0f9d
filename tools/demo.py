#!/usr/bin/env python3
"""A page in the browser to try models on: paste a dialogue, choose runs, compare their summaries and settings.

    pip install -c constraints.txt -e '.[demo]'
    python tools/demo.py RUN [RUN ...] [--port 7860]

It listens on this machine only (127.0.0.1), makes no public link, sends nothing anywhere and asks the network for nothing.
RUN is a run folder, a checkpoint, or any model or adapter folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402

if TYPE_CHECKING:
    from engine.prediction.predictor import Predictor

EXAMPLE = (
    "#Person1#: 내일 회의가 몇 시였죠?\n#Person2#: 오후 두 시예요. 자료는 제가 가져갈게요.\n"
    "#Person1#: 그럼 저는 회의실을 예약할게요."
)
LONGEST = 20_000  # characters of a dialogue; a model reads some thousand
# The page's files all come from this program; whatever else a library's page asks for is not fetched.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'self'"


def load(folders: Sequence[Path]) -> dict[str, Predictor]:
    """Predictors under names that tell them apart. Raises: EngineError E2.77 for a folder named twice, E4 for no model."""
    from engine.prediction.predictor import Predictor

    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise EngineError("E2.77", "the same run folder is named twice", ", ".join(map(str, folders)))
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = [str(place) for place in places]
    return {name: Predictor.from_run(place) for name, place in zip(names, places, strict=True)}


def summaries(
    predictors: dict[str, Predictor], dialogue: str, chosen: Sequence[str], beams: float, longest: float, penalty: float
) -> list[str]:
    """One text for each run: its summary, what was wrong, or nothing where it was not chosen."""
    dialogue = dialogue.strip()
    if not dialogue or len(dialogue) > LONGEST:
        told = "대화를 붙여 넣으세요." if not dialogue else f"대화가 너무 깁니다({LONGEST:,}자까지)."
        return [told if name in chosen else "" for name in predictors]
    settings: dict[str, Any] = {
        "num_beams": int(beams),
        "max_new_tokens": int(longest),
        "length_penalty": float(penalty),
    }
    texts = []
    for name, predictor in predictors.items():
        try:
            texts.append(predictor.predict_single(dialogue, **settings) if name in chosen else "")
        except EngineError as error:
            texts.append(f"요약하지 못했습니다: {error}")
    return texts


def gradio_without_telemetry() -> Any:
    """Raises: EngineError E2.78 where Gradio is not installed."""
    import pages

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which would ask for the newest version
    return pages.needed("gradio", "demo", "the demo")


def page(predictors: dict[str, Predictor]) -> Any:
    """The page as Gradio's blocks."""
    gradio = gradio_without_telemetry()
    head = next(iter(predictors.values()))
    first = head.generation  # the page begins with its settings, and bounds must hold them
    most = first.max_new_tokens or head.bundle.lengths["max_target_length"]
    with gradio.Blocks(title="대화 요약", analytics_enabled=False) as blocks:
        about = "대화를 붙여 넣고 모델을 고르면, 고른 모델들의 요약을 나란히 보여 줍니다."
        shared = "빔 수, 최대 길이, 길이 벌점은 모든 모델에 함께 쓰이고, 처음 값은 첫 모델의 설정입니다."
        gradio.Markdown(f"# 대화 요약\n{about}\n{shared}")
        dialogue = gradio.Textbox(
            EXAMPLE, label="대화", info="한 줄에 한 발화씩, 말하는 사람의 이름으로 시작합니다.", lines=8, max_lines=20
        )
        chosen = gradio.CheckboxGroup(list(predictors), value=list(predictors), label="모델")
        with gradio.Row():
            limit = max(10, first.num_beams)
            beams = gradio.Slider(1, limit, first.num_beams, step=1, label="빔 수", info="num_beams")
            longest = gradio.Slider(1, max(256, most), most, step=1, label="최대 길이(토큰)", info="max_new_tokens")
            low, high = min(0, first.length_penalty), max(3, first.length_penalty)
            penalty = gradio.Slider(low, high, first.length_penalty, step=0.1, label="길이 벌점", info="length_penalty")
        button = gradio.Button("요약하기", variant="primary")
        with gradio.Row():
            results = [gradio.Textbox(label=name, lines=4, interactive=False) for name in predictors]
        button.click(
            lambda *values: one_or_all(summaries(predictors, *values)),
            [dialogue, chosen, beams, longest, penalty],
            results,
            api_visibility="private",
        )
    return blocks


def one_or_all(texts: list[str]) -> Any:
    """As Gradio takes them: a list for several boxes, the text itself for one."""
    return texts if len(texts) > 1 else texts[0]


def serve(predictors: dict[str, Predictor], port: int | None, *, wait: bool = True) -> str:
    """Start the page; returns its address where it does not wait. Raises: EngineError E2.136 for a port that is taken."""
    gradio = gradio_without_telemetry()
    from starlette.middleware import Middleware

    blocks = page(predictors)
    fonts = ("ui-sans-serif", "system-ui", "sans-serif")
    try:
        _, address, _ = blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            prevent_thread_lock=True,
            theme=gradio.themes.Default(font=fonts, font_mono=("ui-monospace", "monospace")),
            app_kwargs={"middleware": [Middleware(OwnFilesOnly)]},
        )
    except OSError as error:
        what = "the port cannot be used"
        raise EngineError("E2.136", what, f"127.0.0.1:{port or ''}", "choose another --port") from error
    if wait:
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return address


class OwnFilesOnly:
    """ASGI middleware: every answer tells the browser to fetch from this program only."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders or model folders")
    parser.add_argument("--port", type=int, help="port on this machine (default: the first free one from 7860 on)")
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parser.parse_args(arguments)
    gradio_without_telemetry()  # what is missing is said before models are loaded
    serve(load(options.runs), options.port)
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
