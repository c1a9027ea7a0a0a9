"""The table of docs/families.md: every class of transformers' image-text-to-text mapping.

`python tests/family_table.py` runs `vtprune ask` on a tiny checkpoint of every class of the
transformers at hand that the table lacks, and adds its row; with `--all` on every class, and with
model types on those. A class that is in an older or newer transformers keeps its row.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import tiny_processor
import transformers
import zoo
from click.testing import CliRunner
from conftest import save_noise
from packaging.version import Version
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from vtprune.cli import cli
from vtprune.errors import ModelError
from vtprune.models import FAMILIES, find_family
from vtprune.models.structure import find_structure

DOC = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- classes -->\n", "<!-- end of classes -->\n"
LONGEST = 120  # seconds that one class may take
CLIP = Path(__file__).parent / "media" / "tc1502_phone.mp4"
NEEDS_TIMM = ("fast_vlm", "gemma3n", "perception_lm")
"""Classes whose towers are of the package timm."""
TAKES_VIDEOS = ("instructblipvideo",)
"""Classes that take no pictures."""
NOTES = {
    "chameleon": "its decoder encodes pictures itself (it takes pixel_values), so that there is no "
    "place between the two to cut at",
    "evolla": "it answers about proteins, and transformers' image-text-to-text auto class does not "
    "take its config",
    "fuyu": "its processor counts on a SentencePiece tokenizer, which no tiny checkpoint has",
    "gemma3n": "its vision tower is of the package timm, without which no tiny checkpoint of it "
    "is built here",
    "blip-2": "its generation gives the language model embeddings alone, and no position_ids, so "
    "that tokens behind dropped ones would move up",
    **{
        name: "its language model is given no position_ids, so that tokens behind dropped "
        f"ones would move up{at_keep_1}"
        for name, at_keep_1 in (
            ("instructblip", ""),
            (
                "instructblipvideo",
                "; at keep 1 its processor takes four frames of a clip, and in place of a picture",
            ),
        )
    },
    "mistral4": "a language model: it takes no pictures, and has no processor",
    "shieldgemma2": "its checkpoints are classifiers, whose weights transformers renames for "
    "ShieldGemma2ForImageClassification alone",
    "udop": "an encoder-decoder: its pictures go to the encoder, and its decoder holds no "
    "visual tokens; at keep 1 too, its processor reads the words of a picture by the package "
    "pytesseract",
    "unlimited_ocr": "its answer sees a window of itself beside the whole prompt, by masks that "
    "count from the length of the cache, which dropping tokens would change; at keep 1 its "
    "processor gives counts that are no tensors, which are not passed on",
}
"""Why a class is not asked, where the error does not say it."""
RUNS = {"asked": "0.4", "keep 1": "1"}
"""How a class is tried -> what is kept of it."""
NEEDS_TORCHVISION = ("PixtralProcessor",)
"""Processors that transformers does not import without it, whatever their pictures need."""
HEAD = ("model_type", "class", "since", "how", "inputs", "torchvision", "media", "exact by, or why")


@dataclass(frozen=True)
class Row:
    """One class.

    Args:
        since: the first tested transformers that has it.
        how: "asked", "library", "keep 1" or "refused".
        inputs: "own" or "processor": what prepares them.
        torchvision: what needs it: "no", "videos" or "yes".
        rule: "masked" or "layer loop"; where it is not asked, why.
    """

    model_type: str
    kind: str
    since: str
    how: str
    inputs: str
    torchvision: str
    media: str
    rule: str


def read_table() -> dict[str, Row]:
    """The rows of the document, by model type."""
    text = DOC.read_text(encoding="utf-8")
    lines = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()[2:]
    rows = [
        Row(*(cell.strip().strip("`") for cell in line.strip("|").split("|"))) for line in lines
    ]
    return {row.model_type: row for row in rows}


def write_table(rows: dict[str, Row]) -> None:
    text = DOC.read_text(encoding="utf-8")
    lines = [HEAD, ("---",) * len(HEAD)]
    for _, row in sorted(rows.items()):
        cells = [str(getattr(row, field.name)) for field in fields(Row)]
        lines.append((f"`{cells[0]}`", f"`{cells[1]}`", *cells[2:]))
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    DOC.write_text(text[:start] + table + text[end:], encoding="utf-8")


def release() -> str:
    """The transformers at hand, as the table names it."""
    return ".".join(map(str, Version(transformers.__version__).release[:2]))


def make_row(model_type: str) -> Row:
    """Try one class."""
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    if model_type in FAMILIES:
        media = ", ".join(f"{name}s" for name in find_family(model_type).modalities)
        return Row(model_type, kind, release(), "asked", "own", "no", media, rule_of(model_type))
    has_videos = model_type in VIDEO_PROCESSOR_MAPPING_NAMES
    needs = "videos" if has_videos else "no"
    backends = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {"pil": None}
    if "pil" not in backends or PROCESSOR_MAPPING_NAMES.get(model_type) in NEEDS_TORCHVISION:
        needs = "yes"
    if model_type in NEEDS_TIMM:
        needs = "yes, and timm" if needs == "yes" else "no, but timm"
    refused = refusal(model_type)
    how, why = "keep 1", refused
    if refused:
        if answer := try_ask(model_type, "1"):
            same = answer == refused
            how, why = "refused", refused if same else f"{refused}; at keep 1: {answer}"
    elif answer := try_ask(model_type, "0.4"):
        how, why = "library", answer
    else:
        how, why = "asked", rule_of(model_type)
    if how != "asked":
        why = NOTES.get(model_type, why)
    media = "videos" if model_type in TAKES_VIDEOS else "images"
    if has_videos and media == "images" and how in RUNS:
        media = "images, videos" if not try_ask(model_type, RUNS[how], CLIP) else "images"
        needs = "no" if needs == "videos" and media == "images" else needs
    return Row(model_type, kind, release(), how, "processor", needs, media, why)


def videos_since(row: Row) -> str:
    """The first tested transformers in which a class answers about videos; "" for none."""
    media, _, start = row.media.partition(" from ")
    return (start or row.since) if media.endswith("videos") else ""


def joined_media(row: Row, known: Row) -> str:
    """The media of a class after a try, with what is known of newer and older transformers."""
    starts = {since for since in (videos_since(row), videos_since(known)) if since}
    if not videos_since(row):  # what failed here, an older transformers is not said to answer
        starts = {since for since in starts if Version(since) > Version(row.since)}
    media = row.media.removesuffix(", videos")
    if not starts or media == "videos":
        return media
    start, since = min(starts, key=Version), min((row.since, known.since), key=Version)
    return f"{media}, videos" + ("" if start == since else f" from {start}")


def refusal(model_type: str) -> str:
    """Why the structure of a class is refused; "" where it is not."""
    try:
        reason = zoo.outcome(model_type)
        return plain(reason) if reason else ""
    except Exception as error:
        return plain(f"it can't be built from its default config ({error})")


def rule_of(model_type: str) -> str:
    """By which rule a class that is accepted is exact."""
    structure = find_structure(zoo.skeleton(model_type))
    state = any(memory.state for memory in structure.memories)
    return "layer loop" if state else "masked"


def try_ask(model_type: str, keep: str, media: Path | None = None) -> str:
    """What is wrong with asking a tiny checkpoint about media, a picture by default."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        try:
            tiny_processor.build(model_type, directory)
            media = CLIP if model_type in TAKES_VIDEOS else media
            report = ask(directory, "--keep", keep, media=media)
        except Exception as error:
            return plain(str(error))
    before, after = report["tokens"]["visual"], report["tokens"]["kept_after"]
    if keep == "1":
        return "" if before == after and report["tokens"]["answer"] else "no answer"
    return "" if 0 < after < before else f"{after} of {before} visual tokens were kept"


