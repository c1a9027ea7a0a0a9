"""Damage guided by coverage: `python -m vtprune._dev.fuzz.guided KIND --count 20000 --save FOLDER`.

Needs atheris, which goes on from those files that reach lines of vtprune which none before did. It
ends at the first finding, as `trials` has them, and writes the file that led there into FOLDER,
beside those that it goes on from in a later run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vtprune._dev.arguments import Parser

KINDS = ("preset", "calibration", "config", "questions", "table", "requests", "picture")
LONGEST = 65_536
"""Bytes of a file."""


class GuidedSubject:
    """Files of a kind whose bytes another program chooses.

    Args:
        kind: one of `KINDS`.

    Attributes:
        samples: name -> a file that is taken.
        data: of the file that is read next.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.data = kind, b""
        self.samples, self.suffix, self.read = _samples(kind)

    def case(self, rng: object, folder: Path) -> object:
        """Return the file that is read next."""
        from vtprune._dev.fuzz.media import picture
        from vtprune._dev.fuzz.trials import Case

        for name in ("a.png", "b.png"):  # which lists of questions name
            if not (folder / name).exists():
                picture().save(folder / name)
        path = folder / f"a.{self.suffix}"
        path.write_bytes(self.data)

        def run() -> str:
            self.read(path)
            return ""

        return Case(self.kind, "guided", run)


def _samples(kind: str) -> tuple[Mapping[str, bytes], str, Callable[[Path], object]]:
    """Return files of a kind that are taken, by their names, their suffix, and what reads one."""
    from vtprune._dev.fuzz import media, text
    from vtprune.cli.config import load_config
    from vtprune.inference.questions_file import read_askable
    from vtprune.media import Limits
    from vtprune.preset import load_preset
    from vtprune.preset.calibration import packaged_models, read_calibration
    from vtprune.serving.requests import read_requests

    if kind == "preset":
        files = sorted(text.preset_directory().iterdir())
        return {file.name: file.read_bytes() for file in files}, "yaml", load_preset
    if kind == "calibration":
        entry = {**packaged_models()["calibrations"][0], "ecl": 2, "horizon": 3}
        layers, hidden, name = entry["layers"], entry["hidden_size"], entry["model_type"]
        return (
            {"a": text.yaml_text(entry).encode()},
            "yaml",
            lambda path: read_calibration(path, layers, model_type=name, hidden=hidden),
        )
    if kind == "config":
        values = {"model": "embedded", "preset": "fast", "device": "cpu", "max_new_tokens": 4}
        return {"a": text.yaml_text(values).encode()}, "yaml", load_config
    if kind == "picture":
        samples = media.make_samples()
        names = [f"a.{suffix}" for suffix in (*media.STILLS, *media.SEVERAL)]
        stills = {name: samples[name] for name in names if name in samples and ".pdf" not in name}
        return stills, "picture", lambda path: media.read_all(path, Limits())
    if kind == "requests":
        lines, suffix = text.json_lines(text.REQUESTS), "jsonl"
        return {"a": lines.encode()}, suffix, lambda path: read_requests(path, load_preset("fast"))
    if kind == "table":
        return {"a": text.csv_text(text.QUESTIONS).encode()}, "csv", read_askable
    return {"a": text.json_lines(text.QUESTIONS).encode()}, "jsonl", read_askable


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=KINDS, help="what is damaged")
    parser.add_argument("--count", type=int, default=20_000, help="files to read")
    parser.add_argument("--seed", type=int, default=1, help="of what is changed")
    parser.add_argument("--save", type=Path, required=True, help="a folder for files")
    args = parser.parse_args(arguments)
    try:
        import atheris
    except ImportError:
        parser.error("atheris is not installed: pip install atheris")
    with atheris.instrument_imports(include=["vtprune"]):
        from vtprune._dev.fuzz.trials import run_case

        subject = GuidedSubject(args.kind)
    corpus, read = args.save / args.kind, args.save / "read"
    for folder in (corpus, read):
        folder.mkdir(parents=True, exist_ok=True)
    for name, data in subject.samples.items():
        (corpus / name).write_bytes(data)

    def try_file(data: bytes) -> None:
        subject.data = data
        trial = run_case(subject, 0, read)  # type: ignore[arg-type]
        if trial.finding:
            raise RuntimeError(f"{trial.finding}: {trial.message}")

    options = {
        "runs": args.count, "seed": args.seed, "max_len": LONGEST, "timeout": 20,
        "rss_limit_mb": 1500, "artifact_prefix": f"{args.save}/",
    }  # fmt: skip
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], try_file)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
