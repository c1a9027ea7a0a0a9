"""What visual tokens receive of their vision tower's attention, against the models' own code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import oracle
import pytest
import test_pixels
import tiny
import torch
import transformers
from conftest import shared_model
from packaging.version import Version
from torch import nn

import vtprune
from vtprune.engine import tower_attention as tower
from vtprune.engine.inputs import PreparedInputs
from vtprune.engine.readings import KernelCall, received
from vtprune.engine.tower_attention import (
    FrameRows,
    MisfitError,
    StepRows,
    TiledRows,
    distribute,
    gather_patches,
    pool,
)
from vtprune.errors import ModelError
from vtprune.models.anyres import Plane, tiled_grid
from vtprune.models.generic import GenericFamily
from vtprune.pruners import METHODS, Method
from vtprune.pruners.base import TOWER, Budget, Selection, VisualTokens
from vtprune.tokens.layout import CLS, NEWLINE, PATCH, box, join, lay_out, single

CELLS = [(name, kind) for name in tiny.MODELS for kind in tiny.KINDS[name]]


@dataclass(frozen=True)
class Watcher:
    """Keeps the first tokens and remembers what it was given."""

    given: ClassVar[list[VisualTokens]] = []
    needs: ClassVar[tuple[str, ...]] = ("tower_attention",)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        self.given.append(tokens)
        return Selection(torch.arange(len(tokens))[: budget.count])


@pytest.fixture(autouse=True)
def watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watcher, "given", [])
    entry = Method(path=f"{__name__}:Watcher", at="input", summary="watches")
    monkeypatch.setitem(METHODS, "watcher", entry)


STAGES: dict[str, Any] = {"stages": [{"at": "input", "method": "watcher", "keep": 0.5}]}


def watched(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> list[torch.Tensor]:
    """What every sample's tokens receive."""
    Watcher.given.clear()
    with vtprune.pruning(model, STAGES):
        oracle.generate(model, inputs, steps=1, **kwargs)
    return [tokens.states["tower_attention"] for tokens in Watcher.given]


# -- against the models' own code -----------------------------------------------------------------

PIXELS = {
    "image": ("pixel_values_images", "pixel_values"),
    "video": ("pixel_values_videos", "pixel_values"),
}


def attention_of(model: Any, modality: str) -> nn.Module:
    path = tiny.FAMILIES[model.config.model_type].attention.format(modality=modality)
    first, _, rest = path.partition(".")
    found = [
        module
        for path, module in model.model.named_modules()
        if path.startswith(f"{first}.") and path.endswith(f".{rest}")
    ]
    assert len(found) == 1
    return found[0]


