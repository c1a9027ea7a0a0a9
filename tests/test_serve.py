"""The server: OpenAI's client, batches, streams, limits, what clients may name, the page."""

from __future__ import annotations

import asyncio
import base64
import configparser
import functools
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import av
import pytest
from click.testing import CliRunner
from conftest import save_clip, save_noise, small_disk
from PIL import Image

import vtprune
from vtprune.cli import cli
from vtprune.cli.serve import GRACE, serve
from vtprune.errors import MediaError, VtpruneError
from vtprune.inference.generate import Generation

for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(package)

import uvicorn  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import Response  # noqa: E402

from vtprune.media import addresses  # noqa: E402
from vtprune.media.addresses import fetch  # noqa: E402
from vtprune.models.structure import find_structure  # noqa: E402
from vtprune.serving import queue as queue_module  # noqa: E402
from vtprune.serving import uploads  # noqa: E402
from vtprune.serving.app import Server, ServerSettings, create_app  # noqa: E402
from vtprune.serving.connection import WatchedConnection  # noqa: E402
from vtprune.serving.guard import Bodies, Guard, GuardRules  # noqa: E402
from vtprune.serving.queue import Job, JobQueue, QueueFullError, QueueSettings  # noqa: E402
from vtprune.serving.requests import requests_about  # noqa: E402
from vtprune.serving.stop_sequences import visible_part  # noqa: E402
from vtprune.serving.uploads import (  # noqa: E402
    UploadRules,
    Uploads,
    UploadsFullError,
    decode_data_url,
)

PRESET = vtprune.load_preset({"keep": 0.4, "stages": [{"at": 2, "method": "random"}]})
SETTINGS = ServerSettings("tiny", PRESET, Generation(max_new_tokens=4))
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(loaded: vtprune.Loaded) -> Iterator[TestClient]:
    with TestClient(create_app(loaded, SETTINGS)) as found:
        yield found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        save_noise(folder / f"{number}.png", 40 + 30 * number, 60)
    return sorted(folder.iterdir())


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def ask(url: str, question: str = "what?", **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts}], **more}


def post(client: TestClient, body: object) -> Any:
    """The answer to a body as `json` writes it, NaN and halves of characters included."""
    headers = {"Content-Type": "application/json"}
    return client.post(CHAT, content=json.dumps(body), headers=headers)


