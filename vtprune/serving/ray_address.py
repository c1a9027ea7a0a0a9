"""Where a Ray cluster is, and what can be said of it before Ray or torch is imported."""

from __future__ import annotations

import importlib.util
import socket

from vtprune.errors import VtpruneError

LOCAL = "local"
SECONDS_TO_CONNECT = 10


def check_cluster(address: str) -> None:
    """Refuse an address where nothing listens: Ray would wait for minutes.

    Raises:
        VtpruneError: with the address; or Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise missing_package("ray")
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise no_cluster(address, getattr(error, "strerror", None) or str(error)) from error


def no_cluster(address: str, reason: str) -> VtpruneError:
    """Return the error for an address without a cluster."""
    return VtpruneError(
        f"--ray {address}: no cluster there: {reason}",
        "give the address that ray start printed, such as 10.0.0.1:6379, or local",
    )


def missing_package(name: str) -> VtpruneError:
    """Return the error for a package of the extra that is not installed."""
    return VtpruneError(
        f"--ray needs the package {name}, which is not installed", 'pip install "vtprune[ray]"'
    )