@contextmanager
def noting(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The eager probabilities, (B, H, S, S), of every call of one module's kernel."""
    noted: list[torch.Tensor] = []
    code = sys.modules[type(module).__module__]
    plain: Callable[..., Any] = code.eager_attention_forward

    def attend(own: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = plain(own, *args, **kwargs)
        if own is module:
            noted.append(out[1].detach())
        return out

    with monkeypatch.context() as patch:
        patch.setattr(code, "eager_attention_forward", attend)
        yield noted


def mean_of(width: int, together: int = 1) -> Callable[..., torch.Tensor]:
    """A projector that says the mean of what it is given, of `together` rows at once."""

    def forward(states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        if together > 1:
            states = states.reshape(len(states) // together, -1)
        return states.mean(-1, keepdim=True).expand(*states.shape[:-1], width)

    return forward


def through_the_model(
    model: Any, modality: str, rows: list[torch.Tensor], inputs: Any, patch: pytest.MonkeyPatch
) -> torch.Tensor:
    """(T,) of all the tokens that an encoder call makes, when its patches say `rows`.

    The tower's layers put out their patch's value in every channel, the projector takes the mean,
    and what lies between and behind them (order, pooling, tiles, padding) is the model's own.
    """
    inner, width = model.model, model.config.text_config.hidden_size
    module = attention_of(model, modality)
    path = next(path for path, one in inner.named_modules() if one is module)
    layers = inner.get_submodule(path.rsplit(".", 2)[0])
    assert isinstance(layers, nn.ModuleList)

    def say(_: nn.Module, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        said = torch.cat(rows).reshape(states.shape[:-1])[..., None].expand(states.shape)
        said = said.contiguous()
        return (said, *output[1:]) if isinstance(output, tuple) else said

    project(inner, width, patch)
    handles = [layer.register_forward_hook(say, prepend=True) for layer in layers]
    try:
        with torch.no_grad():
            features = encode(inner, modality, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(features, torch.Tensor):
        features = torch.cat([one.reshape(-1, width) for one in features])
    return features.reshape(-1, width).mean(-1)


def project(inner: Any, width: int, patch: pytest.MonkeyPatch) -> None:
    """Has everything behind the tower's layers that has weights give its inputs' mean."""

    def be(module: nn.Module, forward: Callable[..., object]) -> None:
        patch.setattr(module, "forward", forward)

    for path, module in inner.named_modules():  # norms behind the last layer
        if path.endswith((".post_layernorm", "vision_tower.layernorm", ".mm_soft_emb_norm")):
            be(module, lambda states, *_, **__: states)
    visual = getattr(inner, "visual", None)
    projector = getattr(inner, "multi_modal_projector", None)
    if hasattr(visual, "downsample"):  # GLM-4V
        be(visual.merger, lambda states: states)
        be(visual.downsample, lambda x: x.mean((1, 2, 3), keepdim=True).expand(-1, width, 1, 1))
    elif visual is not None:
        be(visual.merger, mean_of(width, visual.spatial_merge_size**2))
    elif hasattr(inner, "connector"):  # Idefics3 and SmolVLM
        be(inner.connector.modality_projection, mean_of(width))
    elif hasattr(projector, "image_pooling_2d"):  # Molmo2
        be(projector.image_pooling_2d, lambda query, *_, **__: (query, None))
        be(projector.image_projector, mean_of(width))
    elif hasattr(projector, "mm_input_projection_weight"):  # Gemma 3
        weight = projector.mm_input_projection_weight
        patch.setattr(weight, "data", torch.ones_like(weight) / len(weight))
    else:
        merge = tiny.FAMILIES[inner.config.model_type].merge or (lambda _, states: states)
        be(projector, lambda states: mean_of(width)(merge(projector, states)))


def encode(inner: Any, modality: str, inputs: dict[str, torch.Tensor]) -> Any:
    """The features of the pictures, or of the videos, of `inputs`."""
    call = inner.get_image_features
    pixels = next(key for key in PIXELS[modality] if key in inputs)
    if pixels == "pixel_values_videos":
        call = inner.get_video_features
    own = "video" if pixels == "pixel_values_videos" else "image"
    takes = inspect.signature(call).parameters
    given = {
        key: value
        for key, value in inputs.items()
        if (key in takes and key.split("_")[0] in (own, "batch")) or key == "pixel_attention_mask"
    }
    return call(inputs[pixels], **given, return_dict=True).pooler_output


def check_against_the_model(
    name: str, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, eager = shared_model(name), shared_model(name, "eager")
    eager.load_state_dict(model.state_dict())
    (found,) = watched(model, inputs)
    layout = Watcher.given[0].layout
    for modality in ("image", "video"):
        index = layout.of_modality(modality)
        if not len(index):
            continue
        with noting(attention_of(eager, modality), monkeypatch) as noted, torch.no_grad():
            encode(eager.model, modality, inputs)
        by_cls = tiny.FAMILIES[eager.config.model_type].has_cls
        means = [one for probabilities in noted for one in probabilities.mean(1)]
        rows = [(one[0] if by_cls else one.mean(0)) * one.shape[1] for one in means]
        with monkeypatch.context() as patch:
            expected = through_the_model(eager, modality, rows, inputs, patch)
        kind, own = layout.grid.kind[index], found[index]
        if len(expected) == len(index):  # transformers 5.17 adds a video's newline later
            expected = expected[kind == PATCH]
        torch.testing.assert_close(own[kind == PATCH], expected, atol=1e-6, rtol=1e-4)
        assert float(own[kind == PATCH].std()) > 1e-2
        assert not own[kind == NEWLINE].any()
        for frame in layout.grid.frame[index][kind == CLS].tolist():
            assert own[kind == CLS][frame] == rows[frame].max()


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_tokens_receive_what_the_model_s_own_code_makes_of_its_patches(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny.inputs(name, shared_model(name), kind)
    check_against_the_model(name, inputs, monkeypatch)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
def test_tokens_receive_in_the_mean_and_in_layers_on_the_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watcher, "needs", TOWER)
    model, eager = shared_model(name), shared_model(name, "eager")
    eager.load_state_dict(model.state_dict())
    if name == "llava":  # two layers: the last is another than that a third down
        monkeypatch.setattr(model.config, "vision_feature_layer", -1)
        monkeypatch.setattr(eager.config, "vision_feature_layer", -1)
    inputs = tiny.inputs(name, model, "image")
    watched(model, inputs)
    (tokens,) = Watcher.given
    patch = tokens.layout.grid.kind == PATCH
    part = tower.find_tower(vtprune.models.structure.find_structure(eager), "image", {})
    assert (part.last is part.middle) == (name != "llava")
    assert part.has_cls == (name != "qwen2_5_vl")
    for state, module in (("mean", part.last), ("middle", part.middle), ("early", part.early)):
        with noting(module, monkeypatch) as noted, torch.no_grad():
            encode(eager.model, "image", inputs)
        by_cls = part.has_cls and state == "early"
        received = [
            one[0] if by_cls else one.mean(0)
            for probabilities in noted
            for one in probabilities.mean(1)
        ]
        rows = [one * len(one) for one in received]
        with monkeypatch.context() as changed:
            expected = through_the_model(eager, "image", rows, inputs, changed)
        read = tokens.states[f"tower_{state}_attention"][patch]
        torch.testing.assert_close(read, expected[patch], atol=1e-6, rtol=1e-4)
        assert float(read.std()) > 1e-2


def test_layers_on_the_way_are_the_published_ones() -> None:
    structure: Any = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace()))
    assert tower._layer_at(structure, tower.MIDDLE, 24, 22) == 8  # HiPrune: the ninth of CLIP's
    assert tower._layer_at(structure, tower.EARLY, 24, 22) == 5  # VScan: the sixth
    assert tower._layer_at(structure, tower.EARLY, 2, 1) == 0
    structure.config.vision_config.fullatt_block_indexes = [7, 15, 23, 31]
    assert tower._layer_at(structure, tower.MIDDLE, 32, 31) == 15  # the sixteenth of Qwen2.5-VL's
    assert tower._layer_at(structure, tower.EARLY, 32, 31) == 7  # the eighth


@pytest.mark.parametrize("size", [(168, 168), (168, 100), (40, 168), (300, 20)])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_pictures_that_are_padded_or_interpolated_are_mapped_like_their_features(
    name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny.inputs(name, shared_model(name), "image", sizes=[size])
    check_against_the_model(name, inputs, monkeypatch)


# -- batches, caches and calls --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llava_next", "several"), ("qwen2_5_vl", "mixed"), ("internvl", "image"), ("gemma3", "image"),
     ("llava_onevision", "video")],
)  # fmt: skip
def test_a_ragged_batch_and_beams_receive_as_alone(name: str, kind: str) -> None:
    model = shared_model(name)
    rows = tiny.two(name, model, kind)
    alone = [watched(model, row)[0] for row in rows]
    together = watched(model, tiny.left_pad(name, rows))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)
    old = Version(transformers.__version__) < Version("5.23")
    # The model itself mixes up several pictures of a beam; before 5.23 InternVL the tiles of one.
    if kind != "several" and not (old and name == "internvl"):
        beams = watched(model, rows[0], num_beams=3)
        assert len(beams) == 3
        for one in beams:
            torch.testing.assert_close(one, alone[0])


def test_a_forward_without_generate_receives_the_same() -> None:
    model = shared_model("llava_next")
    inputs = tiny.inputs("llava_next", model, "image")
    (expected,) = watched(model, inputs)
    Watcher.given.clear()
    with vtprune.pruning(model, STAGES), torch.no_grad():
        model(**inputs)
    torch.testing.assert_close(Watcher.given[0].states["tower_attention"], expected)


def test_features_from_an_earlier_block_bring_what_they_received() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "video")
    (expected,) = watched(model, inputs)
    calls: list[None] = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(None))
    encoded: vtprune.engine.inputs.FeatureCache = {}
    middle = {"stages": [{"at": "input", "method": "hiprune", "keep": 0.5}]}
    random = {"stages": [{"at": "input", "method": "random", "keep": 0.5}]}
    counts = []
    # What random left, and what says less than hiprune asks for, is encoded once more.
    for preset in (random, STAGES, STAGES, random, middle, middle):
        Watcher.given.clear()
        with vtprune.pruning(model, preset, inputs=PreparedInputs(features=encoded)):
            oracle.generate(model, inputs, steps=1)
        counts.append(len(calls))
        for tokens in Watcher.given:
            assert torch.equal(tokens.states["tower_attention"], expected)
    handle.remove()
    assert counts == [1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(("name", "kind"), test_pixels.CASES)
def test_what_goes_before_the_tower_leaves_what_the_others_receive(name: str, kind: str) -> None:
    model = shared_model(name)
    inputs = test_pixels.prompts(name, model, kind, "ragged")
    modality = test_pixels.modality_of(name, kind)
    shown = test_pixels.shown(model, inputs, modality)
    stage = {"at": "input", "method": "watcher", "keep": 0.05}
    found = []
    for stages in ([stage], [test_pixels.STAGE, stage]):
        Watcher.given.clear()
        with vtprune.pruning(
            model, {"stages": stages}, modality=modality, inputs=PreparedInputs(pixels=shown)
        ):
            oracle.generate(model, inputs, steps=1)
        found.append([(one.layout, one.states["tower_attention"]) for one in Watcher.given])
    for (every, whole), (left, part) in zip(*found, strict=True):
        place = torch.searchsorted(every.columns, left.columns)
        torch.testing.assert_close(part, whole[place], atol=1e-5, rtol=1e-4)


def test_the_tower_is_read_only_where_a_method_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(vtprune.engine.vision_encoder, "find_tower", refuse)
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    with vtprune.pruning(model, method="entropy", keep=0.5):
        oracle.generate(model, inputs, steps=1)
    with vtprune.pruning(model, method="watcher", keep=1.0):
        oracle.generate(model, inputs, steps=1)
    with pytest.raises(AssertionError, match="read"), vtprune.pruning(model, STAGES):
        oracle.generate(model, inputs, steps=1)


def test_features_that_were_encoded_before_the_block_can_not_be_read_for() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    preset = {"stages": [{"at": "input", "method": "visionzip", "keep": 0.4}]}
    with torch.no_grad():
        features = model.model.get_image_features(
            inputs.pop("pixel_values"), inputs["image_sizes"], return_dict=True
        )
        with (
            vtprune.pruning(model, preset),
            pytest.raises(ModelError, match="encoded before this block"),
        ):
            model(**inputs, mm_encoder_outputs={"image": features})


def test_reading_a_tower_leaves_its_features_and_kernels_alone() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    before, attention = dict(ALL_ATTENTION_FUNCTIONS), attention_of(model, "image")
    with torch.no_grad():
        expected = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        hooks = dict(attention._forward_hooks)  # transformers puts one on by itself
        with vtprune.pruning(model, STAGES):
            read = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        assert torch.equal(torch.cat(list(expected)), torch.cat(list(read)))
        with pytest.raises(ValueError, match="doesn't match"), vtprune.pruning(model, STAGES):
            model.model.get_image_features(inputs["pixel_values"][..., :5])
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert dict(attention._forward_hooks) == hooks
    assert not attention._forward_pre_hooks


@pytest.mark.parametrize("name", tiny.MODELS)
def test_visionzip_runs_on_every_family(name: str) -> None:
    model = shared_model(name)
    for kind in tiny.KINDS[name]:
        with vtprune.pruning(model, method="visionzip", keep=0.4) as trace:
            oracle.generate(model, tiny.inputs(name, model, kind), steps=2)
        total = len(trace.layouts[0])
        assert trace.stages[0].layer == 0
        assert trace.stages[0].after == [max(1, int(0.4 * total + 1e-6))]


# -- what is refused ------------------------------------------------------------------------------


def test_a_tower_whose_features_are_its_embeddings_is_refused() -> None:
    model = tiny.model("llava", vision_feature_layer=0)
    with (
        pytest.raises(
            ModelError, match="projector is not given what a layer of its tower says"
        ) as e,
        vtprune.pruning(model, STAGES),
    ):
        oracle.generate(model, tiny.inputs("llava", model, "image"), steps=1)
    assert "uniform" in e.value.hint


def test_a_family_whose_tokens_have_no_known_place_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vtprune.models.structure, "find_family", GenericFamily)
    model = shared_model("llava")
    with (
        pytest.raises(ModelError, match="where its vision tower's patches end up is not known"),
        vtprune.pruning(model, STAGES),
    ):
        oracle.generate(model, tiny.inputs("llava", model, "image"), steps=1)


def test_a_tower_without_a_known_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "ATTENTION", ("mixer",))
    model = shared_model("llava")
    with (
        pytest.raises(ModelError, match="a layer of its tower has no attention to read"),
        vtprune.pruning(model, STAGES),
    ):
        oracle.generate(model, tiny.inputs("llava", model, "image"), steps=1)


