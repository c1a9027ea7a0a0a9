"""An OpenAI-style server for one model: chat completions about pictures and videos, pruned."""

from __future__ import annotations

import asyncio
import functools
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vtprune import __version__
from vtprune.errors import PresetError, VtpruneError
from vtprune.inference.generate import Generation
from vtprune.preset import Preset, load_preset, override, preset_names
from vtprune.serving.messages import read_messages
from vtprune.serving.queue import Job, JobQueue, QueueFullError, QueueSettings, StoppingError
from vtprune.serving.requests import Request as Question
from vtprune.serving.uploads import UploadRules, Uploads

if TYPE_CHECKING:
    from vtprune.inference.report import Report
    from vtprune.models.loading import Loaded

POLL = 0.25
"""Seconds between two looks whether a client is still there."""
PARTS = ("media", "preprocess", "vision", "select", "prefill", "decode", "total")
LONGEST_ANSWER = 4096


@dataclass(frozen=True)
class ServerSettings:
    """How a server answers.

    Args:
        name: of the model, as clients give it.
        preset: of requests that name none.
        generation: likewise.
        key: that clients have to give; "" for none.
        most_bytes: of one request's body.
    """

    name: str
    preset: Preset
    generation: Generation = field(default_factory=Generation)
    queue: QueueSettings = field(default_factory=QueueSettings)
    uploads: UploadRules = field(default_factory=UploadRules)
    key: str = ""
    most_bytes: int = 512 << 20


# -- what clients send -----------------------------------------------------------------------------


class PruningOptions(BaseModel):
    """The field `vtprune` of a request."""

    model_config = ConfigDict(extra="forbid")

    keep: float | dict[str, float] | None = None
    preset: str | None = None
    method: str | None = None
    seed: int | None = Field(default=None, ge=0)
    draw: bool = False


class ChatRequest(BaseModel):
    """A chat completion as clients ask for it; fields that are not known are left alone."""

    model_config = ConfigDict(extra="ignore")

    messages: list[Any]
    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=LONGEST_ANSWER)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=LONGEST_ANSWER)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    n: int = Field(default=1, ge=1, le=1)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    vtprune: PruningOptions = PruningOptions()


class LimitedBody:
    """Refuses bodies above a limit while they come, whatever their header says."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most_bytes:
                raise HTTPException(413, f"the request is over {self.most_bytes:,} bytes")
            return message

        await self.app(scope, limited, send)


# -- counting --------------------------------------------------------------------------------------


class Metrics:
    """What a server counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make = functools.partial(Counter, registry=self.registry)
        self.requests = make("vtprune_requests", "Requests by status", ["status"])
        self.tokens = make("vtprune_visual_tokens", "Visual tokens of prompts", ["which"])
        self.answer = make("vtprune_answer_tokens", "Tokens of answers")
        self.seconds = Histogram(
            "vtprune_seconds", "Seconds by part of an answer", ["part"], registry=self.registry
        )
        self.waiting = Gauge("vtprune_waiting", "Requests that wait", registry=self.registry)
        self.running = Gauge("vtprune_running", "Requests in the batch that runs",
                             registry=self.registry)  # fmt: skip

    def take(self, report: Report) -> None:
        """Count an answer."""
        self.tokens.labels("before").inc(report.tokens.visual)
        self.tokens.labels("kept").inc(report.tokens.kept_after)
        self.answer.inc(report.tokens.answer)
        for part in PARTS:
            self.seconds.labels(part).observe(getattr(report.seconds, part) or 0.0)


# -- the app ---------------------------------------------------------------------------------------


def create_app(loaded: Loaded, settings: ServerSettings) -> FastAPI:
    """Return the app of a server, which answers from its start-up to its shutdown."""
    server = Server(loaded, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            await asyncio.to_thread(server.stop)

    app = FastAPI(title="vtprune", version=__version__, lifespan=lifespan, docs_url=None,
                  redoc_url=None, openapi_url=None)  # fmt: skip
    app.add_middleware(LimitedBody, most_bytes=settings.most_bytes)
    app.add_api_route("/", server.page, methods=["GET"], response_class=HTMLResponse)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.show_metrics, methods=["GET"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/files", server.upload, methods=["POST"])
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], response_model=None)
    app.exception_handler(VtpruneError)(server.on_error)
    app.exception_handler(RequestValidationError)(on_invalid)
    app.exception_handler(HTTPException)(on_http)
    app.state.server = server
    return app


def _error(status: int, message: str, hint: str = "") -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"message": message + (f" ({hint})" if hint else ""), "type": kind, "code": status}
    return JSONResponse({"error": body}, status)