def error_of(client: TestClient, body: object, status: int) -> str:
    response = post(client, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return str(error["message"])


def test_an_answer_is_that_of_ask_with_visual_tokens_in_its_usage(
    loaded: vtprune.Loaded, client: TestClient, pictures: list[Path]
) -> None:
    for path in pictures:
        answer = client.post(CHAT, json=ask(data_url(path), model="tiny")).json()
        alone = vtprune.ask(loaded, path, "what?", preset=PRESET, generation=SETTINGS.generation)
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": alone.answer}
        usage = answer["usage"]
        assert usage["visual_tokens"] == alone.tokens.visual > usage["visual_tokens_kept"]
        assert usage["visual_tokens_kept"] == alone.tokens.kept_after
        assert usage["prompt_tokens"] == alone.tokens.visual + alone.tokens.text
    server: Server = client.app.state.server  # type: ignore[attr-defined]
    assert list(server.folder.iterdir()) == []  # nothing of a request stays


def test_a_request_has_its_own_keep_preset_method_seed_and_length(
    client: TestClient, pictures: list[Path]
) -> None:
    def usage(**more: Any) -> Any:
        return client.post(CHAT, json=ask(data_url(pictures[0]), **more)).json()["usage"]

    assert usage(vtprune={"keep": 0.9})["keep_mean"] > 0.85
    assert usage(vtprune={"keep": 0.5, "method": "uniform", "seed": 3})["keep_mean"] < 0.55
    assert usage(vtprune={"preset": "fast"})["keep_mean"] < 0.5
    assert usage(max_tokens=1)["completion_tokens"] == 1


def test_a_stream_has_the_pieces_of_the_answer_and_its_usage(
    client: TestClient, pictures: list[Path]
) -> None:
    body = ask(data_url(pictures[1]))
    whole = client.post(CHAT, json=body).json()
    more = {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", CHAT, json={**body, **more}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert events.pop()["usage"] == whole["usage"]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text.strip() == whole["choices"][0]["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_answers_under_many_clients_are_those_alone(
    loaded: vtprune.Loaded, pictures: list[Path]
) -> None:
    settings = replace(SETTINGS, queue=QueueSettings(max_batch=4, max_wait=0.2))
    questions = [f"what is it {'then ' * (number % 5)}?" for number in range(20)]
    keeps = (0.4, 0.7)
    with TestClient(create_app(loaded, settings)) as client, ThreadPoolExecutor(20) as pool:

        def answer(number: int) -> Any:
            body = ask(data_url(pictures[number % 3]), questions[number], stream=number % 4 == 0,
                       vtprune={"keep": keeps[number % 2]})  # fmt: skip
            response = client.post(CHAT, json=body)
            assert response.status_code == 200
            if not body["stream"]:
                return response.json()["choices"][0]["message"]["content"]
            events = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
            return "".join(e["choices"][0]["delta"].get("content", "") for e in events).strip()

        answers = list(pool.map(answer, range(20)))
        sizes = client.app.state.server.queue.batch_sizes  # type: ignore[attr-defined]
    assert max(sizes) == 4
    for number, text in enumerate(answers):
        alone = vtprune.ask(loaded, pictures[number % 3], questions[number], preset=PRESET,
                            keep=keeps[number % 2], generation=SETTINGS.generation)  # fmt: skip
        assert text == alone.answer


@contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    """Serve an app as the command does; give the port."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=WatchedConnection, ws="none", log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=functools.partial(server.run, sockets=[sock]))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield int(sock.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def wait_until(reached: Callable[[], object]) -> None:
    for _ in range(400):
        if reached():
            return
        time.sleep(0.05)
    raise AssertionError("not reached in 20 seconds")


def test_the_openai_client_works_with_it(loaded: vtprune.Loaded, pictures: list[Path]) -> None:
    openai = pytest.importorskip("openai")
    app = create_app(loaded, replace(SETTINGS, guard=GuardRules(key="secret")))
    with serving(app) as port:
        connect = functools.partial(
            openai.OpenAI, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0
        )
        client = connect(api_key="secret")
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        with pictures[0].open("rb") as file:
            name = client.files.create(file=file, purpose="vision").id
        assert client.files.retrieve(name).bytes == pictures[0].stat().st_size
        body = ask(name, model="tiny")
        found = client.chat.completions.create(**body, extra_body={"vtprune": {"keep": 0.5}})
        assert found.usage.visual_tokens_kept > 0
        for file_part in ({"file_id": name}, {"file_data": data_url(pictures[0])}):
            part = {"type": "file", "file": file_part}
            asked = {"role": "user", "content": [part, body["messages"][0]["content"][-1]]}
            same = client.chat.completions.create(
                model="tiny", messages=[asked], extra_body={"vtprune": {"keep": 0.5}},
            )  # fmt: skip
            assert same.choices[0].message.content == found.choices[0].message.content
        usage = {"include_usage": True}
        pieces = list(client.chat.completions.create(**body, stream=True, stream_options=usage))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1])
        assert pieces[-1].usage.visual_tokens > pieces[-1].usage.visual_tokens_kept
        for stream in (False, True):  # no answer has begun where a request is wrong
            with pytest.raises(openai.BadRequestError, match=r"keep 7\.0 is not a fraction"):
                client.chat.completions.create(
                    **body, stream=stream, extra_body={"vtprune": {"keep": 7}}
                )
            bad = ask("data:image/png;base64,AAAA", model="tiny", stream=stream)
            with pytest.raises(openai.BadRequestError, match=r"media-1: .*not a picture"):
                client.chat.completions.create(**bad)
        assert client.files.delete(name).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(name)
        with pytest.raises(openai.BadRequestError, match="no file of that id is kept"):
            client.chat.completions.create(**body)
        with pytest.raises(openai.NotFoundError, match="this server has GET /v1/models"):
            client.responses.create(model="tiny", input="hi")
        with pytest.raises(openai.AuthenticationError):
            connect(api_key="guess").models.list()


def send(port: int, head: str, body: bytes = b"") -> socket.socket:
    """Send the beginning of a request."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    sock.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
    return sock


@pytest.mark.parametrize(
    ("rules", "headers", "status"),
    [
        (GuardRules("key"), {}, 401),
        (GuardRules("key"), {"Authorization": "Bearer kez"}, 401),
        (GuardRules("key"), {"Authorization": "Bearer k\u00e4y"}, 401),
        (GuardRules("key"), {"Authorization": "Bearer key", "Origin": "http://evil"}, 204),
        (GuardRules(hosts=("localhost",)), {"Host": "evil.example"}, 403),
        (GuardRules(hosts=("localhost",)), {"Host": "[::1"}, 403),
        (GuardRules(hosts=("::1",)), {"Host": "[::1]:80"}, 204),
        (GuardRules(), {"Host": "a:80", "Origin": "http://evil.example"}, 403),
        (GuardRules(), {"Host": "a:80", "Origin": "null"}, 403),
        (GuardRules(), {"Host": "a:80", "Origin": "http://a"}, 204),
    ],
)
def test_nothing_is_read_of_a_request_that_may_not_ask(
    rules: GuardRules, headers: dict[str, str], status: int
) -> None:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        raise AssertionError("read")

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(Response(status_code=204), rules, lambda scope, status: None)
    asyncio.run(guard({"type": "http", "path": CHAT, "headers": raw}, receive, send))
    assert sent[0]["status"] == status


def test_a_body_is_refused_while_it_comes(loaded: vtprune.Loaded) -> None:
    """By its length, before it is sent; past the limit; and after a time."""
    rules = GuardRules(most_bytes=1000, seconds=0.2)
    head = f"POST {CHAT} HTTP/1.1\nHost: a\nContent-Type: application/json\n"
    with serving(create_app(loaded, replace(SETTINGS, guard=rules))) as port:
        for length, body, status in (
            ("Content-Length: 1001", b"", 413),
            ("Transfer-Encoding: chunked", b"FFFF\r\n" + b" " * 0xFFFF + b"\r\n", 413),
            ("Content-Length: 900", b"{", 408),
        ):
            with send(port, head + length, body) as sock:
                assert sock.recv(100).startswith(b"HTTP/1.1 %d " % status), length


def test_what_is_no_http_is_refused_once_and_no_fault(loaded: vtprune.Loaded) -> None:
    faults: list[str] = []
    head = f"POST {CHAT} HTTP/1.1\nHost: a\nTransfer-Encoding: chunked"
    with serving(create_app(loaded, replace(SETTINGS, on_fault=faults.append))) as port:
        for _ in range(3):
            with send(port, head, b"ZZ\r\n") as sock:
                answer = b""
                while more := sock.recv(1000):
                    answer += more
            assert answer.count(b"HTTP/1.1 400 ") == answer.count(b"HTTP/1.1 ") == 1
    assert not faults


def test_a_head_that_takes_too_long_ends_its_connection(
    loaded: vtprune.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtprune.serving.connection.PATIENCE", 0.2)

    def drip(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            for letter in b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 500:
                sock.sendall(bytes([letter]))
                time.sleep(0.02)

    with serving(create_app(loaded, SETTINGS)) as port, pytest.raises(ConnectionError):
        drip(port)


@pytest.mark.parametrize(
    ("left", "answered", "ends"),
    [(0, False, False), (9, False, True), (8, False, False), (0, True, True), (8, True, False)],
)
def test_a_connection_ends_whose_client_reads_nothing(
    left: int, answered: bool, ends: bool
) -> None:
    """At the last look 9 bytes, or none, were not sent of the answer to the same request."""
    connection = object.__new__(WatchedConnection)
    connection.cycle = SimpleNamespace(response_complete=answered)  # type: ignore[assignment]
    connection.transport, connection.loop = Mock(), Mock()
    connection.transport.get_write_buffer_size.return_value = left
    connection.look((connection.cycle, 9 if left else 0))
    assert connection.transport.abort.called == ends
    assert connection.loop.call_later.called != ends


def test_bodies_that_are_read_at_once_are_bounded() -> None:
    bodies = Bodies(GuardRules(most_bytes=100, most_held=150))

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"x" * 90, "more_body": False}

    async def read() -> None:
        request = Request({"type": "http", "headers": []}, receive)  # type: ignore[arg-type]
        async with bodies.limited(request) as first:
            assert len(await first.body()) == bodies.held == 90
            async with bodies.limited(request) as second:
                with pytest.raises(HTTPException, match="90 bytes are being read"):
                    await second.body()
        assert bodies.held == 0

    asyncio.run(read())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_dropped_at_once(
    loaded: vtprune.Loaded, pictures: list[Path], stream: bool
) -> None:
    """Its answer, of thousands of tokens, ends; one that waits behind it is answered."""
    app = create_app(loaded, replace(SETTINGS, queue=QueueSettings(max_batch=1)))
    body = json.dumps(ask(data_url(pictures[0]), max_tokens=4000, stream=stream)).encode()
    head = f"POST {CHAT} HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: "
    with serving(app) as port:
        queue = app.state.server.queue
        running = send(port, f"{head}{len(body)}", body)
        if stream:
            assert b" 200 " in running.recv(100)
        wait_until(lambda: queue.running)
        waiting = send(port, f"{head}{len(body)}", body)
        wait_until(lambda: queue.waiting)
        waiting.close()
        wait_until(lambda: not queue.waiting)  # dropped while the first one is answered
        assert queue.running
        running.close()
        wait_until(lambda: not queue.running)
        assert queue.batch_sizes == {1: 1}
        assert list(app.state.server.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"messages": []}, "messages: the list is empty"),
        ({}, "messages: Field required"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "not of the user"),
        (ask("data:image/png;base64,AAAA"), "not a picture or a video"),
        (ask("data:image/png;base64,%%%"), "base64 can't be decoded"),
        (ask("data:image/png,abc"), "not a data URL in base64"),
        (ask("/etc/passwd"), "neither a data URL, an uploaded file, nor an address"),
        (ask("file:///etc/passwd"), "files of the server are not open to clients"),
        (ask("file-" + "0" * 24), "no file of that id is kept"),
        (ask("file-../../etc"), "neither a data URL"),
        (ask("http://example.org/a.png"), "addresses of 'example.org' are not fetched"),
        (ask("x", temperature=-1), "temperature: "),
        (ask("x", n=2), "n 2 is not supported"),
        (ask("x", vtprune={"kep": 1}), "vtprune.kep: "),
        (ask("x", vtprune={"preset": "/etc/passwd"}), "no preset"),
        (ask("x", vtprune={"method": "os:system"}), "no method 'os:system'"),
        (ask("x", tools=[{"type": "function"}]), "tools [{'type': 'function'}] is not supported"),
        (ask("x", response_format={"type": "json_object"}), "is not supported"),
        (ask("x", logprobs=True), "logprobs True is not supported"),
        (ask("x", lenght=3), "lenght: no such field"),
        (ask("x", max_tokens=100_000), "max_tokens 100000 is over 4,096"),
        (ask("x", temperature=float("nan")), "temperature: Input should be a finite number"),
        (ask("x", vtprune={"keep": float("nan")}), "keep nan is not a fraction"),
        (ask("x", stop=["a"] * 5), "stop: more than 4 texts"),
        (ask("x", stop=""), "stop: more than 4 texts, or one that is empty"),
        (ask("http://[x"), "'http://[x': not an address: Invalid IPv6 URL"),
        (ask("file://[x"), "not an address"),
        ([1], "the request is not a JSON object"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role ['user'] is none of"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool' is none of"),
        ({"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input_image is a part of the Responses API"),
        ({"messages": [{"role": "user", "content": "x"}] * 10_000}, "10,000 are more than 256"),
        ({"messages": [[]] * 200_001}, "more than 200,000 values"),
    ],
)  # fmt: skip
def test_wrong_requests_are_said_to_be_wrong(client: TestClient, body: object, reason: str) -> None:
    assert reason in error_of(client, body, 400)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON: Expecting value"),
        (b"null", "not a JSON object"),
        (b'{"messages":' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested too deep"),
        (b'{"messages": "\xff"}', "not UTF-8"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "a number with too many digits"),
    ],
)
def test_what_is_no_json_is_said_to_be_none(
    client: TestClient, content: bytes, reason: str
) -> None:
    response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_what_clients_send_in_other_words_is_understood(
    client: TestClient, pictures: list[Path]
) -> None:
    """A plain text as an address, nulls, the role developer, halves of characters, no picture."""
    url = data_url(pictures[0])
    body = ask(url)
    usual = client.post(CHAT, json=body).json()
    body["messages"][0]["content"][0]["image_url"] = url
    nulls = dict.fromkeys(("n", "stream", "stream_options", "temperature", "vtprune", "tools"))
    harmless = {"frequency_penalty": 0, "response_format": {"type": "text"}, "user": "me"}
    answer = client.post(CHAT, json={**body, **nulls, **harmless}).json()
    assert answer["choices"] == usual["choices"]
    for role in ("system", "developer"):
        first = {"role": role, "content": "be brief"}
        with_role = client.post(CHAT, json={"messages": [first, *body["messages"]]}).json()
        assert with_role["usage"]["prompt_tokens"] > usual["usage"]["prompt_tokens"]
    body["messages"][0]["content"][1]["text"] = "what \ud800?"
    assert post(client, body).status_code == 200
    text = client.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert text["usage"]["visual_tokens"] == 0 < text["usage"]["prompt_tokens"]
    assert client.post(CHAT, content=json.dumps(body)).status_code == 415
    assert "no model" in client.get("/v1/models/gpt").json()["error"]["message"]
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_an_answer_ends_before_a_stop_sequence(client: TestClient, pictures: list[Path]) -> None:
    body = ask(data_url(pictures[0]), max_tokens=12)
    whole = client.post(CHAT, json=body).json()
    text, tokens = whole["choices"][0]["message"]["content"], whole["usage"]["completion_tokens"]
    stop = text[2:4]
    body["stop"] = [stop, "never"]
    cut = client.post(CHAT, json=body).json()
    before = text[: text.index(stop)].rstrip()
    assert cut["choices"][0] == {"index": 0, "message": {"role": "assistant", "content": before},
                                 "finish_reason": "stop"}  # fmt: skip
    assert cut["usage"]["completion_tokens"] < tokens
    events = client.post(CHAT, json={**body, "stream": True}).text.split("\n\n")[:-2]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in events]
    assert "".join(delta.get("content", "") for delta in deltas) == before