def test_rows_that_are_not_those_of_the_tokens_are_refused() -> None:
    structure = vtprune.models.structure.find_structure(shared_model("llava"))
    layout = lay_out({"image": torch.arange(16)}, {"image": [box(1, 4, 4)]})

    def read(*rows: torch.Tensor) -> list[torch.Tensor]:
        given = {"tower_attention": tower.TowerReading(True, [row[None] for row in rows])}
        return [s[:, 0] for s in tower.read_scores(structure, {"image": given}, [layout])]

    assert torch.equal(read(torch.ones(17) / 17)[0], torch.ones(16))
    for rows in ([torch.ones(17)] * 2, [torch.ones(13)], []):
        with pytest.raises(ModelError, match="rows of its tower are not those of the image tokens"):
            read(*rows)
    with pytest.raises(ModelError, match="the pictures were encoded before this block"):
        tower.read_scores(structure, {"image": {}}, [layout])


# -- what is received -----------------------------------------------------------------------------


def probabilities(call: KernelCall, seen: torch.Tensor) -> torch.Tensor:
    """(B, S, S) mean over the heads, by the definition, in float64."""
    scores = call.query.double() @ call.key.double().transpose(-1, -2) * call.scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).mean(1)


def random_call(batch: int, length: int, **kwargs: Any) -> KernelCall:
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(batch, 3, length, 8, generator=generator) for _ in range(2))
    return KernelCall(query, key, 0.7, **kwargs)


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
@pytest.mark.parametrize("by_first", [True, False])
def test_what_is_received_is_the_mean_over_heads_and_queries(
    by_first: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vtprune.engine.readings, "CHUNK", chunk)
    call = random_call(2, 9)
    whole = probabilities(call, torch.ones(9, 9, dtype=torch.bool))
    expected = whole[:, 0] if by_first else whole.mean(1)
    found = torch.stack(received(call, by_first))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(2))


