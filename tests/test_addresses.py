"""Media from addresses that the user allows, and from standard input."""

from __future__ import annotations

import functools
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import assert_refused, save_noise

from vtprune.cli import cli
from vtprune.cli.flags import open_media
from vtprune.errors import MediaError
from vtprune.media import Limits, addresses, open_source, read


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a picture on a server that counts as one of the internet."""
    save_noise(tmp_path / "good.png", 20, 30)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(addresses, "is_public", lambda place: True)
    yield f"http://localhost:{server.server_port}/good.png"
    server.shutdown()
    server.server_close()


def test_an_address_of_an_allowed_host_is_a_medium(address: str, tmp_path: Path) -> None:
    limits = Limits(hosts=("localhost",))
    source = open_source(address, limits)
    assert source.name == address
    file = tmp_path / "good.png"
    assert read(source, limits=limits).pictures.equal(read(open_source(file)).pictures)
    with pytest.raises(MediaError, match="not a local file") as raised:
        open_source(address)
    assert "--allow-url HOST" in raised.value.hint
    with pytest.raises(MediaError, match="addresses of 'localhost' are not fetched"):
        open_source(address, Limits(hosts=("other.example",)))
    with pytest.raises(MediaError, match="over the limit of 10 bytes"):
        open_source(address, Limits(hosts=("localhost",), max_bytes=10))


def test_private_networks_stay_closed_to_allowed_hosts(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with pytest.raises(MediaError, match="an address of a private network"):
        open_source(address, Limits(hosts=("localhost",)))


def test_commands_take_addresses_and_standard_input(address: str, tmp_path: Path) -> None:
    given = ["what?", "--keep", "0.5", "--max-new-tokens", "2"]
    by_file = CliRunner().invoke(cli, ["ask", str(tmp_path / "good.png"), *given])
    assert by_file.exit_code == 0, by_file.output
    fetched = CliRunner().invoke(cli, ["ask", address, *given, "--allow-url", "localhost"])
    assert fetched.stdout == by_file.stdout
    content = (tmp_path / "good.png").read_bytes()
    piped = CliRunner().invoke(cli, ["ask", "-", *given], input=content)
    assert piped.stdout == by_file.stdout
    assert_refused(CliRunner().invoke(cli, ["ask", "-", "-"], input=b""), "Error: - is given twice")
    assert_refused(CliRunner().invoke(cli, ["ask", "-", "-", "what?"]), "Error: - is given twice")
    assert_refused(
        CliRunner().invoke(cli, ["ask", "-", *given], input=b""),
        "Error: standard input: it holds no bytes",
    )
    assert_refused(
        CliRunner().invoke(cli, ["ask", address, *given, "--allow-url", "http://a"]),
        "Error: --allow-url http://a: not the name of a host",
    )


def test_a_file_named_like_standard_input_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_noise(tmp_path / "-.png", 8, 9).rename(tmp_path / "-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert open_media(["./-"], Limits())[0].width == 9


def test_a_wrong_command_is_told_the_nearest() -> None:
    result = CliRunner().invoke(cli, ["evalute"])
    assert result.exit_code == 2
    assert "No such command 'evalute'. Did you mean evaluate?" in result.stderr


def test_a_batch_takes_addresses(address: str, tmp_path: Path) -> None:
    from vtprune.preset import load_preset
    from vtprune.serving.requests import find_files, read_requests

    assert find_files([address]) == ([address], 0)
    requests = tmp_path / "requests.csv"
    requests.write_text(f"file,question,keep\n{address},what?,0.5\ngood.png,what?,\n")
    first, second = read_requests(requests, load_preset(None))
    assert first.files == (address,)
    assert first.preset.keep == 0.5
    assert second.files == (str(tmp_path / "good.png"),)
