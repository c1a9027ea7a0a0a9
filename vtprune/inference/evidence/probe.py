"""How probable an answer stays when visual tokens are replaced, masked or left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vtprune.engine.replay import Replay
from vtprune.errors import VtpruneError
from vtprune.inference.evidence import MapSettings
from vtprune.tokens.layout import Layout

Progress = Callable[[str, int, int], None]
BACKWARD = 2
"""Passes that a gradient costs beside its forward."""


@dataclass
class Passes:
    """The forward passes of a prompt that a map may take, and those that it took.

    Args:
        limit: rows of a batch count one by one, a gradient as three.
        on_progress: gets what is explained, the passes done, and how many it will be at most.
        stage: what is explained.
    """

    limit: int
    on_progress: Progress | None = None
    done: int = 0
    stage: str = "explaining: forward pass"
    total: int | None = None

    @property
    def left(self) -> int:
        """Passes that are left."""
        return self.limit - self.done

    def expect(self, number: int) -> None:
        """Note that there will be so many more passes, and no others."""
        self.total = self.done + number

    def add(self, number: int) -> None:
        """Count passes."""
        self.done += number
        if self.on_progress:
            total = self.limit if self.total is None else self.total
            self.on_progress(self.stage, min(self.done, total), total)


@dataclass(frozen=True, eq=False)
class Probe:
    """One prompt and its answer, to be asked again with other visual tokens.

    Args:
        replay: of the decoder's call over both.
        layout: of the N visual tokens.
        answer: (m,) int64 ids.
        parts: (first, end) of the answer's tokens that each get a map.
        present: (N,) bool, the tokens that the model sees at its input.
        passes: that may be taken.
        settings: of the map.
        attention: (N, parts) of the answer; None where it was not read.
    """

    replay: Replay
    layout: Layout
    answer: torch.Tensor
    parts: Sequence[tuple[int, int]]
    present: torch.Tensor
    passes: Passes
    settings: MapSettings = MapSettings()
    attention: torch.Tensor | None = None
    unchanged: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.layout)

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        """Return (B, parts) mean log-probabilities of the tokens of each part, float32.

        Args:
            logits: (B, m, V).
        """
        answer = self.answer.to(logits.device).expand(len(logits), -1)[..., None]
        log_probs = logits.float().log_softmax(-1).gather(2, answer).squeeze(2)  # (B, m)
        return torch.stack([log_probs[:, a:b].mean(1) for a, b in self.parts], dim=1)

    @torch.no_grad()
    def base(self) -> torch.Tensor:
        """Return (parts,) scores of the answer with all tokens."""
        if not self.unchanged:
            logits = self.replay.replaced(torch.ones(1, len(self)))
            self.passes.add(1)
            self.unchanged.append(self.score(logits)[0].cpu())
        return self.unchanged[0]

    @torch.no_grad()
    def replaced(self, weights: torch.Tensor) -> torch.Tensor:
        """Return (R, parts) scores where tokens are mixed with the mean token, batched.

        Args:
            weights: (R, N) share of each token itself.
        """
        scores = []
        for rows in weights.split(self.replay.rows_at_once()):
            scores.append(self.score(self.replay.replaced(rows)).cpu())
            self.passes.add(len(rows))
        return torch.cat(scores)

    @torch.no_grad()
    def alone(self, kept: torch.Tensor) -> torch.Tensor:
        """Return (R, parts) scores where only some tokens are left, batched.

        Args:
            kept: (R, N) bool.
        """
        kept, layer = kept & self.present, self.settings.from_layer
        counts = kept.sum(1)
        text = self.replay.length - len(self)
        scores = torch.zeros(len(kept), len(self.parts))
        for count in counts.unique().tolist():  # rows of one batch are as long
            index = (counts == count).nonzero().squeeze(1)
            length = text + count if layer == 0 else self.replay.length
            for rows in index.split(self.replay.rows_at_once(length)):
                logits = self.replay.alone(kept[rows], layer)
                scores[rows] = self.score(logits).cpu()
                self.passes.add(len(rows))
        return scores

    def gradient(
        self, weights: torch.Tensor, part: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (R,) scores of one part, and their (R, N) gradients by the weights.

        Args:
            weights: (R, N) as of `replaced`.
            part: number of the part; None: the mean of all.
        """
        all_scores, slopes = [], []
        for rows in weights.split(max(1, self.replay.rows_at_once() // (1 + BACKWARD))):
            rows = rows.detach().clone().requires_grad_(True)
            with torch.enable_grad(), self.replay.fewer_states():
                scores = self.score(self.replay.replaced(rows))
                scores = scores.mean(1) if part is None else scores[:, part]
                (slope,) = torch.autograd.grad(scores.sum(), rows)
            all_scores.append(scores.detach().cpu())
            slopes.append(slope.cpu())
            self.passes.add((1 + BACKWARD) * len(rows))
        return torch.cat(all_scores), torch.cat(slopes)

    def check_passes(self, least: int, method: str) -> None:
        """Refuse a limit under which a method can say nothing.

        Raises:
            VtpruneError: with the least number of passes.
        """
        if self.passes.left < least:
            raise VtpruneError(
                f"{self.passes.left} passes are left, and {method} takes at least {least}",
                f"give --passes {self.passes.done + least} or more, or explain --by attention",
            )