@pytest.mark.parametrize("additive", [True, False])
def test_padding_neither_receives_nor_counts_as_a_query(additive: bool) -> None:
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    seen[1, :, :, 6:] = False
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    call = random_call(2, 9, mask=bias if additive else seen)
    expected = probabilities(call, seen)
    found = received(call, by_first=False)
    torch.testing.assert_close(found[0].double(), expected[0].mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        found[1][:6].double(), expected[1][:6, :6].mean(0), atol=1e-6, rtol=1e-5
    )
    assert not found[1][6:].any()


def test_sequences_one_after_the_other_are_taken_apart() -> None:
    call = random_call(1, 9, bounds=torch.tensor([0, 4, 9], dtype=torch.int32))
    found = received(call, by_first=False)
    assert [len(one) for one in found] == [4, 5]
    for part, (first, end) in zip(found, ((0, 4), (4, 9)), strict=True):
        own = KernelCall(call.query[:, :, first:end], call.key[:, :, first:end], call.scale)
        torch.testing.assert_close(part, received(own, by_first=False)[0])


def test_grouped_heads_share_their_keys() -> None:
    call = random_call(1, 7)
    query = torch.cat([call.query, call.query.flip(2)], dim=1)[:, [0, 3, 1, 4, 2, 5]]
    shared = received(KernelCall(query, call.key, 0.7), by_first=False)[0]
    twice = KernelCall(query, call.key.repeat_interleave(2, dim=1), 0.7)
    torch.testing.assert_close(shared, received(twice, by_first=False)[0])


