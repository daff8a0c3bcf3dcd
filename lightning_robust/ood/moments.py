"""Mean and scatter of rows that come in batches, of fixed size and without loss of digits."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.ood.feature_rows import Summed

__all__ = ["Moments"]


class Moments:
    r"""Number, mean and scatter :math:`\sum_n (x_n - \mu)(x_n - \mu)^\top` of rows, in doubles on the CPU.

    Batches, and processes, are merged by their means and scatters about them. Plain sums of squares would lose the
    variance of features that are large and vary little.

    Attributes:
        count: Rows so far.
        mean: ``(D,)``.
        scatter: ``(D, D)``.

    Args:
        width: D.

    Example:
        >>> moments = Moments(1)
        >>> moments.add(torch.tensor([[1.0], [2.0]]))
        >>> moments.add(torch.tensor([[6.0]]))
        >>> moments.count, moments.mean.item(), moments.scatter.item()
        (3, 3.0, 14.0)

    References:
        Chan, Golub and LeVeque, `Updating Formulae and a Pairwise Algorithm for Computing Sample Variances
        <https://doi.org/10.1007/978-3-642-51461-6_3>`_, 1982.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Count rows ``(N, D)`` of any float type, on any device."""
        if not len(rows):
            return
        x = rows.detach().cpu().double()
        mean = x.mean(0)
        x, step, count = x - mean, mean - self.mean, self.count + len(x)
        # Not in place: what was made in inference mode may not be written to outside of it.
        self.scatter = torch.addmm(self.scatter, x.T, x)
        self.scatter = torch.addr(self.scatter, step, step, alpha=self.count * len(x) / count)
        self.mean = self.mean + step * (len(x) / count)
        self.count = count

    def reduce(self, summed: Summed) -> None:
        """Make it the moments of the rows of all processes, each of which calls this once."""
        total = summed(torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])]))
        count = int(total[-1])
        mean = total[:-1] / max(1, count)
        step = self.mean - mean
        self.scatter = summed(torch.addr(self.scatter, step, step, alpha=float(self.count)))
        self.count, self.mean = count, mean
