"""Training features, a last layer and queries that the tests of detectors share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_robust.ood.detectors import Detector


@dataclass(frozen=True)
class Known:
    """300 samples of 3 classes with 6 features; 4 queries."""

    features: Tensor
    labels: Tensor
    queries: Tensor
    head: nn.Linear

    @classmethod
    def drawn(cls) -> Known:
        """Three correlated Gaussians."""
        g = torch.Generator().manual_seed(7)
        labels = torch.arange(300) % 3
        centres, mix = 4 * torch.randn(3, 6, generator=g), torch.randn(6, 6, generator=g)
        features = centres[labels] + torch.randn(300, 6, generator=g) @ mix
        queries = 3 * torch.randn(4, 6, generator=g) + 5
        return cls(features, labels, queries, linear(torch.randn(3, 6, generator=g), torch.randn(3, generator=g)))

    @property
    def logits(self) -> Tensor:
        return self.head(self.features).detach()

    @property
    def index(self) -> Tensor:
        return torch.arange(len(self.features))

    def fed(self, detector: Detector, size: int = 300, rows: Tensor | slice = slice(None)) -> Detector:
        """The detector, given these rows in batches of this size."""
        columns = (column[rows].split(size) for column in (self.features, self.logits, self.labels, self.index))
        for batch in zip(*columns, strict=True):
            detector.add(*batch)
        return detector

    def fitted(self, detector: Detector, size: int = 300) -> Detector:
        self.fed(detector, size).fit(self.head)
        return detector

    def scores(self, detector: Detector) -> Tensor:
        return detector(self.queries, self.head(self.queries).detach())


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with these weights; nothing is drawn from the global stream."""
    head = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    head.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return head  # type: ignore[return-value]  # skip_init says no more than Module


KNOWN = Known.drawn()
