"""Chat completions in OpenAI's form: what clients ask for, and what they get."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vtprune.errors import PresetError, VtpruneError, json_fault, quote
from vtprune.inference.generate import Generation
from vtprune.inference.messages import Resolve, read_messages
from vtprune.preset import Preset, load_preset, override, preset_names
from vtprune.pruners import METHODS
from vtprune.serving.queue import Job
from vtprune.serving.requests import Request

if TYPE_CHECKING:
    from vtprune.inference.report import Report

LONGEST_ANSWER = 4096
MOST_VALUES = 200_000
"""Of a request's JSON: a body of brackets alone would take a hundred times its size in memory."""
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
"""Fields that this server can't honour -> the values that ask for nothing."""


class PruningOptions(BaseModel):
    """The field `vtprune` of a request."""

    model_config = ConfigDict(extra="forbid")

    keep: float | dict[str, float] | None = None
    preset: str | None = None
    method: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    draw: bool = False


class StreamOptions(BaseModel):
    """The field `stream_options` of a request."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat completion as clients ask for it; null is a field that is not there."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Any]
    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    vtprune: PruningOptions = PruningOptions()
    # Notes of the client's own, which change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, data: object) -> object:
        """Leave out what is null, and refuse what would be left undone."""
        if not isinstance(data, dict):
            return data
        values = {key: value for key, value in data.items() if value is not None}
        for key in UNSUPPORTED.keys() & values.keys():
            value = values.pop(key)
            if value not in UNSUPPORTED[key]:
                raise ValueError(f"{key} {quote(value)} is not supported")
        return values

    @property
    def stops(self) -> tuple[str, ...]:
        """The sequences that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def read_request(body: bytes) -> ChatRequest:
    """Return what a body asks for.

    Raises:
        VtpruneError: it is not JSON, or fields are wrong.
    """
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > MOST_VALUES:
        raise VtpruneError(f"the request has more than {MOST_VALUES:,} values", "send fewer")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise VtpruneError(f"the request is {json_fault(error)}") from error
    if not isinstance(data, dict):
        raise VtpruneError("the request is not a JSON object", 'send {"messages": [...]}')
    try:
        request = ChatRequest.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)[:5]
        raise VtpruneError("; ".join(_describe(fault) for fault in faults)) from error
    if len(request.stops) > 4 or not all(0 < len(stop) <= 1000 for stop in request.stops):
        raise VtpruneError("stop: more than 4 texts, or one that is empty or over 1,000 characters")
    return request


def _describe(fault: Mapping[str, Any]) -> str:
    """Return one of pydantic's faults in words."""
    message = str(fault["msg"]).removeprefix("Value error, ")
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        message = "no such field"
    return f"{place}: {message}" if place else message


def make_job(body: ChatRequest, resolve: Resolve, preset: Preset, usual: Generation) -> Job:
    """Return the job of a request.

    Args:
        resolve: gives the file of a media item.
        preset, usual: of requests that name none.

    Raises:
        VtpruneError: what is wrong with it.
    """
    asked = body.max_completion_tokens or body.max_tokens or usual.max_new_tokens
    longest = max(LONGEST_ANSWER, usual.max_new_tokens)
    if asked > longest:
        raise VtpruneError(f"max_tokens {quote(asked)} is over {longest:,}", "ask for fewer")
    options = body.vtprune
    if options.preset is not None:
        if options.preset not in preset_names():  # clients name no files of the server
            raise PresetError(f"no preset {quote(options.preset)}", ", ".join(preset_names()))
        preset = load_preset(options.preset)
    if options.method is not None and options.method not in METHODS:  # nor modules to import
        raise PresetError(f"no method {quote(options.method)}", ", ".join(METHODS))
    preset = override(preset, keep=options.keep, method=options.method, seed=options.seed)
    generation = replace(
        usual,
        max_new_tokens=asked,
        temperature=usual.temperature if body.temperature is None else body.temperature,
        top_p=usual.top_p if body.top_p is None else body.top_p,
        seed=usual.seed if body.seed is None else body.seed,
    )
    files, turns = read_messages(body.messages, resolve)
    question = Request(tuple(files), tuple(turns), preset)
    return Job(question, generation, stops=body.stops, thumbnails=options.draw and bool(files))


class AnswerObjects:
    """An answer's objects, which share their head.

    Args:
        model: its name.
        kind: "chat.completion", or "chat.completion.chunk" of a stream.
    """

    def __init__(self, model: str, kind: str) -> None:
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, job: Job, report: Report) -> dict[str, object]:
        """Return an answer at once."""
        message = {"role": "assistant", "content": report.answer}
        choice = {"index": 0, "message": message,
                  "finish_reason": job.finish_reason}  # fmt: skip
        return {**self.head, "choices": [choice], "usage": usage_of(job, report)}

    def piece(self, delta: Mapping[str, object], reason: str | None = None) -> str:
        """Return a piece of a stream as an event."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return event({**self.head, "choices": [choice]})

    def usage(self, job: Job, report: Report) -> str:
        """Return the event of what an answer used."""
        return event({**self.head, "choices": [], "usage": usage_of(job, report)})


def event(values: Mapping[str, object]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(values)}\n\n"


def usage_of(job: Job, report: Report) -> dict[str, object]:
    """Return what an answer used; prompt tokens are those before pruning."""
    assert job.prepared is not None
    tokens = report.tokens
    prompt = job.prepared.tensors["input_ids"].shape[1]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens.answer,
        "total_tokens": prompt + tokens.answer,
        "visual_tokens": tokens.visual,
        "visual_tokens_kept": tokens.kept_after,
        "keep_mean": tokens.keep_mean,
    }