@pytest.mark.parametrize(
    ("text", "visible"),
    [("a", "a"), ("a EN", "a"), ("a END b", "a"), ("a ENb", "a ENb"), ("a ", "a"), ("x\n", "x")],
)
def test_nothing_that_may_be_a_stop_sequence_is_passed_on(text: str, visible: str) -> None:
    assert visible_part(text, ("END", "\n\n")) == visible


def test_a_preset_of_a_request_is_a_name_and_never_a_file(
    client: TestClient, pictures: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("keep: 0.5\nstages: [{at: 2, method: random}]\n")
    body = ask(data_url(pictures[0]), vtprune={"preset": str(path)})
    assert "no preset" in error_of(client, body, 400)


def test_other_errors_have_the_clients_form(client: TestClient, pictures: list[Path]) -> None:
    assert "no model 'gpt'" in error_of(client, ask(data_url(pictures[0]), model="gpt"), 404)
    assert client.get("/nothing").json()["error"]["code"] == "not_found"
    headers = {"Content-Type": "application/json"}
    assert client.post(CHAT, content=b"{" * 1000, headers=headers).status_code == 400


def test_health_and_what_was_answered_can_be_read(client: TestClient, pictures: list[Path]) -> None:
    assert client.get("/health").json()["status"] == "ok"
    assert client.post(CHAT, json=ask(data_url(pictures[0]))).status_code == 200
    metrics = client.get("/metrics").text
    assert 'vtprune_visual_tokens_total{which="kept"}' in metrics
    assert 'vtprune_part_seconds_bucket{le="0.1",part="prefill"}' in metrics


def test_a_body_over_the_limit_is_refused(loaded: vtprune.Loaded, pictures: list[Path]) -> None:
    settings = replace(
        SETTINGS, guard=GuardRules(most_bytes=1000), uploads=UploadRules(most_bytes=100)
    )
    with TestClient(create_app(loaded, settings)) as client:
        assert client.post(CHAT, json=ask("x" * 2000)).status_code == 413
        with pytest.raises(MediaError, match="over the limit of 100 bytes"):
            decode_data_url(data_url(pictures[0]), 100)
        response = client.post("/v1/files", files={"file": ("a.png", b"x" * 200)})
        assert response.status_code == 400


class Held:
    """A `generate` that waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go, self.begun = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.whole = queue_module.generate
        monkeypatch.setattr(queue_module, "generate", self)

    def __call__(self, loaded: Any, questions: Sequence[Any], *args: Any, **more: Any) -> Any:
        self.batches.append(len(questions))
        self.begun.set()
        assert self.let_go.wait(20)
        return self.whole(loaded, questions, *args, **more)


def submit(queue: JobQueue, job: Job) -> None:
    queue.enter()
    queue.submit(job)


def job(path: Path, question: str = "what?") -> Job:
    return Job(requests_about([str(path)], [question], PRESET)[0], SETTINGS.generation)


def test_a_full_queue_refuses_a_hung_up_client_is_dropped_and_a_stop_finishes(
    loaded: vtprune.Loaded, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    queue = JobQueue(loaded, QueueSettings(max_batch=1, max_wait=0, max_queue=2))
    first, second, gone = (job(pictures[0], str(number)) for number in range(3))
    submit(queue, first)
    assert held.begun.wait(20)
    submit(queue, second)
    submit(queue, gone)
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        submit(queue, job(pictures[0]))
    queue.hang_up(gone)
    held.let_go.set()
    queue.stop(20)
    assert first.result.result(0).answer is not None
    assert second.result.result(0).question == "1"
    assert gone.result.cancelled()
    assert len(held.batches) == 2
    with pytest.raises(VtpruneError, match="shutting down"):
        submit(queue, job(pictures[0]))


def test_a_stop_waits_for_no_prompt_whose_client_has_gone(
    loaded: vtprune.Loaded, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "LAST_TOKEN", 0.1)
    held = Held(monkeypatch)
    queue = JobQueue(loaded, QueueSettings(max_wait=0))
    asked = job(pictures[0])
    submit(queue, asked)
    assert held.begun.wait(20)
    began = time.monotonic()
    threading.Timer(0.2, queue.hang_up, [asked]).start()
    queue.stop(20)
    assert 0.2 <= time.monotonic() - began < 10
    assert queue.thread.is_alive()
    held.let_go.set()
    queue.thread.join(20)
    assert asked.result.cancelled()


def test_texts_that_are_longer_than_the_model_are_refused(
    loaded: vtprune.Loaded, client: TestClient, pictures: list[Path]
) -> None:
    limit = find_structure(loaded.model).num_positions
    assert limit is not None
    url = data_url(pictures[0])
    error = error_of(client, ask(url, "what " * limit), 400)
    assert re.search(rf"tokens of text, and this model was made for {limit:,} positions", error)
    assert post(client, ask(url, "what " * 50)).status_code == 200


def test_a_batch_that_memory_does_not_hold_is_halved(
    loaded: vtprune.Loaded, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    whole = queue_module.generate

    def generate(loaded: Any, questions: Sequence[Any], *args: Any, **more: Any) -> Any:
        sizes.append(len(questions))
        if len(questions) > 2:
            raise queue_module.OutOfMemoryError("out of memory")
        return whole(loaded, questions, *args, **more)

    monkeypatch.setattr(queue_module, "generate", generate)
    queue = JobQueue(loaded, QueueSettings(max_batch=4, max_wait=1.0))
    jobs = [job(pictures[0], str(number)) for number in range(4)]
    for each in jobs:
        submit(queue, each)
    assert [each.result.result(20).question for each in jobs] == ["0", "1", "2", "3"]
    queue.stop(20)
    assert sizes == [4, 2, 2]


def test_a_request_that_fails_hurts_no_other_of_its_batch(
    loaded: vtprune.Loaded, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client gets a number, under which the details are noted; the counts are right."""
    generate, faults = queue_module.generate, []

    def fail_on_poison(loaded: Any, questions: Sequence[Any], *args: Any, **more: Any) -> Any:
        if any(question.question == "poison" for question in questions):
            raise RuntimeError("secret")
        return generate(loaded, questions, *args, **more)

    monkeypatch.setattr(queue_module, "generate", fail_on_poison)
    waiting = QueueSettings(max_batch=3, max_wait=10.0)
    app = create_app(loaded, replace(SETTINGS, queue=waiting, on_fault=faults.append))
    with TestClient(app) as client, ThreadPoolExecutor(3) as pool:
        bodies = [ask(data_url(pictures[0]), text) for text in ("what?", "poison", "who?")]
        answers = list(pool.map(lambda body: client.post(CHAT, json=body), bodies))
        metrics = client.get("/metrics").text
        assert app.state.server.queue.batch_sizes == {3: 1}
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    error = answers[1].json()["error"]
    number = re.fullmatch(
        r"internal error \(its log tells more, at fault (\w+)\)", error["message"]
    )
    assert number is not None
    assert faults == [f"fault {number[1]}: internal RuntimeError: secret"]
    usage = answers[0].json()["usage"], answers[2].json()["usage"]
    for which, field in (("before", "visual_tokens"), ("kept", "visual_tokens_kept")):
        total = float(sum(each[field] for each in usage))
        assert f'vtprune_visual_tokens_total{{which="{which}"}} {total}' in metrics
    for status, count in ((200, 2.0), (500, 1.0)):
        labels = f'route="/v1/chat/completions",status="{status}"'
        assert f"vtprune_requests_total{{{labels}}} {count}" in metrics
    assert 'vtprune_part_seconds_count{part="queue"} 2.0' in metrics


def test_a_request_that_memory_does_not_hold_is_too_large(
    client: TestClient, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise queue_module.OutOfMemoryError("out of memory", "try --keep 0.1")

    monkeypatch.setattr(queue_module, "generate", generate)
    assert "out of memory" in error_of(client, ask(data_url(pictures[0])), 413)


def test_media_that_nobody_waits_for_are_decoded_no_further(
    loaded: vtprune.Loaded, tmp_path: Path
) -> None:
    queue = JobQueue(loaded, QueueSettings())
    clip = job(save_clip(tmp_path / "clip", 4))
    assert queue.decode(clip).media.items
    queue.hang_up(clip)
    with pytest.raises(queue_module.HungUpError):
        queue.decode(clip)
    submit(queue, clip)
    queue.stop(20)
    assert clip.result.cancelled()
    assert queue.waiting == 0


def test_a_server_that_is_full_or_ends_says_so(
    loaded: vtprune.Loaded, pictures: list[Path]
) -> None:
    app, body = create_app(loaded, SETTINGS), ask(data_url(pictures[0]))
    with TestClient(app) as client:
        queue = app.state.server.queue
        queue.waiting = 64
        full = client.post(CHAT, json=body)
        queue.waiting = 0
        assert (full.status_code, full.headers["Retry-After"]) == (429, "1")
        assert full.json()["error"]["code"] == "rate_limit_exceeded"
        queue.stop(20)
        assert client.post(CHAT, json=body).status_code == 503
        assert client.get("/health").json()["status"] == "stopping"
        assert client.get("/health").status_code == 503


def test_an_answer_that_nobody_waits_for_ends_early(
    loaded: vtprune.Loaded, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = JobQueue(loaded, QueueSettings(max_wait=0))
    long = replace(job(pictures[0]), generation=Generation(max_new_tokens=4000))
    pieces: list[str] = []

    def listen(piece: str) -> None:
        pieces.append(piece)
        long.gone.set()

    long.listener = listen
    submit(queue, long)
    queue.stop(30)
    assert long.result.cancelled()
    assert len(pieces) < 10


# -- docs/serve.md ---------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The one block of a language on the page."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    return str(text)


def test_the_examples_of_the_page_run(
    loaded: vtprune.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("openai")
    with av.open(str(tmp_path / "clip.mp4"), "w") as clip:
        stream = clip.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for _ in range(4):
            clip.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        clip.mux(stream.encode())
    monkeypatch.chdir(tmp_path)
    preset = vtprune.load_preset({"keep": 0.4, "stages": [{"at": "input", "method": "random"}]})
    app = create_app(loaded, replace(SETTINGS, name="qwen2.5-vl-7b", preset=preset))
    with serving(app) as port:
        exec(block("python").replace("127.0.0.1:8000", f"127.0.0.1:{port}"), {})
        assert re.search(r"visual_tokens_kept=[1-9]", capsys.readouterr().out)
        if shutil.which("curl"):
            script = block("bash").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
            result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
            assert result.stdout.endswith("data: [DONE]\n\n"), result
    for metric in re.findall(r"vtprune_\w+", PAGE):
        assert (
            f"# TYPE {metric} " in app.state.server.metrics.text(app.state.server.queue, 0).decode()
        )


def test_the_unit_of_the_page_starts_the_command() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(block("ini"))
    service = unit["Service"]
    program, name, *args = service["ExecStart"].split()
    assert (Path(program).name, name) == ("vtprune", "serve")
    assert serve.make_context(name, args).params["keep"] == "0.3"
    assert float(service["TimeoutStopSec"]) > GRACE


# -- what clients may name -------------------------------------------------------------------------


def test_files_outside_of_the_root_are_never_reached(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.png"
    (root / "in").mkdir(parents=True)
    outside.write_bytes(b"secret")
    inside = root / "in" / "a b.png"
    inside.write_bytes(b"picture")
    os.symlink(outside, root / "link.png")
    os.symlink(tmp_path, root / "up")
    os.mkfifo(root / "pipe")
    os.symlink("/dev/zero", root / "zero")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "x.png").write_bytes(b"secret")
    found = Uploads(tmp_path, UploadRules(root=root))
    for address in (f"file://{inside.parent}/a%20b.png", "file:///in/a%20b.png",
                    "file://localhost/in/a%20b.png"):  # fmt: skip
        assert found.resolve(address, tmp_path) == str(inside)
    for address in (f"file://{outside}", "file:///../secret.png", "file:///in/../../secret.png",
                    "file:///link.png", "file:///%2e%2e/secret.png", "file:///..%2fsecret.png",
                    f"file://{tmp_path}/root2/x.png", "file:///../root2/x.png", "file://host/in",
                    "file:///in/a%20b.png%00", "file:////etc/passwd", "file:///pipe", "file:///in",
                    "file:///", "file:///zero", "file:///up/secret.png", "file:///proc/self/mem",
                    "file:///" + "a" * 5000):  # fmt: skip
        with pytest.raises(MediaError):
            found.resolve(address, tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_disk_that_gets_full_is_no_clients_fault_and_keeps_nothing(
    loaded: vtprune.Loaded, pictures: list[Path]
) -> None:
    faults: list[str] = []
    app = create_app(loaded, replace(SETTINGS, on_fault=faults.append))
    body = ask(data_url(pictures[2]))
    with TestClient(app) as client:
        server = app.state.server
        with small_disk(1000):
            answers = [client.post("/v1/files", files={"file": ("a.png", bytes(size))})
                       for size in (5_000, 2 << 20)]  # fmt: skip
            answers.append(client.post(CHAT, json=body))
        for answer in answers:
            assert answer.status_code == 507
            assert "the server can't store the media" in answer.json()["error"]["message"]
        assert len(faults) == 3
        assert all("File too large" in fault for fault in faults)
        assert os.listdir(server.folder) == []
        assert (server.uploads.files, server.queue.waiting) == ({}, 0)
        assert client.post(CHAT, json=body).status_code == 200


def test_uploads_are_bounded_and_go_after_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now[0])
    found = Uploads(tmp_path, UploadRules(most_bytes=10, most_files=3, most_space=20, kept=60))

    def upload(size: int) -> str:
        return found.upload(io.BytesIO(b"x" * size), size).name

    with pytest.raises(MediaError, match="over the limit of 10 bytes"):
        upload(11)
    first, second = upload(10), upload(9)
    with pytest.raises(UploadsFullError, match="2 uploads of 19 bytes are kept"):
        upload(2)
    third = upload(1)
    with pytest.raises(UploadsFullError, match="3 uploads"):
        upload(0)
    now[0] = 59
    request = found.open_folder()
    named = Path(found.resolve(first, request))
    now[0] = 61
    assert found.space == 10  # the others had their time
    found.delete(first)
    assert named.read_bytes() == b"x" * 10  # a request that named it has it still
    for name in (first, second, third):
        with pytest.raises(MediaError, match="no file of that id is kept"):
            found.resolve(name, request)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


@pytest.mark.parametrize(
    "place",
    ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "::1", "fe80::1",
     "::ffff:127.0.0.1", "224.0.0.1", "100.64.0.1", "fc00::1", "fec0::1", "::127.0.0.1", "::",
     "2002:7f00:1::1", "64:ff9b::10.0.0.1", "64:ff9b:1::1", "ff02::1"],
)  # fmt: skip
def test_private_addresses_are_not_public(place: str) -> None:
    assert not addresses.is_public(place)


@pytest.mark.parametrize(
    "place", ["8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"]
)
def test_addresses_of_the_internet_are_public(place: str) -> None:
    assert addresses.is_public(place)


def test_an_allowed_host_of_a_private_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = UploadRules(hosts=("localhost", "clips.example"))
    for address in ("http://localhost:1/a.png", "https://127.0.0.1/a.png"):
        with pytest.raises(MediaError, match=r"private network|are not fetched"):
            fetch(address, rules)
    mixed = [(0, 0, 0, "", ("8.8.8.8", 80)), (0, 0, 0, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: mixed)
    with pytest.raises(MediaError, match="private network"):
        fetch("http://clips.example/a.png", rules)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        where = {"/there": "/good.png", "/away": "http://other.example/", "/round": "/round"}
        if self.path in where:
            self.send_response(302)
            self.send_header("Location", where[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path in ("/good.png", "/big", "/slow") else 404)
        self.end_headers()
        while self.path == "/slow" and not time.sleep(0.05):
            self.wfile.write(b"x")
        self.wfile.write(b"x" * (4000 if self.path == "/big" else 5))

    def log_message(self, *_: object) -> None:
        pass


def test_addresses_are_fetched_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(addresses, "is_public", lambda place: True)
    rules = UploadRules(hosts=("localhost",), most_bytes=1000, seconds=5)
    base = f"http://localhost:{server.server_port}"
    try:
        assert fetch(f"{base}/good.png", rules) == fetch(f"{base}/there", rules) == b"xxxxx"
        for path, reason in (("away", "addresses of .other.example. are not fetched"),
                             ("round", "more than 3 redirections"), ("none", "status 404"),
                             ("big", "over the limit of 1,000 bytes")):  # fmt: skip
            with pytest.raises(MediaError, match=reason):
                fetch(f"{base}/{path}", rules)
        with pytest.raises(MediaError, match=r"not there after 0\.4 seconds"):
            fetch(f"{base}/slow", replace(rules, seconds=0.4))
    finally:
        server.shutdown()
        server.server_close()


# -- the page and the command ----------------------------------------------------------------------


def test_a_request_can_ask_for_the_drawing(client: TestClient, pictures: list[Path]) -> None:
    body = ask(data_url(pictures[0]), "</script><b>", vtprune={"draw": True})
    page = client.post(CHAT, json=body).json()["vtprune"]["html"]
    assert "default-src 'none'" in page
    assert "<b>" not in page
    assert "Content-Security-Policy" in client.get("/").text


def test_a_browser_asks_by_the_page(loaded: vtprune.Loaded, tmp_path: Path, chromium: str) -> None:
    """A script chooses a red picture and asks: the kept tokens are drawn in the page's frame."""
    app = create_app(loaded, SETTINGS)
    red = io.BytesIO()
    Image.new("RGB", (320, 240), (200, 40, 40)).save(red, "PNG")
    picture = base64.b64encode(red.getvalue()).decode()
    script = f"""<script>
    const bytes = Uint8Array.from(atob("{picture}"), (c) => c.charCodeAt(0));
    const dropped = new DataTransfer();
    dropped.items.add(new File([bytes], "<i>red.png", {{ type: "image/png" }}));
    byId("drop").dispatchEvent(new DragEvent("drop", {{ dataTransfer: dropped }}));
    byId("question").value = "what?";
    byId("keep").value = "0.5";
    byId("form").requestSubmit();
    </script><img src="/answered" alt=""></body>"""

    async def page() -> Any:
        from fastapi.responses import HTMLResponse

        found = await app.state.server.page()
        text = found.body.decode().replace("</body>", script)
        return HTMLResponse(text.replace("img-src data:", "img-src data: 'self'"))

    async def answered() -> None:
        """Hold the page's load, which the screenshot waits for, until the answer is drawn."""
        for _ in range(200):
            await asyncio.sleep(0.1)
            if app.state.server.queue.batch_sizes and not app.state.server.queue.running:
                break
        await asyncio.sleep(1.5)

    app.add_api_route("/try", page, methods=["GET"])
    app.add_api_route("/answered", answered, methods=["GET"])
    shot = tmp_path / "shot.png"
    with serving(app) as port:
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--window-size=1000,1200", f"--screenshot={shot}", f"http://127.0.0.1:{port}/try"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    with Image.open(shot) as image:
        counts = image.convert("RGB").getcolors(2_000_000) or []
    reds = sum(n for n, (r, g, b) in counts if abs(r - 200) < 12 and g < 60 and b < 60)
    assert reds > 1000


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--port", "99999"], "--port"),
        (["--media-root", "none"], "--media-root none: no such folder"),
        (["--api-key-file", "none"], "--api-key-file none: No such file"),
        (["--api-key-file", "empty"], "--api-key-file empty: holds no key"),
        (["--allow-url", "https://a.example/"], "--allow-url https://a.example/: not the name of"),
        (["--keep", "3"], "keep 3 is not a fraction"),
    ],
)
def test_the_command_says_what_is_wrong(
    args: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    result = CliRunner().invoke(cli, ["serve", *args])
    assert result.exit_code in (1, 2)
    assert reason in result.stderr


def test_sampled_answers_of_a_batch_are_those_alone(
    loaded: vtprune.Loaded, pictures: list[Path]
) -> None:
    """Every row draws by a generator of its own: it has no part in what the others draw."""
    sampled = Generation(max_new_tokens=6, temperature=1.5, seed=3)
    queue = JobQueue(loaded, QueueSettings(max_batch=4, max_wait=5.0))
    jobs = [replace(job(pictures[number % 3], str(number)), generation=sampled)
            for number in range(4)]  # fmt: skip
    for each in jobs:
        submit(queue, each)
    answers = [each.result.result(20).answer for each in jobs]
    queue.stop(20)
    assert queue.batch_sizes == {4: 1}
    assert len(set(answers)) > 1
    for number, answer in enumerate(answers):
        alone = vtprune.ask(loaded, pictures[number % 3], str(number), preset=PRESET,
                            generation=sampled)  # fmt: skip
        assert answer == alone.answer


def test_sigterm_finishes_the_answer_that_runs(
    checkpoints: Callable[[str], Path], pictures: list[Path]
) -> None:
    """By the real command, which answers to the names of this machine alone without a key."""
    command = [sys.executable, "-m", "vtprune", "serve", "--port", "0", "--json", "--model",
               str(checkpoints("llava_onevision")), "--method", "random"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        started = json.loads(process.stdout.readline())
        port = int(started["url"].rpartition(":")[2])
        body = ask(data_url(pictures[0]), model=started["model"], max_tokens=100, stream=True)
        content = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\nContent-Type: application/json\n"
        with send(port, f"{head}Host: evil.example\nContent-Length: 9") as sock:
            assert b" 403 " in sock.recv(100)
        head += f"Connection: close\nHost: localhost:{port}\nContent-Length: {len(content)}"
        with send(port, head, content) as sock:
            answer = sock.recv(100)
            process.terminate()
            while more := sock.recv(1 << 16):
                answer += more
        assert b" 200 " in answer
        assert b"data: [DONE]" in answer
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert errors.endswith("\nstopped: the requests that were here are answered\n")


BUSY = """
import torch
from vtprune.cli import main
from vtprune.serving import queue

def generate(*args, **more):
    matrix = torch.rand(1500, 1500)
    print("begun", flush=True)
    while True:
        matrix = matrix @ matrix

queue.generate = generate
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
def test_sigterm_ends_a_prompt_that_nobody_waits_for(
    checkpoints: Callable[[str], Path], pictures: list[Path]
) -> None:
    """Python's end would abort the process in a thread that is in torch meanwhile."""
    command = [sys.executable, "-c", BUSY, "serve", "--port", "0", "--json", "--model",
               str(checkpoints("llava_onevision")), "--method", "random"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
        content = json.dumps(ask(data_url(pictures[0]))).encode()
        head = f"POST {CHAT} HTTP/1.1\nContent-Type: application/json\nHost: localhost:{port}"
        with send(port, f"{head}\nContent-Length: {len(content)}", content):
            assert process.stdout.readline() == "begun\n"
        process.terminate()
        _, errors = process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode == 143
    assert errors.endswith("\nstopped: the requests that were here are answered\n")


def test_a_preset_that_streams_is_served_as_asked(loaded: vtprune.Loaded, tmp_path: Path) -> None:
    stages = [{"at": "input", "method": "random"}]
    preset = vtprune.load_preset({"keep": 0.4, "stream": {"frames": 2}, "stages": stages})
    clip = save_clip(tmp_path / "clip", 5)
    queue = JobQueue(loaded, QueueSettings())
    jobs = [
        Job(requests_about([str(clip)], [question], preset)[0], SETTINGS.generation)
        for question in ("what?", "where?")
    ]
    for each in jobs:
        submit(queue, each)
    for each, question in zip(jobs, ("what?", "where?"), strict=True):
        report = each.result.result(20)
        alone = vtprune.ask(loaded, clip, question, preset=preset, generation=SETTINGS.generation)
        assert (report.answer, report.tokens) == (alone.answer, alone.tokens)
        assert report.tokens.stages[0].at == "segments"
    queue.stop(20)
