"""One generation under a preset: the answer as it comes, and the clock beside it."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.device import Duration, clock
from vtprune.engine import pruning
from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.engine.trace import StageRecord, Trace
from vtprune.errors import ModelError, VtpruneError
from vtprune.inference.out_of_memory import explain_out_of_memory, is_out_of_memory
from vtprune.inference.prepare import batch_on_device, group_alike
from vtprune.models.structure import find_structure
from vtprune.models.transformers_messages import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vtprune.inference.prepare import PreparedQuestion
    from vtprune.models.base import StreamedVideo
    from vtprune.models.compiling import CompileCost
    from vtprune.models.loading import Loaded
    from vtprune.preset import Preset
    from vtprune.preset.calibration import Calibration

Listener = Callable[[str], None]
"""Gets the pieces of an answer as they are produced."""
THINKING = ("<think>", "</think>")
"""What stands around the thinking of a model that thinks before it answers."""
REPLACEMENT = "\ufffd"  # what a tokenizer shows for half a character


LEAST_TEMPERATURE = 1e-3
"""Above 0: logits, divided by it, are still numbers in float32."""


@dataclass(frozen=True)
class Generation:
    """How an answer is chosen.

    >>> vtprune.Generation(max_new_tokens=64, temperature=0.7, top_p=0.9)

    Args:
        max_new_tokens: its greatest length.
        temperature: 0 is greedy.
        top_p: sample from the likeliest tokens that make up this probability.
        system: a system prompt; empty for none.
        seed: of sampling.

    Raises:
        VtpruneError: a number out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    system: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.max_new_tokens >= 1:
            raise VtpruneError(
                f"max_new_tokens is {self.max_new_tokens}, but must be at least 1",
                "give the greatest length of the answer in tokens",
            )
        if self.temperature and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise VtpruneError(
                f"temperature is {self.temperature}, but must be 0 or at least {LEAST_TEMPERATURE}",
                "use 0 to take the likeliest token each time",
            )
        if not 0 < self.top_p <= 1:
            raise VtpruneError(
                f"top_p is {self.top_p}, but must be in (0, 1]",
                "use 1 to sample from all tokens",
            )

    @property
    def greedy(self) -> Generation:
        """The likeliest token each time, for as long."""
        return Generation(self.max_new_tokens, system=self.system)


@dataclass(frozen=True)
class Run:
    """What one generation gave one sample.

    Args:
        answer: its text, special tokens left out.
        tokens: (n,) int64 ids, the end-of-sequence token included.
        compile_cost: what was compiled meanwhile, in no other seconds; None: nothing is compiled.
        seconds: by part, as in the report; of a batch: those of all its samples together.
        trace: what was cut; a snapshot.
        sample: the row of the batch that this is.
    """

    answer: str
    tokens: torch.Tensor
    seconds: Mapping[str, float]
    trace: Trace
    sample: int = 0
    warnings: tuple[str, ...] = ()
    compile_cost: CompileCost | None = None

    def noting(self, *warnings: str) -> Run:
        """Return the run with further warnings."""
        return replace(self, warnings=(*self.warnings, *warnings))


