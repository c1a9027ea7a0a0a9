"""Checks that the host does not wait for: done later, and never lost."""

from __future__ import annotations

import threading

import pytest
import torch
from host_waits import FAMILY, shared
from other_device import devices

import vtprune
from vtprune.engine.late_checks import LateChecks
from vtprune.errors import ModelError


def refuse(numbers: torch.Tensor) -> None:
    if numbers[0]:
        raise ModelError("inside the prompt")


def test_what_is_on_a_cpu_is_checked_at_once() -> None:
    with pytest.raises(ModelError, match="inside the prompt"):
        LateChecks().begin(torch.tensor([1]), refuse)


def test_what_is_not_here_is_checked_once_it_is() -> None:
    with devices() as there:
        late, far = LateChecks(), torch.tensor([1]).to("cuda:0")
        late.begin(far, refuse)
        late.do_ready()
        waits = len(there.waits)
        far.sum().item()  # the answer's own wait
        with pytest.raises(ModelError, match="inside the prompt"):
            late.do_ready()
        late.do_all()
    assert len(there.waits) == waits + 1, "nobody waited for a check, and it is done once"


def test_a_check_is_done_by_the_thread_that_began_it_or_where_the_block_is_left() -> None:
    late = LateChecks()
    with devices():
        far = torch.tensor([1]).to("cuda:0")
        thread = threading.Thread(target=late.begin, args=(far, refuse))
        thread.start()
        thread.join()
        far.sum().item()
        late.do_ready()
        with pytest.raises(ModelError, match="inside the prompt"):
            late.do_all()


def test_an_error_inside_the_block_is_not_hidden_by_a_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = LateChecks()
    monkeypatch.setattr("vtprune.engine.plan.LateChecks", lambda: begun)

    def fail() -> None:
        with vtprune.pruning(shared(FAMILY), method="uniform", keep=0.5):
            begun.begin(torch.tensor([1]).to("cuda:0"), refuse)
            raise KeyError("own")

    with devices(), pytest.raises(KeyError, match="own"):
        fail()


def test_a_block_is_not_left_before_its_checks_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, model = LateChecks(), shared(FAMILY)
    monkeypatch.setattr("vtprune.engine.plan.LateChecks", lambda: begun)

    def leave() -> None:
        with vtprune.pruning(model, method="uniform", keep=0.5):
            begun.begin(torch.tensor([1]).to("cuda:0"), refuse)

    with devices(), pytest.raises(ModelError, match="inside the prompt"):
        leave()
    with vtprune.pruning(model, method="uniform", keep=0.5):
        pass  # the hooks of the one before are off
