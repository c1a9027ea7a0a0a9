"""An OpenAI-style server for one model: chat completions about pictures and videos, pruned."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Scope

from vtprune import __version__
from vtprune.errors import MediaError, VtpruneError, quote
from vtprune.inference.generate import Generation
from vtprune.inference.out_of_memory import OutOfMemoryError
from vtprune.preset import Preset
from vtprune.serving.chat import AnswerObjects, ChatRequest, make_job, read_request
from vtprune.serving.guard import HUNG_UP, Bodies, Guard, GuardRules, error_response
from vtprune.serving.metrics import CONTENT_TYPE, Metrics
from vtprune.serving.queue import Job, JobQueue, QueueFullError, QueueSettings, StoppingError
from vtprune.serving.uploads import PREFIX, Upload, UploadRules, Uploads, UploadsFullError

if TYPE_CHECKING:
    from vtprune.inference.report import Report
    from vtprune.models.loading import Loaded

T = TypeVar("T")
POLL = 0.25
"""Seconds between two looks whether a client is still there."""
PATIENCE = 10.0
"""Seconds after which a stream begins though nothing is to be said, and between signs of life."""
THREADS = 32
"""That read requests, fetch media and draw; one for every request that may do so at once."""
PAGE_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (QueueFullError, 429),
    (UploadsFullError, 429),
    (StoppingError, 503),
    (OutOfMemoryError, 413),
    (VtpruneError, 400),
    (OSError, 507),
)
"""The status of each kind of error."""


@dataclass(frozen=True)
class ServerSettings:
    """How a server answers.

    Args:
        name: of the model, as clients give it.
        preset: of requests that name none.
        generation: likewise.
        folder: for what clients send, removed at the end; None: one is made.
        on_fault: gets a line about what went wrong here and not with the client.
    """

    name: str
    preset: Preset
    generation: Generation = field(default_factory=Generation)
    queue: QueueSettings = field(default_factory=QueueSettings)
    uploads: UploadRules = field(default_factory=UploadRules)
    guard: GuardRules = field(default_factory=GuardRules)
    folder: Path | None = None
    on_fault: Callable[[str], None] = lambda line: None


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
    app.add_middleware(Guard, rules=settings.guard, count=server.count)
    for path, method, answer in (
        ("/", "GET", server.page),
        ("/health", "GET", server.health),
        ("/metrics", "GET", server.show_metrics),
        ("/v1/models", "GET", server.models),
        ("/v1/models/{name:path}", "GET", server.model),
        ("/v1/files", "POST", server.upload),
        ("/v1/files/{name}", "GET", server.uploaded),
        ("/v1/files/{name}", "DELETE", server.delete_upload),
        ("/v1/chat/completions", "POST", server.chat),
    ):
        methods = [method, "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, answer, methods=methods, response_model=None)
    app.exception_handler(HTTPException)(on_http)
    for kind in (VtpruneError, OSError, Exception):
        app.exception_handler(kind)(server.on_error)
    app.state.server = server
    return app


async def on_http(request: Request, error: HTTPException) -> JSONResponse:
    """Give the framework's own errors OpenAI's form."""
    message = str(error.detail)
    if error.status_code in (404, 405) and message in ("Not Found", "Method Not Allowed"):
        message = f"{request.method} {quote(request.url.path)}: {message.lower()}"
        hint = "this server has GET /v1/models, POST /v1/files and POST /v1/chat/completions"
        response = error_response(error.status_code, message, hint)
    else:
        response = error_response(error.status_code, message)
    response.headers.update(error.headers or {})
    return response


class Server:
    """One model behind its routes."""

    def __init__(self, loaded: Loaded, settings: ServerSettings) -> None:
        self.loaded, self.settings = loaded, settings
        self.metrics = Metrics()
        self.bodies = Bodies(settings.guard)
        self.created = int(time.time())

    def start(self) -> None:
        """Make the folder for what clients send, and the queue."""
        self.folder = self.settings.folder or Path(tempfile.mkdtemp(prefix=PREFIX))
        self.uploads = Uploads(self.folder, self.settings.uploads)
        self.pool = ThreadPoolExecutor(THREADS, "requests")
        self.queue = JobQueue(self.loaded, self.settings.queue, self.metrics.count_answer)

    def stop(self) -> None:
        """Finish what runs, and remove what clients sent."""
        self.queue.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do some work without keeping other requests waiting."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    def count(self, scope: Scope, status: int) -> None:
        """Count a request by its route; of what is none, paths are not told apart."""
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.requests.labels(route, str(status)).inc()

    # -- small routes ------------------------------------------------------------------------------

    async def page(self) -> HTMLResponse:
        """Return the page to drop a clip and ask."""
        source = resources.files("vtprune.serving").joinpath("page.html")
        return HTMLResponse(source.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def health(self) -> JSONResponse:
        """Say whether the server takes requests."""
        alive, stopping = self.queue.thread.is_alive(), self.queue.stopping
        status = "stopping" if stopping else "ok" if alive else "dead"
        ready = alive and not stopping
        return JSONResponse({"status": status, "version": __version__}, 200 if ready else 503)

    async def show_metrics(self) -> Response:
        """Return the counts for Prometheus."""
        text = self.metrics.text(self.queue, self.uploads.space)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def models(self) -> JSONResponse:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self.describe_model()]})

    async def model(self, name: str) -> JSONResponse:
        """Return the model, where it is asked for by its name."""
        self.check_model(name)
        return JSONResponse(self.describe_model())

    def describe_model(self) -> dict[str, object]:
        """Return the model as OpenAI's clients list it."""
        return {"id": self.settings.name, "object": "model", "created": self.created,
                "owned_by": "vtprune"}  # fmt: skip

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            HTTPException: 404.
        """
        if name not in (None, "", self.settings.name):
            raise HTTPException(404, f"no model {quote(name)}; this is {self.settings.name!r}")

    # -- uploads -----------------------------------------------------------------------------------

    async def upload(self, request: Request) -> JSONResponse:
        """Keep a file for some time; return its id."""
        async with (
            self.bodies.limited(request) as limited,
            limited.form(max_files=1, max_fields=16) as form,
        ):
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "file: no file in the form (multipart/form-data)")
            keep = partial(self.uploads.upload, file.file, file.size or 0)
            upload = await self.in_thread(keep)
        return JSONResponse(describe_upload(upload))

    async def uploaded(self, name: str) -> JSONResponse:
        """Return what is known of an upload."""
        return JSONResponse(describe_upload(self.find_upload(name)))

    async def delete_upload(self, name: str) -> JSONResponse:
        """Remove an upload; requests that named it before have it still."""
        self.uploads.delete(self.find_upload(name).name)
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    def find_upload(self, name: str) -> Upload:
        """Return an upload.

        Raises:
            HTTPException: 404.
        """
        try:
            return self.uploads.uploaded(name)
        except MediaError as error:
            raise HTTPException(404, error.message) from error

    # -- chat --------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, at once or piece by piece."""
        self.queue.check_room()  # before a body is read in vain
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, "the request is no application/json")
        async with self.bodies.limited(request) as limited:
            data = await limited.body()
            body = await self.in_thread(partial(read_request, data))
            del data
            self.check_model(body.model)
            job = await self.take(body)
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        if body.stream:
            loop = asyncio.get_running_loop()
            job.listener = partial(_put, loop, pieces)
        self.queue.submit(job)
        result = asyncio.wrap_future(job.result)
        try:
            if not await self.wait(request, result, pieces, PATIENCE if body.stream else None):
                self.queue.hang_up(job)
                return Response(status_code=HUNG_UP)
            if body.stream and not (result.done() and result.exception()):
                stream = self.stream(body, job, result, pieces)
                beginning = await anext(stream)  # a generator that has begun is closed for certain
                return StreamingResponse(
                    _chain(beginning, stream), media_type="text/event-stream",
                    headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                )  # fmt: skip
            report = await result
        except BaseException:
            self.queue.hang_up(job)
            raise
        values = AnswerObjects(self.settings.name, "chat.completion").whole(job, report)
        if body.vtprune.draw and report.input.files:
            html = await self.in_thread(partial(draw_page, report, self.settings.name))
            values["vtprune"] = {"html": html}
        return JSONResponse(values)

    async def take(self, body: ChatRequest) -> Job:
        """Return the job of a request, with a place in the queue and its media in a folder."""
        settings = self.settings
        self.queue.enter()
        folder = Path()

        def make() -> Job:
            nonlocal folder
            folder = self.uploads.open_folder()

            def resolve(kind: str, reference: str) -> str:
                return self.uploads.resolve(reference, folder)

            return make_job(body, resolve, settings.preset, settings.generation)

        def remove() -> None:
            if folder.name:
                shutil.rmtree(folder, ignore_errors=True)

        try:
            job = await self.in_thread(make)
        except BaseException:
            self.queue.leave()
            remove()
            raise
        job.on_prepared = remove
        return job

    async def wait(
        self,
        request: Request,
        result: asyncio.Future[Report],
        pieces: asyncio.Queue[str | None],
        seconds: float | None,
    ) -> bool:
        """Wait for an answer or its first piece, or so many seconds; return whether the client is
        still there."""
        until = time.monotonic() + (seconds or 0)
        while True:
            done, _ = await asyncio.wait([result], timeout=POLL)
            if result.cancelled() or await request.is_disconnected():
                return False
            if done or not pieces.empty() or (seconds and time.monotonic() > until):
                return True

    async def stream(
        self,
        body: ChatRequest,
        job: Job,
        result: asyncio.Future[Report],
        pieces: asyncio.Queue[str | None],
    ) -> AsyncIterator[str]:
        """Yield an answer's events as its pieces come; a client that hangs up ends it."""
        answer = AnswerObjects(self.settings.name, "chat.completion.chunk")
        result.add_done_callback(lambda _: pieces.put_nowait(None))  # after the last piece
        try:
            yield answer.piece({"role": "assistant", "content": ""})
            while True:
                try:
                    piece = await asyncio.wait_for(pieces.get(), PATIENCE)
                except TimeoutError:
                    yield ": waiting\n\n"  # so that no proxy ends the connection
                    continue
                if piece is None:
                    break
                yield answer.piece({"content": piece})
            report = result.result()
            yield answer.piece({}, job.finish_reason)
            if body.stream_options.include_usage:
                yield answer.usage(job, report)
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield f"data: {bytes(self.describe_error(error).body).decode()}\n\n"
        finally:
            self.queue.hang_up(job)

    # -- errors ------------------------------------------------------------------------------------

    async def on_error(self, request: Request, error: Exception) -> JSONResponse:
        """Turn an error into its answer."""
        return self.describe_error(error)

    def describe_error(self, error: Exception) -> JSONResponse:
        """Return an error's answer; of what is no client's fault, the details go to the log."""
        status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
        message, hint = f"{type(error).__name__}: {error}", ""
        if isinstance(error, VtpruneError):
            message, hint = error.message, error.hint
            status = 500 if message.startswith("internal") else status
        if status in (500, 507):
            number = secrets.token_hex(4)
            self.settings.on_fault(f"fault {number}: {message}")
            message = "internal error" if status == 500 else "the server can't store the media"
            hint = f"its log tells more, at fault {number}"
        return error_response(status, message, hint)


def _put(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[str | None], text: str) -> None:
    """Hand a piece of an answer from the model's thread to the server's."""
    with suppress(RuntimeError):  # the loop has ended: nobody reads
        loop.call_soon_threadsafe(pieces.put_nowait, text)


async def _chain(beginning: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the beginning, and then the rest."""
    yield beginning
    async for each in rest:
        yield each


def describe_upload(upload: Upload) -> dict[str, object]:
    """Return an upload as OpenAI's clients read it."""
    return {"id": upload.name, "object": "file", "bytes": upload.size,
            "created_at": upload.created, "filename": upload.name, "purpose": "vision",
            "status": "processed"}  # fmt: skip


def draw_page(report: Report, name: str) -> str:
    """Return the HTML page of what was kept."""
    from vtprune.pictures.drawing import draw

    named = replace(report, model=replace(report.model, name=name))  # not a path of the server
    return draw(named).html().decode()
