"""Whether ``torch.compile`` has been at a module: what it would compile anew is better left as it is."""

from __future__ import annotations

from torch import nn

__all__ = ["is_compiled"]


def is_compiled(module: nn.Module) -> bool:
    """Whether a part of the module, or a function that it holds, is compiled.

    Example:
        >>> is_compiled(nn.Linear(2, 2))
        False
    """
    return getattr(module, "_compiler_ctx", None) is not None or any(  # Lightning keeps it of a module that it unwraps
        type(part).__name__ == "OptimizedModule"
        or getattr(part, "_compiled_call_impl", None) is not None
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(part).values())  # a compiled function
        for part in module.modules()
    )
