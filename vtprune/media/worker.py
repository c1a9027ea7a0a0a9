"""What the process that reads videos does: requests come in, sources and frames go out."""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import threading
import time
from queue import SimpleQueue
from typing import BinaryIO

import numpy as np

from vtprune.errors import VtpruneError
from vtprune.media.clip import open_clip
from vtprune.media.decoding import pyav_frames
from vtprune.media.process import FREE, SLOT_BYTES, SLOTS, OpenRequest, ReadRequest
from vtprune.media.with_decord import DecordUnfitError, decord_frames

_SIGN_OF_LIFE = 1.0  # seconds from one to the next
# How much memory a file may make this process take, beside what its frames need: decoders hold up
# to some twenty of them, of up to six bytes a pixel.
_BASE_BYTES = 1 << 30
_BYTES_PER_PIXEL = 128
_BYTES_PER_ALLOWED_PIXEL = 8  # before the size of the frames is known


def main(descriptor: int | None) -> None:
    """Take requests until the other process ends.

    Args:
        descriptor: the file descriptor of the shared memory; None: frames go through the pipe.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    shared = None if descriptor is None else mmap.mmap(descriptor, SLOTS * SLOT_BYTES)
    _limit("RLIMIT_CORE", 0)
    conversation = _Conversation(sys.stdin.buffer, answers, shared)
    conversation.say("ready")
    while True:
        request = conversation.requests.get()
        try:
            if request.folder:
                os.chdir(request.folder)
            if isinstance(request, OpenRequest):
                result: object = _open(request, conversation)
            else:
                result = _read(request, conversation)
        except (VtpruneError, DecordUnfitError) as error:
            conversation.say("failed", error)
        except MemoryError:
            reason = "it takes more memory than a file of its frame size should"
            conversation.say("failed", request.error(reason))
        except Exception as error:  # of FFmpeg, PyAV or NumPy, over whatever the file holds
            text = " ".join(str(error).split())[:100]
            conversation.say("failed", request.error(f"{type(error).__name__}: {text}"))
        else:
            conversation.say("done", result)


def _open(request: OpenRequest, conversation: _Conversation) -> object:
    most = _BASE_BYTES + _BYTES_PER_ALLOWED_PIXEL * request.limits.max_pixels
    _limit("RLIMIT_DATA", most)
    return open_clip(request.path, request.limits, conversation.alive)


def _read(request: ReadRequest, conversation: _Conversation) -> list[str]:
    source, index = request.source, list(request.index)
    _limit("RLIMIT_DATA", _BASE_BYTES + _BYTES_PER_PIXEL * source.width * source.height)
    problems: list[str] = []
    if request.decoder == "decord":
        frames = decord_frames(source, index)
    else:
        frames = pyav_frames(source, index, request.limits, problems, conversation.alive)
    for number, pixels in frames:
        conversation.send(number, pixels)
    return problems


class _Conversation:
    """Requests from the process that started this one, answers to it, and the shared memory."""

    def __init__(self, incoming: BinaryIO, answers: BinaryIO, memory: mmap.mmap | None) -> None:
        self.incoming, self.answers, self.memory = incoming, answers, memory
        self.requests: SimpleQueue[OpenRequest | ReadRequest] = SimpleQueue()
        self.free = threading.Semaphore(SLOTS)
        self.num_pieces = 0
        self.spoke = time.monotonic()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                request = pickle.load(self.incoming)
                if request == FREE:
                    self.free.release()
                else:
                    self.requests.put(request)
        finally:  # the other process has ended: nobody wants what is being decoded
            os._exit(0)

    def say(self, *answer: object) -> None:
        pickle.dump(answer, self.answers, pickle.HIGHEST_PROTOCOL)
        self.answers.flush()
        self.spoke = time.monotonic()

    def alive(self) -> None:
        """Say, now and then, that the work goes on."""
        if time.monotonic() - self.spoke > _SIGN_OF_LIFE:
            self.say("alive")

    def send(self, number: int, pixels: np.ndarray) -> None:
        """Pass a frame on, in as many pieces as it takes."""
        data = memoryview(np.ascontiguousarray(pixels).data).cast("B")
        self.say("frame", number, pixels.shape)
        for start in range(0, len(data), SLOT_BYTES):
            piece = data[start : start + SLOT_BYTES]
            self.free.acquire()
            if self.memory is None:
                self.say("piece", bytes(piece))
            else:
                at = self.num_pieces % SLOTS * SLOT_BYTES
                self.memory[at : at + len(piece)] = piece
                self.say("piece", at)
            self.num_pieces += 1


def _limit(name: str, value: int) -> None:
    """Set a limit of the system's on this process, where it has it."""
    if sys.platform != "win32":
        import resource

        hard = resource.getrlimit(getattr(resource, name))[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, name), (soft, hard))
