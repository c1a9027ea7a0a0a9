"""VLMEvalKit's model class; imported by a runner of one's own, since VLMEvalKit has no plug-ins.

    from functools import partial
    from runpy import run_path
    from vlmeval.config import supported_VLM
    from vtprune.serving.harness.vlmevalkit import Pruned

    supported_VLM["llava-0.33"] = partial(Pruned, "llava-1.5-7b", method="entropy", keep=0.3333)
    run_path("run.py", run_name="__main__")

in VLMEvalKit's directory, and then `python runner.py --model llava-0.33 --data MME`. Where it is
installed from an index, the last line is `run_module("vlmeval.run", run_name="__main__")`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlmeval.vlm.base import BaseModel

from vtprune.errors import VtpruneError
from vtprune.inference.generate import Generation
from vtprune.models import EMBEDDED
from vtprune.serving.harness.asking import Asker, naming
from vtprune.serving.harness.conversation import (
    Conversation,
    Message,
    MessageMedia,
    Part,
    media_from,
    user,
)
from vtprune.serving.harness.settings import Settings

Piece = Mapping[str, object]
UNTOLD = 1
"""What VLMEvalKit finds for a number of frames, or frames a second, that a dataset may set."""


class Pruned(BaseModel):
    """A pruned model.

    Args:
        pretrained: as `Settings` has it, and likewise all other arguments. Of videos VLMEvalKit's
            dataset says how much is looked at, unless `frames` or `fps` does.
        use_vllm: what VLMEvalKit gives models of some names; only False can be.
    """

    is_api = False
    INSTALL_REQ = False
    INTERLEAVE = True
    VIDEO_LLM = True
    allowed_types = ("text", "image", "video")

    def __init__(
        self, pretrained: str = EMBEDDED, use_vllm: bool = False, **arguments: object
    ) -> None:
        super().__init__()
        if use_vllm:
            raise VtpruneError("use_vllm: pruning is done in transformers", "leave --use-vllm out")
        settings = Settings.read({"pretrained": pretrained, **arguments})
        self.asker = Asker(settings)
        unset = settings.frames is None and settings.fps is None
        self.nframe: int | None = UNTOLD if unset else None
        self.fps: float | None = UNTOLD if unset else None

    def set_dump_image(self, dump_image_func: object) -> None:
        self.dump_image_func = dump_image_func

    def use_custom_prompt(self, dataset: object) -> bool:
        """The dataset's own prompt is asked."""
        return False

    def generate_inner(self, message: Sequence[Piece], dataset: str | None = None) -> str:
        """The answer to texts, pictures and videos in a row."""
        return self.ask([user(map(_part, message))], dataset)

    def chat_inner(self, message: Sequence[Piece], dataset: str | None = None) -> str:
        """The answer to a conversation."""
        return self.ask([_message(piece) for piece in message], dataset)

    def ask(self, conversation: Conversation, dataset: str | None) -> str:
        asker, settings = self.asker, self.asker.settings
        frames, fps = self.nframe, self.fps
        if (frames is None) != (fps is None):  # a dataset sets one, and takes the other away
            asker.sampling = replace(asker.sampling, frames=frames, fps=fps)
        generation = Generation(settings.max_new_tokens, seed=asker.preset.seed)
        with naming(dataset or "the question"):
            return asker.answer([conversation], generation)[0].text


def _message(message: Piece) -> Message:
    content = message["content"]
    pieces = [content] if isinstance(content, (str, Mapping)) else content
    assert isinstance(pieces, Sequence)
    return Message(str(message["role"]), tuple(_part(piece) for piece in pieces))


def _part(piece: str | Piece) -> Part:
    if isinstance(piece, str):
        return piece
    kind, value = str(piece["type"]), piece["value"]
    if kind == "text":
        return str(value)
    media = media_from({**piece, "url": value})
    return MessageMedia(kind, media.content, media.start, media.end)