# -- patches and tokens, by hand ------------------------------------------------------------------


def test_squares_of_patches_are_joined_and_the_rest_cut_off() -> None:
    patches = torch.arange(16.0).view(4, 4)
    assert pool(patches, (4, 4)).tolist() == patches.tolist()
    assert pool(patches, (2, 2)).tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert pool(torch.arange(25.0).view(5, 5), (2, 2)).tolist() == [[3.0, 5.0], [13.0, 15.0]]
    odd = torch.arange(729.0).view(27, 27)  # LLaVA-OneVision's frames
    expected = nn.functional.interpolate(odd[None, None], (14, 14), mode="bilinear")[0, 0]
    assert torch.equal(pool(odd, (14, 14)), expected)


def test_a_cls_token_gets_the_most_and_a_newline_nothing() -> None:
    grid = join([single(CLS), box(1, 2, 2), single(NEWLINE, row=1, col=2)])
    found = FrameRows(has_cls=True).score_frame(grid, torch.tensor([0.1, 0.2, 0.4, 0.25, 0.05]))
    assert found.tolist() == pytest.approx([0.4, 0.2, 0.4, 0.25, 0.05, 0.0])


def test_rows_that_did_not_run_count_as_the_least() -> None:
    gone, there = torch.zeros(0), torch.ones(4)
    video = box(3, 2, 2)
    assert (
        FrameRows(False).score(0, video, [there, gone, there]).tolist()
        == [1.0] * 4 + [0.0] * 4 + [1.0] * 4
    )
    assert (
        StepRows(1).score(0, video, [gone, there, gone]).tolist()
        == [0.0] * 4 + [1.0] * 4 + [0.0] * 4
    )
    tiles = tiled_grid((4, 8), [(4, 8)], tile=4, side=2)  # a base picture, two tiles, newlines
    found = TiledRows(False, [Plane(1, 2)]).score(0, tiles, [there, gone, there])
    assert found.tolist() == [1.0] * 4 + [0.0, 0.0, 1.0, 1.0, 0.0] * 2
    pooling = torch.tensor([[0, 3], [4, -1], [7, 8], [-1, -1]])
    assert gather_patches([there, gone, there], pooling).tolist() == [1.0, 0.0, 0.5]


