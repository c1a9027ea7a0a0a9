"""Silence what transformers prints, and turn its errors into one line with a way out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vtprune.errors import ModelError, VtpruneError
from vtprune.models.devices import first_line
from vtprune.process_settings import WARNINGS_OFF, ProcessSetting


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_TRANSFORMERS_QUIET = ProcessSetting(_quiet_transformers)


@contextmanager
def quiet() -> Iterator[None]:
    """Switch transformers' progress bars and warnings off, and on again as they were."""
    with _TRANSFORMERS_QUIET, WARNINGS_OFF:
        yield


@contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Raise what goes wrong in transformers as a ModelError: one line with a way out."""
    try:
        yield
    except VtpruneError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelError(
            f"{name}: its weights do not fit in memory", "try --dtype bfloat16 or a smaller model"
        ) from error
    except Exception as error:
        raise ModelError(*explain(name, error)) from error


def explain(name: str, error: Exception) -> tuple[str, str]:
    """Return the message and hint for what transformers or safetensors said."""
    text, kind = str(error), type(error).__name__
    first = first_line(error)
    if "attn_implementation" in text:
        return (
            f"{name}: transformers does not run it with this attention kernel ({first})",
            "--attention sdpa or eager runs everywhere",
        )
    if isinstance(error, UnicodeEncodeError):  # tokenizers and safetensors take text alone
        return (
            f"{name}: the name of its folder is not text in this locale",
            "rename the folder, or set a locale that has its characters: LC_ALL=C.UTF-8",
        )
    if "gated" in text.lower() or kind == "GatedRepoError":
        return f"{name}: access to this model is restricted", "accept its terms on the hub, log in"
    if "trust_remote_code" in text:
        return f"{name}: brings Python code of its own", "read it, then pass --trust-remote-code"
    if kind == "SafetensorError" or "incomplete metadata" in text.lower():
        return f"{name}: a weights file is damaged ({first})", "download the checkpoint again"
    if "safetensors" in text and ("no file named" in text or "does not appear" in text):
        return f"{name}: no safetensors weights", "pickled weights are not loaded; convert them"
    offline = ("couldn't connect", "offline", "connection", "resolve", "cached files")
    if any(word in text.lower() for word in offline) and not os.path.isdir(name):
        return (
            f"{name}: not in the local cache, and the hub can't be reached",
            "check the name and the connection, or download it and give its directory",
        )
    if "instantiate the backend tokenizer" in text:
        return (
            f"{name}: no tokenizer.json, and no other tokenizer that transformers can convert",
            "copy all of its files; a tokenizer.model alone needs pip install sentencepiece",
        )
    if kind == "ImportError":
        return f"{name}: {first}", "install what it names, or choose another --attention"
    if "not a valid model identifier" in text or kind == "RepositoryNotFoundError":
        return f"{name}: no such model on the hub", "vtprune models lists known names"
    return f"{name}: can't be loaded: {first}", "check that the checkpoint is complete"
