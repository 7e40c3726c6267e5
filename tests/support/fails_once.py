"""An operation that fails, wherever it is done."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class FailsOnce(TorchDispatchMode):
    """Let the first operation fail that makes a floating-point tensor of this shape."""

    def __init__(self, shape: tuple[int, ...], error: BaseException) -> None:
        super().__init__()
        self.shape, self.error, self.failed = shape, error, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self.failed and isinstance(made, Tensor) and made.shape == self.shape and made.is_floating_point():
            self.failed = True
            raise self.error
        return made
