"""Several processes played by threads that add up their tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def together(reducers: Sequence[Callable[[Callable[[Tensor], Tensor]], object]]) -> None:
    """Call each with a sum over all; whatever one raises is raised here, of the first that did."""
    barrier, box = threading.Barrier(len(reducers)), [torch.zeros(0)] * len(reducers)
    errors: list[Exception] = []

    def run(rank: int) -> None:
        def summed(own: Tensor) -> Tensor:
            assert own.dtype == torch.float64
            box[rank] = own.clone()
            barrier.wait(5)
            total = torch.stack(box).sum(0)  # raises if shapes differ, as a real sum would
            barrier.wait(5)
            return total

        try:
            reducers[rank](summed)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(reducers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    if errors:
        # Who goes on alone would wait for ever.
        assert {type(error) for error in errors} == {type(errors[0])}, errors
        assert len(errors) == len(reducers), errors
        raise errors[0]
