"""The library as Python code calls it: names, types, and items that fail."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vtprune
from vtprune.errors import MediaError, ModelError, PresetError

ROOT = Path(__file__).parent.parent
SHORT = vtprune.Generation(max_new_tokens=2)
SCRIPT = """\
import vtprune

report = vtprune.ask(
    None, "a.png", "what?", keep=0.3, method="entropy", at=2, options={"norm": "none"}, seed=1,
    sampling=vtprune.Sampling(max_tiles=4), generation=vtprune.Generation(max_new_tokens=8),
    limits=vtprune.Limits(), compare=True,
)
kept: int = report.tokens.kept_after
vision: float | None = report.flops.vision
if report.compare is not None:
    speedup: float = report.compare.prefill_speedup
model: vtprune.Loaded = vtprune.load("embedded")
for one in vtprune.answer(model, [("a.png", "what?"), (["b.png", "c.png"], "which?")], keep=0.5):
    error: vtprune.VtpruneError | None = one.error
    stages: list[str] = [stage.method for stage in one.tokens.stages]
with vtprune.pruning(model.model, preset=vtprune.load_preset("balanced")) as trace:
    layers: list[int] = [stage.layer for stage in trace.stages]
reveal_type(report)
reveal_type(trace)
wrong: str = report.tokens.kept_after
"""


def test_every_public_name_is_listed_found_and_described() -> None:
    assert dir(vtprune) == sorted([*vtprune.__all__, "__version__"])
    assert sorted(vtprune.__all__) == vtprune.__all__
    assert set(vtprune._LAZY) <= set(vtprune.__all__)
    for name in vtprune.__all__:
        assert inspect.getdoc(getattr(vtprune, name)), name
    text = pydoc.plain(pydoc.render_doc(vtprune))
    for name in ("ask(", "answer(", "load(", "pruning(", "class Report", "class Sampling"):
        assert name in text, name


def test_the_names_are_there_without_torch() -> None:
    code = "import sys, vtprune; dir(vtprune); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_editor_sees_the_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    assert (ROOT / "vtprune" / "py.typed").is_file()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # Types of the packages behind ours are not read: that takes ten times as long.
    others = "torch.*,transformers.*,numpy.*,huggingface_hub.*,tokenizers.*,jinja2.*,pydantic.*"
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n"
        f"[mypy-{others}]\nfollow_imports = skip\nfollow_imports_for_stubs = true\n"
    )
    command = [
        sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"),
        "script.py",
    ]  # fmt: skip
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"MYPYPATH": str(ROOT), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert any('Revealed type is "vtprune.inference.report.Report"' in line for line in lines)
    assert any('Revealed type is "vtprune.engine.trace.Trace"' in line for line in lines)
    errors = [line for line in lines if ": error:" in line]
    assert len(errors) == 1, result.stdout + result.stderr
    assert 'expression has type "int", variable has type "str"' in errors[0]


def test_one_question_is_one_report(loaded: vtprune.Loaded, picture: Path) -> None:
    options = {"method": "entropy", "at": 2, "options": {"norm": "none"}, "seed": 3}
    report = vtprune.ask(loaded, picture, "what?", keep=0.4, generation=SHORT, **options)  # type: ignore[arg-type]
    assert (report.preset.method, report.preset.seed) == ("entropy", 3)
    assert report.tokens.stages[0].options["norm"] == "none"
    assert report.error is None
    (same,) = vtprune.answer(loaded, [(picture, "what?")], keep=0.4, generation=SHORT, **options)  # type: ignore[arg-type]
    assert (same.answer, same.tokens) == (report.answer, report.tokens)


@pytest.mark.parametrize("compare", [False, True])
def test_the_other_items_are_answered_where_one_file_is_bad(
    loaded: vtprune.Loaded, picture: Path, tmp_path: Path, compare: bool
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    items = [(picture, "what?"), (bad, "what?"), (picture, " "), (picture, "which?")]
    reports = vtprune.answer(loaded, items, keep=0.4, generation=SHORT, compare=compare)
    assert [report.error is None for report in reports] == [True, False, False, True]
    assert reports[0].answer == vtprune.ask(loaded, picture, "what?", keep=0.4,
                                            generation=SHORT).answer  # fmt: skip
    assert isinstance(reports[1], vtprune.FailedReport)
    assert isinstance(reports[1].error, MediaError)
    assert reports[1].files == [str(bad)]
    values = reports[1].to_dict()
    assert values.keys() == {"question", "files", "error", "hint"}
    assert "bad.png" in str(values["error"])
    with pytest.raises(MediaError, match=r"bad\.png"):
        _ = reports[1].answer
    with pytest.raises(ModelError, match="the question is empty"):
        _ = reports[2].tokens
    assert "FailedReport" in repr(reports[1])


def test_a_batch_that_fails_is_answered_one_by_one(
    loaded: vtprune.Loaded, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtprune.inference import library

    generate = library.generate

    def no_room(loaded, questions, *rest, **named):  # type: ignore[no-untyped-def]
        if any(one.question == "why?" for one in questions):
            raise ModelError("out of memory")
        return generate(loaded, questions, *rest, **named)

    monkeypatch.setattr(library, "generate", no_room)
    items = [(picture, "what?"), (picture, "why?"), (picture, "who?")]
    reports = vtprune.answer(loaded, items, keep=0.4, generation=SHORT)
    assert [report.error is None for report in reports] == [True, False, True]


def test_files_that_can_not_be_opened_do_not_keep_a_model_from_loading(
    checkpoints, picture: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    items = [(tmp_path / "none.png", "what?"), (picture, "what?")]
    reports = vtprune.answer(str(checkpoints("llava_onevision")), items, generation=SHORT)
    assert [report.error is None for report in reports] == [False, True]
    assert reports[1].seconds.load > 0


def test_where_every_item_fails_or_the_preset_is_wrong_the_call_does(
    loaded: vtprune.Loaded, picture: Path, tmp_path: Path
) -> None:
    missing = [(tmp_path / f"{number}.png", "what?") for number in range(2)]
    with pytest.raises(MediaError, match=r"0\.png"):
        vtprune.answer(loaded, missing)
    with pytest.raises(PresetError, match="keep 2"):
        vtprune.answer(loaded, [(picture, "what?")], keep=2)
    with pytest.raises(PresetError, match="unknown method"):
        vtprune.ask(loaded, picture, "what?", method="none")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be at least 1"),
        ({"temperature": -1}, "temperature is -1, but must be 0 or at least 0.001"),
        ({"temperature": 1e-320}, "temperature is 1e-320, but must be 0 or at least 0.001"),
        ({"temperature": float("nan")}, "temperature is nan, but must be 0"),
        ({"top_p": 0}, r"top_p is 0, but must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p is 1.5, but must be in \(0, 1\]"),
    ],
)
def test_a_generation_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VtpruneError, match=message):
        vtprune.Generation(**values)


@pytest.mark.parametrize("name", ["max_pixels", "dpi", "max_pages", "max_bytes"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(MediaError, match=f"{name} is -1, but must be at least 1"):
        vtprune.Limits(**{name: -1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "media", "question", "message"),
    [
        (5, "a.png", "what?", "the model is 5, which is no model and no name of one"),
        (None, 5, "what?", "the media hold 5, which is neither a picture nor a video"),
        (None, [5], "what?", "the media hold 5, which is neither a picture nor a video"),
        (None, [["a.png"]], "what?", "the media hold a list inside a list"),
        (None, [], "what?", "the list of media is empty"),
        (None, "a.png", 5, "the question is 5, but must be text"),
    ],
)
def test_arguments_of_another_type_are_refused(
    model: Any, media: Any, question: Any, message: str
) -> None:
    with pytest.raises(vtprune.VtpruneError, match=message):
        vtprune.ask(model, media, question)


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(vtprune.VtpruneError, match="batch_size is 0, but must be at least 1"):
        vtprune.answer(None, [("a.png", "what?")], batch_size=0)


def test_an_empty_question_is_refused_without_a_command_line(
    loaded: vtprune.Loaded, picture: Path
) -> None:
    with pytest.raises(ModelError, match="the question is empty") as raised:
        vtprune.ask(loaded, picture, " ")
    assert raised.value.hint == 'write one, such as "what is it?"'


@pytest.mark.parametrize(
    "name",
    [
        "Generation",
        "Limits",
        "Preset",
        "Report",
        "Sampling",
        "answer",
        "ask",
        "calibrate",
        "compare_methods",
        "draw",
        "evaluate",
        "load",
        "load_preset",
        "profile",
        "pruning",
        "register_method",
        "stream",
        "tune",
        "Clip",
    ],
)
def test_a_docstring_shows_an_example(name: str) -> None:
    assert ">>> " in str(inspect.getdoc(getattr(vtprune, name)))
