"""Read damaged videos: `python -m vtprune._dev.fuzz_videos CLIPS... --count 3000 --save LOG`.

Each round damages one of the clips (its seed says how), reads it as any command does, and adds one
line of JSON to LOG. A run that was ended goes on behind the last seed in LOG. What counts as a
finding: an error that is no MediaError, a decoder that ended or hung, more than 10 s of the
decoder's time, more than 2 GB of its memory, a word on stderr.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vtprune._dev.arguments import Parser
from vtprune._dev.lines import read_lines
from vtprune.errors import MediaError
from vtprune.media import Limits, open_source, read, sample_evenly

MOST_SECONDS = 10.0
MOST_MEMORY = 2 << 30
CRASHED = ("the decoder ended", "the decoder did not come back")
_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
_HEADER = 4096  # bytes in which half of the damage is done


@dataclass(frozen=True)
class Reading:
    """How one damaged file was read.

    Args:
        outcome: "read", "refused", "crashed" (the decoder's process ended or hung), or "raised" (an
            error that is no MediaError).
        cpu: seconds of the decoder's process; 0 where it ended.
        memory: the most bytes that the decoder's process held; 0 where it ended.
        noise: what was written to stderr meanwhile.
    """

    seed: int
    clip: str
    damage: str
    outcome: str
    message: str
    seconds: float
    cpu: float
    memory: int
    noise: str

    @property
    def finding(self) -> str:
        """What is wrong with it; empty where nothing is."""
        if self.outcome in ("crashed", "raised"):
            return self.outcome
        if self.noise:
            return "noise"
        if self.cpu > MOST_SECONDS:
            return "slow"
        return "memory" if self.memory > MOST_MEMORY else ""


def damaged(data: bytes, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a damaged copy of a file, and in a word what was done to it.

    Args:
        other: another file, of which a part may be put in.
    """
    size = len(data)
    within = size if rng.random() < 0.5 else min(size, _HEADER)
    start = rng.randrange(within)
    length = min(rng.choice((1, 4, 16, 188, 1024, 65536)), size - start)
    if size > 2 * _HEADER and rng.random() < 0.2:  # an index often lies at the end
        start = size - 1 - rng.randrange(_HEADER)
        length = min(length, size - start)
    changed = bytearray(data)
    damage = rng.choice(("bytes", "bits", "sizes", "cut", "zeros", "ones", "swap", "drop", "repeat",
                         "insert", "splice", "tail"))  # fmt: skip
    match damage:
        case "bytes":
            for _ in range(rng.choice((1, 2, 8, 64))):
                changed[rng.randrange(within)] = rng.randrange(256)
        case "bits":
            for _ in range(rng.choice((1, 2, 8, 64))):
                changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        case "sizes":
            for _ in range(rng.choice((1, 2, 4))):
                width = rng.choice((1, 2, 4, 8))
                value = rng.choice(_EDGES) % (1 << 8 * width)
                at = rng.randrange(within)
                changed[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))
        case "cut":
            del changed[start:]
        case "zeros" | "ones":
            changed[start : start + length] = (b"\0" if damage == "zeros" else b"\xff") * length
        case "swap":
            at = rng.randrange(size)
            part, away = data[start : start + length], data[at : at + length]
            changed[start : start + length], changed[at : at + length] = away, part
        case "drop":
            del changed[start : start + length]
        case "repeat":
            changed[start:start] = data[start : start + length] * rng.choice((1, 2, 16, 256))
        case "insert":
            changed[start:start] = rng.randbytes(length)
        case "splice":
            changed[start:] = other[rng.randrange(len(other)) :]
        case "tail":
            zeros = bytes(rng.choice((1, 1 << 10, 1 << 20, 32 << 20)))
            changed += rng.choice((zeros, other, rng.randbytes(1 << 20)))
    if damage not in ("cut", "tail") and rng.random() < 0.15:
        del changed[rng.randrange(1, len(changed) + 1) :]
    return damage, bytes(changed)


def children() -> list[Path]:
    """The folders in /proc of this process's children."""
    numbers = " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children"))
    return [Path("/proc", number) for number in numbers.split()]


