"""Pruning on CUDA devices that are not there: the same results, nothing mixed, few waits."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from conftest import save_clip, save_noise
from host_waits import (
    BY_TOKEN,
    FAMILY,
    MARK,
    PAGE,
    Run,
    keep_of,
    modality,
    on_both,
    on_device,
    prune,
    runs_in,
    runs_of,
    shared,
    tables,
    there,
    waits_in_selection,
)
from oracle import CACHE
from other_device import MEMORY, Devices, devices, move
from packaging.version import Version
from test_pixels import modality_of, shown
from transformers import PreTrainedModel

import vtprune
from vtprune.device import Delivery, Duration, free_memory, mark, now, send, total_memory
from vtprune.engine.inputs import PixelView, PreparedInputs
from vtprune.errors import ModelError
from vtprune.models.devices import find_device
from vtprune.pruners import METHODS

COUNTED = Version(transformers.__version__).release[:2] == (5, 23)
"""Whether this is the transformers that waits are counted with."""
Tensors = dict[str, torch.Tensor]


def assert_alike(here: Run, remote: Run, atol: float = 0.0) -> None:
    """What a device gave is what the CPU gives."""
    assert [stage.kept for stage in here.trace.stages] == [s.kept for s in remote.trace.stages]
    assert [stage.after for stage in here.trace.stages] == [s.after for s in remote.trace.stages]
    assert torch.equal(here.ids, remote.ids)
    torch.testing.assert_close(here.logits, remote.logits, atol=atol, rtol=0, equal_nan=True)


# -- the device itself -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda far: far + torch.ones(3),
        lambda far: torch.cat([far, torch.ones(1)]),
        lambda far: far.gather(0, torch.tensor([1])),
        lambda far: torch.ones(3)[far.long()],
        lambda far: far @ torch.ones(3, device="cuda:1"),
        lambda far: torch.nn.functional.embedding(torch.tensor([0]), far[:, None]),
        lambda far: far.__setitem__(torch.tensor([0, 1]), torch.ones(2)),
        lambda far: torch.zeros(()).add_(far.sum()),
    ],
)
def test_devices_are_not_mixed(mix) -> None:  # type: ignore[no-untyped-def]
    with devices(2), pytest.raises(RuntimeError, match=r"device|indices should be|values are on"):
        mix(torch.ones(3, device="cuda:0"))


def test_numbers_and_indices_from_the_cpu_are_taken() -> None:
    with devices():
        far = torch.arange(4.0, device="cuda")
        assert far.device == torch.device("cuda:0")
        assert (far + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]
        assert far[torch.tensor([2, 0])].tolist() == [2, 0]
        far[far > 1.5] = 9
        far[:2] += 5
        assert far.tolist() == [5, 6, 9, 9]
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            far.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("item", lambda far: far.sum().item()),
        ("item", lambda far: int(far[0])),
        ("item", lambda far: far[far.argmax()]),
        ("bool", lambda far: 1 if far.any() else 0),
        ("tolist", lambda far: far.tolist()),
        ("nonzero", lambda far: far.nonzero()),
        ("nonzero", lambda far: torch.where(far > 1)),
        ("boolean index", lambda far: far[far > 1]),
        ("unique", lambda far: far.unique()),
        ("equal", lambda far: torch.equal(far, far + 1)),
        ("repeat_interleave", lambda far: far.repeat_interleave(far.long())),
        ("bincount", lambda far: torch.bincount(far.long())),
        ("linalg", lambda far: torch.linalg.eigvalsh(far.diag())),
        ("to host", lambda far: far.cpu()),
        ("to host", lambda far: torch.zeros(3).copy_(far)),
        ("to device", lambda far: torch.ones(3).to(far.device)),
        ("to device", lambda far: far[torch.tensor([0])]),
        ("to device", lambda far: far[[0, 1]]),
        ("to device", lambda far: far.__setitem__(far.long(), 1.0)),
        ("to device", lambda far: far.__setitem__(0, 1.0)),
        ("to device", lambda far: torch.where(far > 1, far, torch.tensor(0.0))),
        ("to device", lambda far: torch.tensor([1.0], device=far.device)),
        ("synchronize", lambda far: now(far.device)),
        ("event", lambda far: Delivery(far).read()),
        ("event", lambda far: Duration.since(mark(far.device), far.device).seconds),
    ],
)
def test_every_wait_is_noted_once(kind: str, work) -> None:  # type: ignore[no-untyped-def]
    with devices() as there:
        far = torch.arange(3.0, device="cuda:0")
        work(far)
    assert [wait.kind for wait in there.waits] == [kind]


@pytest.mark.parametrize(
    "work",
    [
        lambda far: far.sort(stable=True).values.cumsum(0)[:2].clamp_min(0) * 2,
        lambda far: far.masked_fill(far > 1, 0.0),
        lambda far: far.__setitem__(far > 1, 0.0),
        lambda far: far.__setitem__(slice(1, 3), 0.0),
        lambda far: far.index_fill_(0, far.long(), 0.0),
        lambda far: far[far.long()],
        lambda far: torch.where(far > 1, far, 0.0),
        lambda far: send(torch.ones(3), far.device) + far,
        lambda far: far.to("cuda:1"),
        lambda far: torch.full((3,), 2.0, device=far.device).topk(2).indices,
    ],
)
def test_what_a_gpu_does_by_itself_is_no_wait(work) -> None:  # type: ignore[no-untyped-def]
    with devices(2) as there:
        far = torch.arange(3.0, device="cuda:0")
        work(far)
    assert not there.waits


def test_a_copy_that_nobody_waits_for_is_there_after_the_next_wait() -> None:
    with devices() as there:
        far = torch.arange(3, device="cuda:0")
        copy = far.to("cpu", non_blocking=True)
        delivery = Delivery(far)
        assert copy.tolist() != [0, 1, 2]
        assert not delivery.is_here
        far.add_(1)
        far.sum().item()
        assert copy.tolist() == [0, 1, 2]
        assert delivery.is_here
        assert delivery.read().tolist() == [0, 1, 2]
    assert [wait.kind for wait in there.waits] == ["item"]


def test_a_sum_of_times_does_not_keep_what_the_device_has_been_through() -> None:
    cpu = torch.device("cpu")
    assert not (Duration() + Duration.since(mark(cpu), cpu)).spans
    with devices() as there:
        far, total = torch.ones(1, device="cuda:0"), Duration()
        for _ in range(3):
            total += Duration.since(mark(far.device), far.device)
        assert len(total.spans) == 3
        far.sum().item()
        total += Duration.since(mark(far.device), far.device)
        assert len(total.spans) == 1
        assert 0 < total.known < total.seconds
    assert [wait.kind for wait in there.waits] == ["item", "event"]


# -- methods and families --------------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_TOKEN)
def test_every_method_gives_on_a_device_what_it_gives_on_a_cpu(method: str) -> None:
    here, remote = runs_of(method)
    assert_alike(here, remote)
    assert remote.trace.stages[-1].after < remote.trace.stages[0].before


@pytest.mark.parametrize("method", BY_TOKEN)
def test_the_host_waits_once_in_a_cut_and_never_in_layers(method: str) -> None:
    run = runs_of(method)[1]
    assert not run.between_layers
    assert not run.in_step(1)
    assert len(run.before_layers) == 1
    assert len(run.in_selection) == waits_in_selection(method, len(run.trace.stages))


def test_pruning_does_not_make_transformers_wait_more() -> None:
    inputs = tiny.inputs(FAMILY, shared(FAMILY), "image")
    with devices() as noted:
        model = there(shared(FAMILY))
        inputs = {name: value.to("cuda:0") for name, value in inputs.items()}
        full = prune(model, inputs, 3, noted, method="random", keep=1)
        pruned = prune(model, inputs, 3, noted, method="fastv", keep=0.5)
    counts = [sum(wait.place is None for wait in run.waits) for run in (full, pruned)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", BY_TOKEN)
def test_every_method_runs_in_half_precision(method: str, dtype: torch.dtype) -> None:
    inputs = tiny.inputs(FAMILY, shared(FAMILY, dtype), modality(FAMILY, method))
    here, remote = on_both(FAMILY, inputs, 1, dtype, method=method, keep=keep_of(method))
    assert_alike(here, remote)
    assert remote.logits.isfinite().all()
    assert remote.trace.stages[-1].after < remote.trace.stages[0].before
    counts = [stage.after for stage in remote.trace.stages]
    if METHODS[method].exact:
        assert counts == counts_of(method)


@functools.cache
def counts_of(method: str) -> list[list[int]]:
    """The tokens after each of the same cuts in float32."""
    inputs = tiny.inputs(FAMILY, shared(FAMILY), modality(FAMILY, method))
    run = prune(shared(FAMILY), inputs, 0, method=method, keep=keep_of(method))
    return [stage.after for stage in run.trace.stages]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_gives_on_a_device_what_it_gives_on_a_cpu(name: str) -> None:
    here, remote = runs_in(name)
    # Experts' products are grouped, and come in parts where they are not the CPU's own.
    assert_alike(here, remote, atol=1e-5 if "moe" in name else 0.0)
    assert len(remote.in_selection) <= len(remote.trace.stages)
    assert not remote.between_layers
    assert not remote.in_step(1)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": {"stages": [{"at": 2, "method": "dart", "per": "tile", "split": "entropy"}]}},
        {"preset": {"stages": [{"at": "input", "method": "uniform", "positions": "renumber"}]}},
        {"method": "fastv", "options": {"rest": "merge"}, "keep_for_turns": 0.3},
        {"method": "sparsevlm", "options": {"ratio": "rank"}},
        {"method": "random", "at": 2, "decode_every": 1, "decode_keep": 0.5},
    ],
    ids=["split", "renumber", "for turns", "rank", "decode"],
)
def test_options_and_batches_run_on_a_device(options: dict[str, object]) -> None:
    inputs = tiny.ragged(FAMILY, shared(FAMILY))
    here, remote = on_both(FAMILY, inputs, 2, **({"keep": 0.6} | options))
    assert_alike(here, remote, atol=1e-6)
    assert not remote.between_layers
    assert len(remote.in_step(1)) == len(remote.trace.decoding)
    assert [cut.visual for cut in here.trace.decoding] == [
        cut.visual for cut in remote.trace.decoding
    ]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_token_inside_the_prompt_is_refused_though_nobody_waits_for_its_place(steps: int) -> None:
    """In the next step, or where the block is left."""
    inputs = tiny.inputs(FAMILY, shared(FAMILY), "image")
    with devices() as noted:
        model = there(shared(FAMILY))
        forward = model.model.forward

        @functools.wraps(forward)
        def place(*args: Any, **kwargs: Any) -> Any:
            if (past := type(kwargs[CACHE]).get_seq_length(kwargs[CACHE])) > 0:
                kwargs["position_ids"] = torch.full((1, 1), past, device="cuda:0")
            return forward(*args, **kwargs)

        model.model.forward = place
        inputs = {name: value.to("cuda:0") for name, value in inputs.items()}
        with pytest.raises(ModelError, match=r"at position \d+, inside the prompt"):
            prune(model, inputs, steps, noted, method="uniform", keep=0.5)
    assert noted.forward == min(steps + 1, 3)


def test_times_are_read_from_the_device_once_they_are_asked_for() -> None:
    inputs = tiny.inputs(FAMILY, shared(FAMILY), "image")
    with devices() as noted:
        inputs = {name: value.to("cuda:0") for name, value in inputs.items()}
        run = prune(
            there(shared(FAMILY)), inputs, 2, noted,
            method="fastv", keep=0.5, decode_every=1, decode_keep=0.5,
        )  # fmt: skip
        assert {wait.kind for wait in run.ours} == {"to host"}
        seconds = run.trace.seconds
    assert 0 < seconds["select"] < seconds["prefill"]
    assert seconds["vision"] > 0
    assert all(0 < cut.seconds < 10 for cut in run.trace.decoding)
    assert run.trace.decoding


# -- before the vision tower -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "method", "waits"),
    [
        ("llava_onevision", "video", "predictable", 2),
        ("llava_onevision", "video", "scenes", 2),
        ("qwen3_vl", "video", "predictable", 5),
        ("internvl", "image", "predictable", 4),
        ("molmo2", "video", "predictable", 4),
    ],
)
def test_what_goes_at_pixels_goes_on_a_device_too(
    name: str, kind: str, method: str, waits: int
) -> None:
    if name not in tiny.MODELS:
        pytest.skip("not in this transformers")
    model, modality = shared(name), modality_of(name, kind)
    inputs = tiny.inputs(name, model, kind, sizes=((112, 112),) * 2, frames=8)
    units = shown(model, inputs, modality).units

    def run(model: PreTrainedModel, noted: Devices | None, inputs: Tensors) -> Run:
        view = PreparedInputs(pixels=PixelView(inputs, units))
        preset = {"stages": [{"at": "pixels", "method": method}]}
        return prune(model, inputs, 2, noted, preset=preset, modality=modality, inputs=view)

    here = run(model, None, inputs)
    with devices() as noted:
        far = {key: value.to("cuda:0") for key, value in inputs.items()}
        remote = run(on_device(name, torch.float32), noted, far)
    assert_alike(here, remote)
    assert remote.trace.stages[0].after < remote.trace.stages[0].before
    assert remote.before_layers == remote.ours
    assert len(remote.ours) == waits or not COUNTED


# -- two devices, as `--device map` has them -------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize(
    ("name", "method", "at"),
    [
        ("llava_onevision", "entropy", 2),
        ("llava_onevision", "fastv", 3),
        ("llava_onevision", "dart", 4),
        ("llava_onevision", "visionzip", "input"),
        ("qwen3_vl", "fastv", 4),
    ],
)
def test_cuts_before_and_behind_the_border_of_two_devices(
    name: str, method: str, at: int | str
) -> None:
    model = shared(name)
    inputs = tiny.inputs(name, model, "image")
    here = prune(model, inputs, 3, method=method, at=at, keep=0.85)
    with devices(2) as noted:
        split = split_over_two(name)
        layers = split.get_decoder().layers
        places = [next(layer.parameters()).device.index for layer in layers]
        assert places == [0, 0, 0, 1, 1, 1]
        inputs = {key: value.to("cuda:0") for key, value in inputs.items()}
        remote = prune(split, inputs, 3, noted, method=method, at=at, keep=0.85)
    assert_alike(here, remote)
    assert not remote.between_layers
    assert not remote.in_step(1)


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize("stages", [[3], ["input", 3], [2, 4]], ids=["border", "input", "around"])
@pytest.mark.parametrize("decode", [{}, {"decode_every": 1, "decode_keep": 0.7}], ids=["", "cut"])
def test_a_second_question_goes_on_with_a_cache_on_two_devices(
    stages: list[int | str], decode: dict[str, float]
) -> None:
    """Its cuts, those while decoding, and the layers before and behind the border of layer 3."""
    model = shared(FAMILY)
    inputs = tiny.inputs(FAMILY, model, "image")
    more = torch.randint(32, 127, (1, 5), generator=torch.Generator().manual_seed(9))
    named = [{"at": at, "method": "fastv" if at == 3 else "dart"} for at in stages]
    keeps = [{"keep": 0.9}, {}][-len(named) :]
    preset = {"stages": [stage | keep for stage, keep in zip(named, keeps, strict=True)]}
    keep = 0.85 if stages == [2, 4] else 0.75
    ask = functools.partial(dict, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)

    def run(model: torch.nn.Module, inputs: Tensors, more: torch.Tensor) -> tuple[Any, Any]:
        block = vtprune.pruning(model, preset=preset, keep=keep, **decode)
        with torch.no_grad(), block as trace:
            first = model.generate(**inputs, **ask())
            ids = torch.cat([first.sequences, more], dim=1)
            cache = {CACHE: first[CACHE], "attention_mask": torch.ones_like(ids)}
            second = model.generate(input_ids=ids, **cache, **ask(output_logits=True))
        return trace, torch.stack(second.logits, dim=1)

    trace, logits = run(model, inputs, more)
    with devices(2):
        split = split_over_two(FAMILY)
        far = {key: value.to("cuda:0") for key, value in inputs.items()}
        remote, remote_logits = run(split, far, more.to("cuda:0"))
    assert [stage.kept for stage in remote.stages] == [stage.kept for stage in trace.stages]
    assert [cut.visual for cut in remote.decoding] == [cut.visual for cut in trace.decoding]
    assert bool(trace.decoding) == bool(decode)
    torch.testing.assert_close(remote_logits.held, logits, atol=0, rtol=0)


def split_over_two(name: str) -> torch.nn.Module:
    """A model whose decoder begins on one device and ends on another, hooked by accelerate."""
    accelerate = pytest.importorskip("accelerate", reason="device maps need accelerate")
    model = copy.deepcopy(shared(name))
    prefix = next(path for path, module in model.named_modules() if module is model.get_decoder())
    layers = {f"{prefix}.layers.{number}": int(number > 2) for number in range(6)}
    whole = tuple(f"{layer}." for layer in layers)  # a layer is never split
    leaves = [path for path, module in model.named_modules() if not [*module.children()]]
    last = (f"{prefix}.norm", "lm_head")
    places = layers | {path: int(path in last) for path in leaves if not path.startswith(whole)}
    own = [
        path
        for path, _ in model.named_parameters()
        if path.rpartition(".")[0] not in places and not path.startswith(whole)
    ]
    split = accelerate.dispatch_model(model, places | dict.fromkeys(own, 0), main_device=0)
    for path in own:  # of no module that accelerate hooks; `from_pretrained` puts them there
        owner, _, weight = path.rpartition(".")
        module = split.get_submodule(owner)
        placed = module._parameters[weight].detach().to("cuda:0")
        module._parameters[weight] = torch.nn.Parameter(placed, requires_grad=False)
    return split


# -- from a file to the answer, as `--device cuda` has it ------------------------------------------


def test_a_question_is_answered_on_a_device_as_on_a_cpu(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    picture = save_noise(tmp_path / "noise.png", 90, 150)
    loaded, remote = (vtprune.load(str(checkpoints(FAMILY))) for _ in range(2))
    few = vtprune.Generation(max_new_tokens=4)
    ask = functools.partial(vtprune.answer, preset="fast", keep=0.5, generation=few)
    here = ask(loaded, [(picture, "what?"), (picture, "where?")])
    with devices(free=MEMORY - 12345) as noted:
        move(remote.model, "cuda:0")
        far = ask(remote, [(picture, "what?"), (picture, "where?")])
    assert [report.answer for report in far] == [report.answer for report in here]
    assert [report.tokens for report in far] == [report.tokens for report in here]
    assert far[0].model.device == "cuda:0"
    assert far[0].memory_bytes.peak == 12345
    assert "to device" not in {wait.kind for wait in noted.waits if wait.place}


def test_what_a_picture_repeats_goes_before_the_tower_of_a_device(  # type: ignore[no-untyped-def]
    checkpoints, tmp_path: Path
) -> None:
    picture = save_noise(tmp_path / "noise.png", 90, 150)
    loaded = vtprune.load(str(checkpoints(FAMILY)))
    ask = functools.partial(
        vtprune.answer,
        loaded,
        [([picture, picture], "what?")],
        preset={"stages": [{"at": "pixels", "method": "repeated"}]},
        generation=vtprune.Generation(max_new_tokens=2),
    )
    (here,) = ask()
    with devices():
        move(loaded.model, "cuda:0")
        (far,) = ask()
    assert (far.answer, far.tokens) == (here.answer, here.tokens)
    assert far.tokens.kept_after < far.tokens.visual


@pytest.mark.parametrize(
    ("name", "method", "share", "waits"),
    [
        (FAMILY, "random", "equal", 0),
        (FAMILY, "spread", "equal", 1),
        (FAMILY, "spread", "information", 3),
        (FAMILY, "visionzip", "equal", 1),
        ("qwen2_5_vl", "visionzip", "equal", 1),
        ("molmo2", "spread", "equal", 1),
    ],
)
def test_the_host_waits_in_a_streamed_video_as_often_as_its_cuts_read(  # type: ignore[no-untyped-def]
    name: str, method: str, share: str, waits: int, checkpoints, tmp_path: Path
) -> None:
    """And twice a video: whether the tower mixes frames, and for the time that all took."""
    if name not in tiny.MODELS:
        pytest.skip("not in this transformers")
    clip, loaded = save_clip(tmp_path / "clip", 7), vtprune.load(str(checkpoints(name)))
    ask = functools.partial(
        vtprune.ask, loaded, clip, "what?", method=method, at="input", keep=0.3,
        stream={"frames": 4, "keep": 0.5, "share": share}, sampling=vtprune.Sampling(frames=7),
        generation=vtprune.Generation(max_new_tokens=2),
    )  # fmt: skip
    here = ask()
    with devices() as noted:
        move(loaded.model, "cuda:0")
        far = ask()
    assert (far.answer, far.tokens) == (here.answer, here.tokens)
    assert far.tokens.stages[0].at == "segments"
    assert far.seconds.vision > 0
    inside = [wait for wait in noted.waits if wait.place and wait.inside("encode_segments")]
    assert len(inside) == 2 + 2 * waits


@pytest.mark.parametrize("name", [FAMILY, "qwen2_5_vl"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_smaller_media_are_those_of_a_cpu(  # type: ignore[no-untyped-def]
    name: str, kind: str, checkpoints, tmp_path: Path
) -> None:
    picture, clip = save_noise(tmp_path / "noise.png", 300, 500), save_clip(tmp_path / "clip", 12)
    loaded = vtprune.load(str(checkpoints(name)))
    ask = functools.partial(
        vtprune.ask, loaded, picture if kind == "image" else clip, "what?", method="downsample",
        keep=0.6, generation=vtprune.Generation(max_new_tokens=2),
    )  # fmt: skip
    here = ask()
    with devices() as noted:
        move(loaded.model, "cuda:0")
        far = ask()
    assert (far.answer, far.tokens, far.input) == (here.answer, here.tokens, here.input)
    assert 0 < far.tokens.kept_after <= 0.6 * far.tokens.visual
    assert not [wait for wait in noted.waits if wait.place and wait.inside("shrink_media")]


# -- torch.cuda ------------------------------------------------------------------------------------


def test_devices_are_found_by_name() -> None:
    with devices(2):
        assert find_device("auto").type == "cuda"
        assert find_device("map").type == "cuda"
        assert find_device("cuda:1").index == 1
        with pytest.raises(ModelError, match="cuda:2"):
            find_device("cuda:2")
    with pytest.raises(ModelError, match="no such device"):
        find_device("cuda")


def test_memory_is_the_devices() -> None:
    device = torch.device("cuda:0")
    with devices(free=1234):
        assert free_memory(device) == 1234
        assert total_memory(device) == MEMORY


def test_the_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronized: list[torch.device] = []
    with devices():
        monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
        now(torch.device("cuda:1"))
        now(torch.device("cpu"))
    assert synchronized == [torch.device("cuda:1")]


@pytest.mark.parametrize(("free", "cuts"), [(MEMORY, False), (700_000, True)])
def test_what_fits_is_what_the_device_has_free(free: int, cuts: bool) -> None:
    inputs = tiny.inputs(FAMILY, shared(FAMILY), "image")
    with devices(free=free):
        model = there(shared(FAMILY))
        inputs = {name: value.to("cuda:0") for name, value in inputs.items()}
        with vtprune.pruning(model, method="uniform", fit="memory") as trace, torch.no_grad():
            model(**inputs)
    assert (len(trace.kept[0]) < len(trace.layouts[0])) == cuts


# -- the page --------------------------------------------------------------------------------------


@pytest.mark.skipif(not COUNTED, reason="counted with transformers 5.23")
def test_the_page_has_what_is_counted() -> None:
    assert PAGE.read_text(encoding="utf-8").split(MARK)[1].strip() == tables()
