"""lmms-eval's `--model vtprune`; imported by lmms-eval alone, which finds it by its entry point."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import (
    GenerationResult,
    Instance,
    TokenCounts,
    unwrap_generation_output,
)
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from vtprune.errors import ModelError, VtpruneError
from vtprune.inference.forced_answers import Score
from vtprune.inference.generate import Generation
from vtprune.serving.harness.asking import Answer, Asker, naming, until
from vtprune.serving.harness.conversation import Conversation, Message, interleave
from vtprune.serving.harness.requests import (
    Document,
    Options,
    TaskRequest,
    batches,
    media_of,
    read_chat,
    read_simple,
)
from vtprune.serving.harness.settings import Settings

USED = {"max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", "until"}
"""What a task may say of generation that is heeded."""
Pair = tuple[float, bool]


class Model(lmms):
    """What both of lmms-eval's kinds of tasks share; see `Settings` for the arguments."""

    def __init__(
        self,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **arguments: object,
    ) -> None:
        super().__init__()
        try:
            self.batch_size = int(batch_size)
        except ValueError as error:
            raise VtpruneError(
                f"batch_size {batch_size!r} is not a whole number", "give one, such as 8"
            ) from error
        if self.batch_size < 1:
            raise VtpruneError(f"batch_size {batch_size} is out of range", "1 or more")
        if device is not None:
            arguments["device"] = device
        settings = Settings.read(arguments)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        device_name = str(self.accelerator.device) if self._world_size > 1 else None
        self.asker = Asker(settings, device_name)
        self.sampled = 0  # batches, which draw differently when a question is asked again
        self.unused: set[str] = set()
        for warning in self.asker.loaded.warnings:
            logger.warning(warning)

    @property
    def model(self) -> torch.nn.Module:
        return self.asker.loaded.model

    @property
    def tokenizer(self) -> object:
        return self.asker.loaded.files.tokenizer

    @property
    def device(self) -> torch.device:
        return self.asker.loaded.model.device

    def document(self, task: str, split: str, number: int) -> Document:
        return self.task_dict[task][split][number]

    def read(self, request: Instance) -> TaskRequest:
        """One request of generation."""
        raise NotImplementedError

    # -- what lmms-eval calls --------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers, in the order of the requests; alike ones in batches."""
        asked = [self.read(request) for request in requests]
        by_number: dict[int, Answer] = {}
        started = time.perf_counter()
        with self.progress(len(asked)) as bar:
            for numbers in batches(asked, self.batch_size):
                rows = [asked[number] for number in numbers]
                answers = self.answer(rows, [row.only() for row in rows])
                by_number |= zip(numbers, answers, strict=True)
                bar.update(len(numbers))
        self.log(list(by_number.values()), time.perf_counter() - started)
        return [_result(by_number[number]) for number in range(len(asked))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of every round, each of which is a conversation of its own."""
        results = []
        with self.progress(len(requests)) as bar:
            for request in requests:
                asked = self.read(request)
                now, count = asked.round(), 0
                while now.conversation is not None:
                    answer = self.answer([asked], [now.conversation])[0].text
                    count += 1
                    now = asked.round(count, [*now.answers, answer], now.note)
                results.append(now.answers)
                bar.update(1)
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Pair | GenerationResult]:
        """(loss, whether greedy decoding gives it) of every continuation.

        lmms-eval takes the continuation with the least first figure, as its own models give their
        loss there: nats a token, the end of the turn included.
        """
        prompts: dict[object, list[int]] = {}
        for number, request in enumerate(requests):
            context, _, *rest = request.args
            prompts.setdefault((context, *(repr(part) for part in rest[1:])), []).append(number)
        pairs: dict[int, Pair] = {}
        with self.progress(len(requests)) as bar:
            for numbers in prompts.values():
                scores = self.score([requests[number] for number in numbers])
                pairs |= {
                    number: (score.loss, score.greedy)
                    for number, score in zip(numbers, scores, strict=True)
                }
                bar.update(len(numbers))
        return [_passed_on(pairs[number]) for number in range(len(requests))]

    def clean(self) -> None:
        """Lets the model go."""
        del self.asker
        super().clean()

    # -- how -------------------------------------------------------------------------------------

    def answer(
        self, asked: Sequence[TaskRequest], conversations: Sequence[Conversation]
    ) -> list[Answer]:
        """The answers to a batch that is generated alike."""
        name = asked[0].name if len(asked) == 1 else f"{asked[0].name} to {asked[-1].name}"
        with naming(name):
            generation = self.generation(asked[0].options)
            answers = self.asker.answer(conversations, generation, self.batch_size)
        stops = _stops(asked[0].options)
        return [
            Answer(until(each.text, stops), each.prompt_tokens, each.tokens, each.keep_mean)
            for each in answers
        ]

    def score(self, requests: Sequence[Instance]) -> list[Score]:
        """The scores of requests that have their prompt in common."""
        context, _, *rest = requests[0].args
        message, name = Message("user", (context,)), str(requests[0].task_name)
        document: Document = {}
        if rest:
            show, number, task, split = rest
            document = self.document(task, split, number)
            name = f"{task} {number}"
        with naming(name):
            if rest:
                message = interleave(context, media_of(show, document))
            endings = [request.args[1] for request in requests]
            texts = [str(text(document) if callable(text) else text).strip() for text in endings]
            return self.asker.score([message], texts)

    def generation(self, options: Options) -> Generation:
        """How a task wants its answers chosen.

        Raises:
            ModelError: by a search with beams.
        """
        if unused := set(options) - USED - self.unused:
            self.unused |= unused
            logger.warning(f"of the task's generation_kwargs not used: {', '.join(sorted(unused))}")
        if (beams := _number(options, "num_beams", 1)) != 1:
            raise ModelError(f"num_beams {beams:g}: beams are not searched", "set it to 1")
        sampled = options.get("do_sample")
        temperature = _number(options, "temperature", 1.0 if sampled else 0.0)
        if sampled is False:
            temperature = 0.0
        seed = self.asker.preset.seed
        if temperature > 0:
            seed += self.sampled
            self.sampled += 1
        longest = _number(options, "max_new_tokens", self.asker.settings.max_new_tokens)
        top_p = _number(options, "top_p", 1.0) or 1.0
        return Generation(int(longest), temperature, top_p, seed=seed)

    def progress(self, total: int) -> tqdm[None]:
        return tqdm(total=total, disable=self.rank != 0, desc="Model Responding")

    def log(self, answers: Sequence[Answer], seconds: float) -> None:
        """Tells lmms-eval how fast it went, and how much was really kept."""
        tokens = sum(answer.tokens for answer in answers)
        kept = [answer.keep_mean for answer in answers if answer.keep_mean is not None]
        more = {"keep_mean": sum(kept) / len(kept)} if kept else {}
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds > 0 else 0.0,
            additional_metrics=more,
        )


class ChatModel(Model):
    """For tasks as conversations, which lmms-eval prefers."""

    is_simple = False

    def read(self, request: Instance) -> TaskRequest:
        return read_chat(request.args, self.document)


class SimpleModel(Model):
    """For tasks as a text and its media: `--force_simple`, which multiple choice needs."""

    is_simple = True

    def read(self, request: Instance) -> TaskRequest:
        return read_simple(request.args, self.document)


def _passed_on(pair: Pair) -> Pair | GenerationResult:
    """A pair in the form in which it reaches the task: lmms-eval 0.7.3 makes text of a bare one."""
    if unwrap_generation_output(pair)[0] == pair:
        return pair
    return GenerationResult(cast("str", pair))


def _number(options: Options, name: str, default: float) -> float:
    value = options.get(name)
    return default if value is None else float(cast("float", value))


def _stops(options: Options) -> list[str]:
    stops = options.get("until") or []
    return [stops] if isinstance(stops, str) else list(cast("Sequence[str]", stops))


def _result(answer: Answer) -> GenerationResult:
    counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.tokens)
    return GenerationResult(answer.text, counts)