class TextStream:
    """A streamer for transformers: note when tokens come, and pass on the text of the rows.

    Args:
        listeners: for each row what gets the pieces of its text; None for a row without.
        ends: ids of the end-of-sequence tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        listeners: Sequence[Listener | None] = (),
        ends: Sequence[int] = (),
    ) -> None:
        rows = [RowText(tokenizer, listener, ends) if listener else None for listener in listeners]
        self.rows = {number: row for number, row in enumerate(rows) if row is not None}
        self.first = 0.0
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:  # the first call holds the prompt
            self.prompt_seen = True
            return
        self.first = self.first or clock()
        tokens = value.flatten()
        for number, row in self.rows.items():
            row.put(int(tokens[number]))

    def end(self) -> None:
        for row in self.rows.values():
            row.end()


@dataclass
class RowText:
    """The text of one row, passed on as it comes; what follows its end is padding."""

    tokenizer: PreTrainedTokenizerBase
    on_text: Listener
    ends: Sequence[int]
    ids: list[int] = field(default_factory=list)
    passed_on: str = ""
    ended: bool = False

    def put(self, token: int) -> None:
        if self.ended:
            return
        self.ids.append(token)
        if token in self.ends:
            self.end()
        else:
            self.pass_on(self.text())

    def end(self) -> None:
        if not self.ended:
            self.pass_on(self.text(), last=True)
        self.ended = True

    def text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def pass_on(self, text: str, last: bool = False) -> None:
        """Pass on what is new; hold half characters back until they are complete."""
        if not last:
            text = text.rstrip(REPLACEMENT)
        if text.startswith(self.passed_on) and len(text) > len(self.passed_on):
            piece = text[len(self.passed_on) :]
            self.on_text(piece if self.passed_on else piece.lstrip())
            self.passed_on = text


class Sampler:
    """A logits processor that draws the next token, and leaves no other for greedy decoding.

    Transformers (5.17 to 5.24) samples by PyTorch's default generator, which all threads share: a
    seed would say nothing once two of them draw. Here every row has a generator of its own, so that
    a row of a batch draws what it draws alone.

    Args:
        generation: its temperature, top_p and seed.
        rows: of the batch.
        device: of the scores.
    """

    def __init__(self, generation: Generation, rows: int, device: torch.device) -> None:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self.temperature = TemperatureLogitsWarper(generation.temperature)
        self.top_p = TopPLogitsWarper(generation.top_p)
        self.generators = [
            torch.Generator(device).manual_seed(generation.seed) for _ in range(rows)
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (B, V) that leave one token a row."""
        scores = self.top_p(input_ids, self.temperature(input_ids, scores))
        rows = zip(scores.softmax(-1).split(1), self.generators, strict=True)
        drawn = torch.cat([torch.multinomial(row, 1, generator=source) for row, source in rows])
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


@contextmanager
def pruned(
    loaded: Loaded,
    preset: Preset,
    inputs: PreparedInputs | None,
    calibration: Calibration | None = None,
) -> Iterator[Trace]:
    """Prune the model in a block; running out of memory there is an error that says what fits.

    Args:
        calibration: in place of the model's own.
    """
    block = pruning(
        loaded.model,
        preset,
        threads="own",
        calibration=calibration or loaded.calibration,
        inputs=inputs,
    )
    with quiet(), block as trace, explain_out_of_memory(loaded, preset, trace):
        yield trace


def generate(
    loaded: Loaded,
    questions: Sequence[PreparedQuestion],
    preset: Preset,
    generation: Generation,
    *,
    features: FeatureCache | None = None,
    listeners: Sequence[Listener | None] = (),
    stopped: Callable[[], Sequence[bool]] | None = None,
    length: int | None = None,
) -> list[Run]:
    """Answer questions under a preset, as one batch; one run a question.

    Args:
        features: the vision encoders' features, kept from call to call.
        listeners: for each question, in order, what gets the pieces of its answer.
        stopped: asked after every token which answers nobody waits for any more, one a question;
            they end there.
        length: force exactly so many new tokens, greedily; for comparing times.

    Raises:
        ModelError: the model or the memory can't take it.
        PresetError: the preset can't be carried out on these prompts.
    """
    rows = [question.inputs for question in questions]
    tensors = batch_on_device(loaded, rows)
    stopping = None if stopped is None else StopRows(stopped)
    inputs = PreparedInputs.of(
        tensors, rows, features, loaded.encoder_cache, length or generation.max_new_tokens
    )
    compiled = loaded.compiled
    compiled_before = None if compiled is None else compiled.cost
    with pruned(loaded, preset, inputs) as trace:
        ids, seconds = generate_ids(loaded, tensors, generation, listeners, stopping, length)
    snapshot = trace.snapshot()
    compile_cost = None
    if compiled is not None and compiled_before is not None:
        compile_cost = compiled.cost.since(compiled_before)
        snapshot.warnings += compiled.warnings()
    if (streamed := rows[0].streamed) is not None:
        add_segments(snapshot, streamed)
        encoded = (streamed.seconds.get(name, 0.0) for name in ("vision", "select"))
        seconds["first_choice"] += sum(encoded)
        if compile_cost is not None and streamed.compile_cost is not None:
            compile_cost = compile_cost.plus(streamed.compile_cost)
    notes = (*snapshot.warnings, *past_last_position(loaded, tensors["input_ids"].shape[1], ids))
    if snapshot.unpruned:  # without hooks nobody knows where the tower ends and the decoder begins
        snapshot.durations["prefill"] = Duration(seconds["first_choice"])
    measured = dict.fromkeys(("vision", "select", "prefill"), 0.0) | snapshot.seconds
    tokenizer = loaded.files.tokenizer
    return [
        Run(
            answer=str(tokenizer.decode(row, skip_special_tokens=True)).strip(),
            tokens=row,
            seconds={**measured, **seconds, **question.seconds},
            trace=snapshot,
            sample=number,
            compile_cost=compile_cost,
            warnings=notes
            if length
            else (*notes, *unfinished_thinking(question.inputs.prompt, str(tokenizer.decode(row)))),
        )
        for number, (question, row) in enumerate(
            zip(
                questions,
                new_tokens(loaded, ids, answer_start(loaded, tensors), stopping),
                strict=True,
            )
        )
    ]