def ask(directory: Path, *arguments: str, media: Path | None = None) -> dict:  # type: ignore[type-arg]
    """What `vtprune ask` reports of a picture, or of other media.

    Raises:
        ModelError: it ended with an error.
    """
    media = media or save_noise(directory / "picture.png", 90, 150)
    options = ["--model", str(directory), "--json", "--max-new-tokens", "3"]
    options += ["--method", "uniform", "--at", "input", *arguments]
    result = CliRunner().invoke(cli, ["ask", str(media), "what is it?", *options])
    if result.exit_code:
        raise ModelError(result.stderr.partition("\nhint:")[0].removeprefix("Error: "))
    report: dict = json.loads(result.stdout)  # type: ignore[type-arg]
    return report


def plain(reason: str) -> str:
    """A reason without what differs from run to run, in one cell."""
    reason = reason.strip() or "no reason"
    reason = re.sub(r"^\w[\w.-]*: |/\S*: | \(transformers [^)]*\)", "", reason)
    first = re.split(r"\n|, so | hint:", reason)[0].replace("|", "/")
    return first if len(first) <= 160 else f"{first[:157]}..."


def _late(number: int, frame: object) -> None:
    raise TimeoutError(f"over {LONGEST} seconds")


def main() -> None:
    rows = read_table()
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")]
    if not chosen:
        every = "--all" in sys.argv
        chosen = [name for name in zoo.MODEL_TYPES if every or name not in rows]
    signal.signal(signal.SIGALRM, _late)
    for name in zoo.MODEL_TYPES:
        if name in chosen:
            signal.alarm(LONGEST)
            row = make_row(name)
            signal.alarm(0)
            sys.stdout.write(f"{row}\n")
        elif name in rows:
            row = rows[name]
        else:
            continue
        known = rows.get(name)
        if known and name in chosen:
            row = replace(row, media=joined_media(row, known))
        since = min((row.since, known.since), key=Version) if known else row.since
        rows[name] = Row(**{**vars(row), "since": min((since, release()), key=Version)})
        write_table(rows)


if __name__ == "__main__":
    main()
