"""Read damaged media or texts: `python -m vtprune._dev.fuzz media --count 10000 --save LOG`.

A run that was ended goes on with the seeds that are not in LOG.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vtprune._dev.arguments import Parser
from vtprune._dev.fuzz.trials import run_seeds, summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, what in (("media", "pictures, pages and videos"), ("text", "files and requests")):
        part = subjects.add_parser(name, help=what)
        part.add_argument("--count", type=int, default=200, help="seeds to try")
        part.add_argument("--seed", type=int, default=0, help="the first of them")
        part.add_argument("--save", type=Path, required=True, help="the log: a trial a line")
        part.add_argument("--only", default="", help="kinds to try, comma separated")
        beside = "media files, or checkpoints, beside those made here"
        part.add_argument("--given", type=Path, nargs="*", default=[], help=beside)
    args = parser.parse_args(arguments)
    only = tuple(filter(None, args.only.split(",")))
    given = [path.resolve() for path in args.given]  # cases are read in folders of their own
    if args.subject == "media":
        from vtprune._dev.fuzz.media import MediaSubject

        subject = MediaSubject(given, only)
    else:
        from vtprune._dev.fuzz.text import TextSubject

        subject = TextSubject(given, only)  # type: ignore[assignment]
    run_seeds(subject, range(args.seed, args.seed + args.count), args.save)
    sys.stdout.write(summary(args.save).encode("utf-8", "backslashreplace").decode() + "\n")


if __name__ == "__main__":
    main()
