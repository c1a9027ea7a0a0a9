"""Reports, registries and progress for a terminal; the only importer of rich."""

from vtprune.cli.console.registries import (
    show_method,
    show_methods,
    show_model,
    show_models,
    show_presets,
)
from vtprune.cli.console.report import render, show_question
from vtprune.cli.console.tables import show_facts, show_table, show_warning
from vtprune.cli.console.terminal import ProgressLine, printable, stderr_console, stdout_console

__all__ = [
    "ProgressLine",
    "printable",
    "render",
    "show_facts",
    "show_method",
    "show_methods",
    "show_model",
    "show_models",
    "show_presets",
    "show_question",
    "show_table",
    "show_warning",
    "stderr_console",
    "stdout_console",
]