def cpu_and_memory() -> tuple[float, int]:
    """The seconds that the children have run, and the most memory that one of them held."""
    seconds, memory = 0.0, 0
    for process in children():
        with suppress(OSError):
            user, system = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
            seconds += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
            for line in (process / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    memory = max(memory, int(line.split()[1]) << 10)
    return seconds, memory


def forget_peaks() -> None:
    """Have the children's peaks of memory count from here on."""
    for process in children():
        with suppress(OSError):
            (process / "clear_refs").write_text("5")


@contextmanager
def stderr_in(file: Path) -> Iterator[None]:
    """Send what this process and its children write to stderr to a file."""
    kept = os.dup(2)
    with file.open("wb") as target:
        os.dup2(target.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def read_damaged(path: Path, rng: random.Random, limits: Limits) -> tuple[str, str]:
    """Read some frames of a file; return the outcome, and the message of an error."""

    def small(pictures: torch.Tensor) -> torch.Tensor:
        return pictures[:, :, ::16, ::16].contiguous()

    try:
        source = open_source(path, limits)
        index = sample_evenly(source, rng.choice((1, 8, 16)), max_frames=64)
        read(source, index, small, limits)
    except MediaError as error:
        crashed = any(word in error.message for word in CRASHED)
        return "crashed" if crashed else "refused", error.message
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"
    return "read", ""


def run_seed(seed: int, clips: Sequence[Path], folder: Path, limits: Limits) -> Reading:
    """Damage a clip by this seed, and read it."""
    rng = random.Random(seed)
    clip, other = rng.choice(clips), rng.choice(clips)
    damage, data = damaged(clip.read_bytes(), other.read_bytes(), rng)
    path = folder / f"damaged{clip.suffix}"
    path.write_bytes(data)
    limits = replace(limits, allow_partial=rng.random() < 0.3)
    forget_peaks()
    began, (cpu_before, _) = time.monotonic(), cpu_and_memory()
    noise = folder / "stderr"
    with stderr_in(noise):
        outcome, message = read_damaged(path, rng, limits)
    seconds, (cpu, memory) = time.monotonic() - began, cpu_and_memory()
    return Reading(
        seed,
        clip.name,
        damage,
        outcome,
        message.replace(str(path), path.name),
        round(seconds, 3),
        round(max(0.0, cpu - cpu_before), 3),
        memory,
        noise.read_text("utf-8", "replace")[:1000],
    )


def summary(log: Path) -> str:
    """What a log says, in a few lines."""
    readings = [Reading(**line) for line in read_lines(log)]
    outcomes = Counter(reading.outcome for reading in readings)
    lines = [
        f"{len(readings)} files: " + ", ".join(f"{n} {what}" for what, n in outcomes.items()),
        f"slowest {max(r.seconds for r in readings):.1f} s "
        f"({max(r.cpu for r in readings):.1f} s of the decoder's process), "
        f"most memory {max(r.memory for r in readings) / 2**20:.0f} MiB",
    ]
    lines += [
        f"seed {r.seed} ({r.clip}, {r.damage}): {r.finding}: {r.message or r.noise} "
        f"[{r.cpu:.1f} s, {r.memory / 2**20:.0f} MiB]"
        for r in readings
        if r.finding
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("clips", type=Path, nargs="+", help="videos, small ones")
    parser.add_argument("--count", type=int, default=3000, help="damaged files in all")
    parser.add_argument("--save", type=Path, required=True, help="the log: one reading a line")
    parser.add_argument("--decoder", default="auto", help="auto, pyav or decord")
    args = parser.parse_args(arguments)
    clips, limits = sorted(args.clips), Limits(decoder=args.decoder)
    done = len(args.save.read_text("utf-8").splitlines()) if args.save.exists() else 0
    with tempfile.TemporaryDirectory() as name, args.save.open("a", encoding="utf-8") as log:
        for seed in range(done, args.count):
            log.write(json.dumps(asdict(run_seed(seed, clips, Path(name), limits))) + "\n")
            log.flush()
    sys.stdout.write(summary(args.save) + "\n")


if __name__ == "__main__":
    main()