async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Say which fields of a body are wrong."""
    faults = [
        f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}"
        for fault in error.errors()[:5]
    ]
    return _error(400, VtpruneError("; ".join(faults)).message)


async def on_http(_: Request, error: HTTPException) -> JSONResponse:
    """Give the framework's own errors the same form."""
    return _error(error.status_code, str(error.detail))


class Server:
    """One model behind its routes."""

    def __init__(self, loaded: Loaded, settings: ServerSettings) -> None:
        self.loaded, self.settings = loaded, settings
        self.metrics = Metrics()
        self.created = int(time.time())
        self.folder = Path()
        self.queue: JobQueue | None = None

    def start(self) -> None:
        """Make the folder for what clients send, and the queue."""
        self.folder = Path(tempfile.mkdtemp(prefix="vtprune-serve-"))
        self.uploads = Uploads(self.folder, self.settings.uploads)
        self.queue = JobQueue(self.loaded, self.settings.queue, self.metrics.take)

    def stop(self) -> None:
        """Finish what runs, and remove what clients sent."""
        if self.queue is not None:
            self.queue.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- small routes ------------------------------------------------------------------------------

    async def page(self) -> HTMLResponse:
        """Return the page to drop a clip and ask."""
        source = resources.files("vtprune.serving").joinpath("page.html")
        return HTMLResponse(source.read_text(encoding="utf-8"))

    async def health(self) -> JSONResponse:
        """Say whether the model's thread runs."""
        alive = self.queue is not None and self.queue.thread.is_alive()
        stopping = self.queue is not None and self.queue.stopping
        status = "stopping" if stopping else "ok" if alive else "dead"
        return JSONResponse({"status": status, "version": __version__}, 200 if alive else 503)

    async def show_metrics(self) -> Response:
        """Return the counts for Prometheus."""
        if self.queue is not None:
            self.metrics.waiting.set(self.queue.waiting)
            self.metrics.running.set(self.queue.running)
        return Response(generate_latest(self.metrics.registry), media_type="text/plain")

    async def models(self, request: Request) -> JSONResponse:
        """List the one model."""
        self.check_key(request)
        model = {"id": self.settings.name, "object": "model", "created": self.created,
                 "owned_by": "vtprune"}  # fmt: skip
        return JSONResponse({"object": "list", "data": [model]})

    async def upload(self, request: Request, file: UploadFile) -> JSONResponse:
        """Keep a file until the server ends; return its id."""
        self.check_key(request)
        data = await file.read(self.settings.uploads.most_bytes + 1)
        name = self.uploads.upload(data)
        return JSONResponse(
            {"id": name, "object": "file", "bytes": len(data), "created_at": int(time.time()),
             "filename": Path(file.filename or "file").name, "purpose": "vision"}
        )  # fmt: skip

    def check_key(self, request: Request) -> None:
        """Refuse a client without the key.

        Raises:
            HTTPException: 401.
        """
        if not self.settings.key:
            return
        given = request.headers.get("authorization", "")
        expected = f"Bearer {self.settings.key}"
        if not secrets.compare_digest(given.encode(), expected.encode()):
            raise HTTPException(401, "the API key is missing or wrong")

    async def on_error(self, request: Request, error: Exception) -> JSONResponse:
        """Turn an error of this project into its status."""
        assert isinstance(error, VtpruneError)
        status = 500 if error.message.startswith("internal") else 400
        if isinstance(error, QueueFullError):
            status = 429
        elif isinstance(error, StoppingError):
            status = 503
        self.metrics.requests.labels(str(status)).inc()
        return _error(status, error.message, error.hint)

    # -- chat --------------------------------------------------------------------------------------

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation, at once or piece by piece."""
        self.check_key(request)
        if body.model not in (None, "", self.settings.name):
            raise HTTPException(404, f"no model {body.model!r}; this one is {self.settings.name!r}")
        assert self.queue is not None
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=self.folder))
        try:
            job = await asyncio.to_thread(self.make_job, body, folder)
            pieces: asyncio.Queue[str] = asyncio.Queue()
            if body.stream:
                loop = asyncio.get_running_loop()
                put = pieces.put_nowait
                job.listener = lambda text: _call_in(loop, put, text)
            self.queue.submit(job)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        result = asyncio.wrap_future(job.result)
        if body.stream:
            stream = self.stream(body, job, result, pieces, folder)
            return StreamingResponse(stream, media_type="text/event-stream")
        try:
            report = await self.wait(request, job, result)
        finally:
            job.gone.set()
            shutil.rmtree(folder, ignore_errors=True)
        if report is None:
            return Response(status_code=499)
        self.metrics.requests.labels("200").inc()
        answer = {"role": "assistant", "content": report.answer}
        choice = {"index": 0, "message": answer, "finish_reason": finish_reason(report, job)}
        values = self.head("chat.completion") | {"choices": [choice], "usage": usage_of(report)}
        if body.vtprune.draw:
            html = await asyncio.to_thread(draw_page, report, self.settings.name)
            values["vtprune"] = {"html": html}
        return JSONResponse(values)

    def make_job(self, body: ChatRequest, folder: Path) -> Job:
        """Return the job of a request, its media in `folder`.

        Raises:
            VtpruneError: what is wrong with it.
        """
        options, settings = body.vtprune, self.settings

        def resolve(kind: str, reference: str) -> str:
            return self.uploads.resolve(reference, folder)

        files, turns = read_messages(body.messages, resolve)
        if not files:
            raise VtpruneError(
                "messages: no picture and no video", "send one as image_url or video_url"
            )
        preset = settings.preset
        if options.preset is not None:
            if options.preset not in preset_names():  # clients name no files of the server
                raise PresetError(f"no preset {options.preset!r}", ", ".join(preset_names()))
            preset = load_preset(options.preset)
        preset = override(preset, keep=options.keep, method=options.method, seed=options.seed)
        usual = settings.generation
        generation = replace(
            usual,
            max_new_tokens=body.max_completion_tokens or body.max_tokens or usual.max_new_tokens,
            temperature=usual.temperature if body.temperature is None else body.temperature,
            top_p=usual.top_p if body.top_p is None else body.top_p,
            seed=usual.seed if body.seed is None else body.seed,
        )
        question = Question(tuple(files), tuple(turns), preset)
        return Job(question, generation, thumbnails=options.draw)

    async def wait(
        self, request: Request, job: Job, result: asyncio.Future[Report]
    ) -> Report | None:
        """Wait for an answer; None where the client has gone."""
        while True:
            done, _ = await asyncio.wait([result], timeout=POLL)
            if done:
                return None if result.cancelled() else result.result()
            if await request.is_disconnected():
                job.gone.set()
                return None

    async def stream(
        self,
        body: ChatRequest,
        job: Job,
        result: asyncio.Future[Report],
        pieces: asyncio.Queue[str],
        folder: Path,
    ) -> AsyncIterator[str]:
        """Yield an answer's events as its pieces come; a client that hangs up ends it."""
        head = self.head("chat.completion.chunk")

        def event(delta: Mapping[str, object], reason: str | None = None, **more: object) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return f"data: {json.dumps({**head, 'choices': [choice], **more})}\n\n"

        try:
            yield event({"role": "assistant", "content": ""})
            while not (result.done() and pieces.empty()):
                getting = asyncio.ensure_future(pieces.get())
                first: list[asyncio.Future[Any]] = [getting, result]
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    yield event({"content": getting.result()})
                    continue
                getting.cancel()
                with suppress(asyncio.CancelledError):
                    await getting
                await asyncio.sleep(0)  # pieces that were put before the result
            report = result.result()
            self.metrics.requests.labels("200").inc()
            yield event({}, finish_reason(report, job))
            if (body.stream_options or {}).get("include_usage"):
                values = {**head, "choices": [], "usage": usage_of(report)}
                yield f"data: {json.dumps(values)}\n\n"
            yield "data: [DONE]\n\n"
        except VtpruneError as error:
            response = await self.on_error(None, error)  # type: ignore[arg-type]
            yield f"data: {bytes(response.body).decode()}\n\n"
        finally:
            job.gone.set()
            shutil.rmtree(folder, ignore_errors=True)

    def head(self, kind: str) -> dict[str, object]:
        """Return the fields that every answer begins with."""
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.settings.name,
        }


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[[str], None], text: str) -> None:
    with suppress(RuntimeError):  # the loop has ended: nobody reads
        loop.call_soon_threadsafe(call, text)


def finish_reason(report: Report, job: Job) -> str:
    """Return why an answer ended, in OpenAI's words."""
    return "length" if report.tokens.answer >= job.generation.max_new_tokens else "stop"


def usage_of(report: Report) -> dict[str, object]:
    """Return what an answer used; prompt tokens are those before pruning."""
    tokens = report.tokens
    prompt = tokens.visual + tokens.text
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens.answer,
        "total_tokens": prompt + tokens.answer,
        "visual_tokens": tokens.visual,
        "visual_tokens_kept": tokens.kept_after,
        "keep_mean": tokens.keep_mean,
    }


def draw_page(report: Report, name: str) -> str:
    """Return the HTML page of what was kept."""
    from vtprune.pictures.drawing import draw

    named = replace(report, model=replace(report.model, name=name))  # not a path of the server
    return draw(named).html().decode()