def add_segments(trace: Trace, streamed: StreamedVideo) -> None:
    """Add to a trace what the segments of a streamed video cost, and what their cuts left."""
    for name in ("vision", "select"):
        before = trace.durations.get(name, Duration())
        trace.durations[name] = before + Duration(streamed.seconds.get(name, 0.0))
    trace.warnings += [note for note in streamed.warnings if note not in trace.warnings]
    total, left = len(streamed.layout), len(streamed.index)
    if left == total or not trace.layouts:
        return
    video = len(trace.layouts[0].of_modality("video"))
    others = left - video
    trace.stages.insert(
        0,
        StageRecord(
            streamed.stage, 0, "video", [True], [total], [left], [total - others], [video],
            [trace.layouts[0].columns.tolist()], [None],
        ),
    )  # fmt: skip


def unfinished_thinking(prompt: str, written: str) -> tuple[str, ...]:
    """Return a warning where a model that thinks before it answers did not come to the answer.

    Args:
        prompt: as the chat template wrote it, which may begin the thinking.
        written: what the model wrote, special tokens included.
    """
    start, end = THINKING
    if end in written or not (prompt.rstrip().endswith(start) or written.startswith(start)):
        return ()
    return ("the answer ends inside the model's thinking: it needs more new tokens",)


def generate_batches(
    loaded: Loaded,
    questions: Sequence[PreparedQuestion],
    preset: Preset,
    generation: Generation,
    batch_size: int,
) -> Iterator[dict[int, Run]]:
    """Answer questions in left-padded batches; yield the runs of each batch by question number."""
    for numbers in group_alike([question.tensors for question in questions], batch_size):
        batch = [questions[number] for number in numbers]
        yield dict(zip(numbers, generate(loaded, batch, preset, generation), strict=True))