def test_a_token_of_fewer_patches_has_their_mean() -> None:
    rows = [torch.tensor([1.0, 2.0, 4.0])]
    assert gather_patches(rows, torch.tensor([[0, 1], [2, -1]])).tolist() == [1.5, 4.0]


def test_windows_are_put_back_in_rows() -> None:
    # 3 x 3 tokens in windows of 2 x 2: the tower goes through 0 1 3 4, 2 5, 6 7, 8.
    received_by = torch.tensor([0.0, 1, 3, 4, 2, 5, 6, 7, 8]).repeat_interleave(4)
    found = StepRows(4, window=2).score(0, box(1, 3, 3), [received_by])
    assert found.tolist() == list(range(9))


def test_repeated_samples_get_what_the_first_gets() -> None:
    layouts = [lay_out({"image": torch.arange(n)}, {"image": [box(1, 1, n)]}) for n in (2, 2, 3, 3)]
    own = [torch.arange(len(layout)) for layout in layouts]
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])]
    found = distribute(layouts, own, rows, FrameRows(False))
    assert [one.tolist() for one in found] == [[1, 2], [1, 2], [3, 4, 5], [3, 4, 5]]
    with pytest.raises(MisfitError):
        distribute(layouts, own, rows[:1], FrameRows(False))
    with pytest.raises(MisfitError):
        distribute(layouts, own, [*rows, rows[0]], FrameRows(False))
