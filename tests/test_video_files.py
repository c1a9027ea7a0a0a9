"""Videos as people have them: cut, mirrored, damaged; none ends the process that asks."""

from __future__ import annotations

import io
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from vtprune.cli import cli
from vtprune.errors import MediaError, VtpruneError
from vtprune.media import Frames, Limits, child_process, open_source, read
from vtprune.media.child_process import CHILDREN
from vtprune.media.video import check_decord

CLIPS = Path(__file__).parent / "media"
LAST = {  # name: frames, time of the first and of the last one
    "tc1502_phone.mp4": (105, 0.0, 3.467),
    "tc1502_x264_default.mp4": (302, 0.0, 12.12),
    "tc683_bframes.avi": (120, 0.08, 4.84),
    "c_mjpeg.mjpeg": (120, 0.0, 4.76),
    "rot_hflip.mp4": (120, 0.0, 4.76),
}


def small(pictures: torch.Tensor) -> torch.Tensor:
    return pictures[:, :, ::4, ::4].contiguous()


def decoded(path: Path) -> np.ndarray:
    """All frames as FFmpeg gives them where it leaves none out, upright or not."""
    with av.open(str(path), container_options={"ignore_editlist": "1"}) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


@pytest.mark.parametrize("name", LAST)
def test_every_frame_is_there_at_its_time(name: str) -> None:
    count, first, last = LAST[name]
    source = open_source(CLIPS / name)
    frames = read(source, transform=small)
    assert (source.kind, source.num_frames, len(frames.pictures)) == ("video", count, count)
    assert (frames.timestamps[0], frames.timestamps[-1]) == pytest.approx((first, last), abs=1e-3)
    assert list(frames.timestamps) == sorted(set(frames.timestamps))
    assert not frames.warnings


@pytest.mark.parametrize("name", ["tc683_bframes.avi", "tc1502_phone.mp4"])
def test_frames_are_in_order_and_once_each(name: str) -> None:
    frames = read(open_source(CLIPS / name)).pictures
    expected = torch.from_numpy(decoded(CLIPS / name)).permute(0, 3, 1, 2)
    assert torch.equal(frames, expected[-len(frames) :])


@pytest.mark.parametrize(("name", "axis"), [("rot_hflip.mp4", 3), ("rot_vflip.mp4", 2)])
def test_a_mirrored_clip_is_shown_mirrored(name: str, axis: int) -> None:
    frames = read(open_source(CLIPS / name), [0, 60]).pictures
    plain = torch.from_numpy(decoded(CLIPS / name)[[0, 60]]).permute(0, 3, 1, 2)
    assert torch.equal(frames, plain.flip(axis))
    assert not torch.equal(frames, plain)


@pytest.mark.parametrize(
    "start", [b"%PDF-1.7\n", b"From: a@b.org\nTo: c@d.org\nSubject: x\n\n", b"PK\x03\x04word/"]
)
def test_a_file_that_merely_holds_jpegs_is_no_video(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(start + (CLIPS / "c_mjpeg.mjpeg").read_bytes())
    with pytest.raises(MediaError) as caught:
        open_source(path)
    assert "frames" not in caught.value.message


# -- the process that reads ----------------------------------------------------------------------


def test_a_reader_that_ends_is_an_error_and_the_next_file_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = CLIPS / "rot_hflip.mp4"
    run = child_process._Child.run

    def run_and_die(self: child_process._Child, *args: object) -> object:
        self.popen.send_signal(signal.SIGSEGV if os.name == "posix" else signal.SIGTERM)
        return run(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(child_process._Child, "run", run_and_die)
        with pytest.raises(MediaError, match=r"rot_hflip\.mp4: .*the decoder ended with"):
            open_source(path)
    assert open_source(path).num_frames == 120


@pytest.mark.skipif(os.name != "posix", reason="a stopped process is POSIX")
def test_a_reader_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    open_source(CLIPS / "rot_hflip.mp4")
    monkeypatch.setattr(child_process, "_PATIENCE", 0.5)
    (*_, reader) = CHILDREN.idle
    reader.popen.send_signal(signal.SIGSTOP)
    with pytest.raises(MediaError, match="did not come back within"):
        open_source(CLIPS / "rot_hflip.mp4")
    assert reader.popen.poll() is not None
    assert open_source(CLIPS / "rot_hflip.mp4").num_frames == 120


@pytest.mark.parametrize("name", ["posix\nsystem", "vtprune.media.child_process\nos.system"])
def test_an_answer_of_a_child_runs_no_code(name: str) -> None:
    answer = f"c{name}\n(Vexit 1\ntR.".encode()  # a pickle that calls what it names
    with pytest.raises(pickle.UnpicklingError, match="is no answer"):
        child_process._Answers(io.BytesIO(answer)).load()


def test_threads_read_at_once() -> None:
    names = ["rot_hflip.mp4", "tc1502_phone.mp4", "c_mjpeg.mjpeg", "tc683_bframes.avi"]
    alone = {name: read(open_source(CLIPS / name), transform=small) for name in names}

    def again(name: str) -> Frames:
        return read(open_source(CLIPS / name), transform=small)

    with ThreadPoolExecutor(4) as pool:
        for name, frames in zip(names * 3, pool.map(again, names * 3), strict=True):
            assert torch.equal(frames.pictures, alone[name].pictures)
    assert threading.active_count() < 20


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_a_reading_within_a_second(tmp_path: Path) -> None:
    script = f"""
import sys
from vtprune.media import open_source, read
source = open_source({str(CLIPS / "tc1502_x264_default.mp4")!r})
print("ready", flush=True)
try:
    while True:
        read(source, transform=lambda x: x[..., 0, 0])
except KeyboardInterrupt:
    print("stopped", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(0.2)
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        assert run.stdout.readline() == b"stopped\n"
        assert time.monotonic() - began < 5  # well under a second where nothing else runs
        run.communicate(timeout=60)


# -- damaged files -------------------------------------------------------------------------------


def mutated(data: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    if seed % 5 == 0:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


@pytest.mark.parametrize("name", ["tc1502_phone.mp4", "tc683_bframes.avi", "rot_vflip.mp4"])
def test_mutated_files_are_read_or_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = (CLIPS / name).read_bytes()
    for seed in range(25):
        path = tmp_path / f"{seed}-{name}"
        path.write_bytes(mutated(data, seed))
        try:
            read(open_source(path), transform=small)
        except MediaError:
            continue
    assert capfd.readouterr() == ("", "")


# -- which decoder -------------------------------------------------------------------------------


def test_an_unknown_decoder_is_refused() -> None:
    clip = str(Path(__file__).parent / "media" / "rot_hflip.mp4")
    result = CliRunner().invoke(cli, ["ask", clip, "what?", "--decoder", "ffmpeg"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the decoder 'ffmpeg' is not known\nhint: choose one of")


def test_decord_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(VtpruneError, match=r"--decoder decord needs the package decord2"):
        check_decord()
    with pytest.raises(VtpruneError, match=r"--decoder decord needs the package decord2"):
        open_source(CLIPS / "rot_hflip.mp4", Limits(decoder="decord"))
