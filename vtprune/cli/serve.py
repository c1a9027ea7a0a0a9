"""`vtprune serve`: one model for OpenAI-style clients, its visual tokens pruned."""

from __future__ import annotations

import atexit
import errno
import ipaddress
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune import __version__
from vtprune.cli.flags import (
    cache_from,
    generation_from,
    limits_from,
    loading_from,
    preset_from,
    sampling_from,
)
from vtprune.cli.help import Command
from vtprune.cli.options import CACHE, DECODE, MAX_NEW_TOKENS, MEDIA, MODEL, ONE_WAY, Flags, takes
from vtprune.errors import LONGEST, VtpruneError, one_line, path_hint
from vtprune.models import EMBEDDED
from vtprune.small_files import read_small

if TYPE_CHECKING:
    from vtprune.serving.app import ServerSettings
    from vtprune.serving.uploads import UploadRules

LONGEST_KEY = 4096
GRACE = 300
"""Seconds that a server which shuts down has for the requests that are here."""
EPILOG = """\b
Examples:
  vtprune serve --model qwen2.5-vl-7b --keep 0.3
  vtprune serve --model qwen2.5-vl-7b --api-key-file key.txt --host 0.0.0.0
  vtprune serve --media-root clips --allow-url images.example.org
"""


@click.command(cls=Command, epilog=EPILOG)
@takes(
    *ONE_WAY,
    *DECODE,
    *MODEL,
    *MEDIA,
    *CACHE,
    "max_new_tokens",
    "temperature",
    "top_p",
    "host",
    "port",
    "api_key_file",
    "max_batch",
    "max_wait",
    "max_queue",
    "workers",
    "media_root",
    "json",
    "quiet",
    default_words={"preset": "balanced", "max_new_tokens": str(MAX_NEW_TOKENS)},
)
@click.version_option(__version__, "-V", "--version", message="vtprune %(version)s")
def serve(flags: Flags) -> None:
    """Serve one model to OpenAI-style clients.

    Answers /v1/chat/completions with pictures and videos in messages, also streamed; requests that
    wait are joined in batches. A request's "vtprune": {"keep": 0.2} is its own keep; preset, method
    and seed likewise. There are /v1/models, /v1/files, /health, /metrics and, at /, a page to try
    it. Ctrl-C finishes what runs, a second one ends at once. Needs vtprune[serve].
    """
    from vtprune.cli import INTERRUPTED, TERMINATED, Terminated, output
    from vtprune.cli.config import load_config
    from vtprune.serving.uploads import PREFIX

    user = load_config()
    preset = preset_from(flags, user)
    rules = _rules(flags)
    key = _read_key(flags.api_key_file)
    with (
        _bind(flags) as listening,
        tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder,
    ):
        uvicorn, app, guard, connection = _libraries()
        with output.importing(flags.quiet):
            from vtprune.models.loading import load

            generation = generation_from(flags, user, seed=preset.seed)
        loading = loading_from(flags, user)
        with output.libraries_silenced():
            with output.progress_line(flags.quiet) as show:
                loaded = load(**loading, **cache_from(flags), on_progress=show)
            settings: ServerSettings = app.ServerSettings(
                _model_name(loading["name"]),
                preset,
                generation,
                app.QueueSettings(
                    flags.max_batch,
                    flags.max_wait,
                    flags.max_queue,
                    flags.workers,
                    limits_from(flags),
                    lambda each: sampling_from(each, flags),
                ),
                rules,
                guard.GuardRules(key, () if key else _names_of(flags.host)),
                Path(folder),
                lambda line: click.echo(one_line(line, LONGEST), err=True),
            )
            application = app.create_app(loaded, settings)
            config = uvicorn.Config(
                application,
                http=connection.WatchedConnection,
                ws="none",
                log_level="critical",
                access_log=False,
                timeout_graceful_shutdown=GRACE,
            )
            listening.listen(config.backlog)  # from here on, clients that come are answered
            port = listening.getsockname()[1]
            host = f"[{flags.host}]" if ":" in flags.host else flags.host
            if flags.json:
                values = {"url": f"http://{host}:{port}", "model": settings.name}
                click.echo(json.dumps(values))
            elif not flags.quiet:
                click.echo(f"serving   {settings.name} at http://{host}:{port}", err=True)
            server = connection.WatchedServer(config)
            try:
                server.run(sockets=[listening])
            except KeyboardInterrupt as stopped:  # uvicorn raises the signal again, at its end
                note = "stopped: the requests that were here are answered"
                if server.cut_off:
                    application.state.server.stop()  # which a second Ctrl-C leaves out
                    note = "stopped: requests that were still here have no answer"
                stopped.add_note(note)
                if application.state.server.queue.thread.is_alive():
                    # At its next return into Python from C++ it would abort a process that ends.
                    code = TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED
                    atexit.register(os._exit, code)
                raise


def _model_name(name: str | None) -> str:
    """Return the name that clients give the model: of a directory, its last part."""
    if name is None:
        return EMBEDDED
    return Path(name).resolve().name if Path(name).is_dir() else name


def _libraries():  # type: ignore[no-untyped-def]
    """Return uvicorn, and the modules of the app, of what it refuses and of its connections.

    Raises:
        VtpruneError: they are not installed.
    """
    try:
        import uvicorn

        from vtprune.serving import app, connection, guard
    except ImportError as error:
        raise VtpruneError(
            f"vtprune serve needs the package {error.name}, which is not installed",
            'pip install "vtprune[serve]"',
        ) from error
    return uvicorn, app, guard, connection


def _bind(flags: Flags) -> socket.socket:
    """Return the socket to listen on.

    Raises:
        VtpruneError: the port is taken, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((flags.host, flags.port))
    except (OSError, UnicodeError) as error:  # UnicodeError: what can't be a host's name
        bound.close()
        if not isinstance(error, OSError):
            error = socket.gaierror(socket.EAI_NONAME, "not the name of a host")
        hint = "give another port; 0 takes a free one"
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            hint = "give --host an address of this machine; 0.0.0.0 is all of them"
        elif isinstance(error, PermissionError):
            hint = "give a port of 1024 or more, or one that this user may take"
        raise VtpruneError(
            f"--host {flags.host} --port {flags.port}: {error.strerror or error}", hint
        ) from error
    return bound


def _names_of(host: str) -> tuple[str, ...]:
    """Return the names that a server of this machine alone has; () where others reach it."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    return tuple(dict.fromkeys((host, "localhost", "127.0.0.1", "::1"))) if local else ()


def _rules(flags: Flags) -> UploadRules:
    """Return what clients may name.

    Raises:
        VtpruneError: --media-root is no folder, or --allow-url no host.
    """
    from vtprune.media.addresses import check_host
    from vtprune.serving.uploads import UploadRules

    hosts = tuple(map(check_host, flags.allow_url))
    if flags.media_root is not None and not flags.media_root.is_dir():
        raise VtpruneError(
            f"--media-root {flags.media_root}: no such folder",
            path_hint(flags.media_root, "make it first"),
        )
    return UploadRules(hosts, root=flags.media_root)


def _read_key(path: Path | None) -> str:
    """Return the key of a file, "" without one.

    Raises:
        VtpruneError: it can't be read, or holds no key.
    """
    if path is None:
        return ""
    try:
        key = read_small(path, LONGEST_KEY + 2).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise VtpruneError(f"--api-key-file {path}: {reason}", path_hint(path)) from error
    if not key or len(key) > LONGEST_KEY or not (key.isascii() and key.isprintable()):
        raise VtpruneError(
            f"--api-key-file {path}: holds no key", "write it on one line, in ASCII characters"
        )
    return key