def generate_ids(
    loaded: Loaded,
    tensors: Mapping[str, torch.Tensor],
    generation: Generation,
    listeners: Sequence[Listener | None] = (),
    stopping: StopRows | None = None,
    length: int | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return (B, S) ids with the prompts, and seconds: "decode", and "first_choice" from the call.

    Args:
        tensors: the model's inputs, on its device.
        listeners, length: as of `generate`.
        stopping: ends rows before their end-of-sequence token.
    """
    stream = TextStream(loaded.files.tokenizer, listeners, end_tokens(loaded))
    options: dict[str, object] = {"max_new_tokens": length or generation.max_new_tokens}
    if length:
        options["min_new_tokens"] = length
    if generation.temperature > 0 and not length:
        rows = len(tensors["input_ids"])
        options["logits_processor"] = [Sampler(generation, rows, loaded.model.device)]
    if stopping is not None:
        options["stopping_criteria"] = [stopping]
    options |= {"do_sample": False, "num_beams": 1}
    options |= {"temperature": None, "top_p": None, "top_k": None}
    if loaded.compiled is not None:
        options |= loaded.compiled.cache_for(loaded.model, length or generation.max_new_tokens)
    started = clock()
    with torch.no_grad():
        call = cast("Callable[..., torch.Tensor]", loaded.model.generate)  # a union upstream
        with _errors_of_files(loaded):
            ids = call(**tensors, **options, streamer=stream, disable_compile=True)
    ended = clock()
    return ids, {"decode": ended - stream.first, "first_choice": stream.first - started}


@contextmanager
def _errors_of_files(loaded: Loaded) -> Iterator[None]:
    """Say whose error it is where a model's class can't run what its files and processor made."""
    try:
        yield
    except VtpruneError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or (loaded.family.listed and not _of_transformers(error)):
            raise
        raise ModelError(
            f"{loaded.name}: {type(loaded.model).__name__} does not run on what its own files "
            f"made ({type(error).__name__}: {error})",
            "check that config.json and the preparation files are of one repository; if they are, "
            "report it with what `vtprune --traceback ...` prints",
        ) from error


def _of_transformers(error: Exception) -> bool:
    """Return whether transformers raised an error, or torch that it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    callers = [module for module in modules if module.partition(".")[0] != "torch"]
    return callers[-1].startswith("transformers.")


def past_last_position(loaded: Loaded, prompt: int, ids: torch.Tensor) -> list[str]:
    """Return a warning where the answer, and not the prompt already, runs past the last position.

    Args:
        prompt: columns of the prompt.
        ids: (B, S) with the prompts.
    """
    try:
        structure = find_structure(loaded.model)
    except ModelError:  # it runs unpruned
        return []
    last, length = structure.num_positions, ids.shape[1]
    if last is None or not structure.one_dimensional or not prompt <= last < length:
        return []
    return [
        f"the answer ends at position {length:,}, and {loaded.name} has {last:,}: its end can be "
        "wrong; give a lower --max-new-tokens or a shorter prompt"
    ]


class StopRows:
    """A stopping criterion: the rows of a batch that are to end now.

    Attributes:
        lengths: row -> columns of its ids when it ended; what follows is padding.
    """

    def __init__(self, stopped: Callable[[], Sequence[bool]]) -> None:
        self.stopped = stopped
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        """Return (B,) bool for ids (B, S)."""
        stopped = self.stopped()
        for row, ends in enumerate(stopped):
            if ends:
                self.lengths.setdefault(row, input_ids.shape[1])
        return torch.tensor(stopped, dtype=torch.bool, device=input_ids.device)


def end_tokens(loaded: Loaded) -> list[int]:
    """Return the ids of the tokens that end an answer."""
    ends = getattr(loaded.model.generation_config, "eos_token_id", None)
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else [int(token) for token in ends]


def answer_start(loaded: Loaded, tensors: Mapping[str, torch.Tensor]) -> int:
    """Return where answers begin in generated ids: behind a prompt or a first token."""
    encoder = getattr(loaded.model.config, "is_encoder_decoder", False)
    return 1 if encoder else tensors["input_ids"].shape[1]


def new_tokens(
    loaded: Loaded, ids: torch.Tensor, prompt: int, stopping: StopRows | None = None
) -> list[torch.Tensor]:
    """Return what follows the prompt in every row, up to and with its end-of-sequence token.

    Args:
        stopping: that ended rows before.
    """
    ends = torch.tensor(end_tokens(loaded), dtype=torch.long)
    lengths = {} if stopping is None else stopping.lengths
    rows = []
    for number, row in enumerate(ids.cpu()):
        row = row[prompt : lengths.get(number)]
        stops = torch.isin(row, ends).nonzero()
        rows.append(row[: int(stops[0]) + 1] if len(stops) else row)
    return rows
