"""Bytes of live tensors, on any device, real or fake.

with LiveBytes() as live:
    train_step(...)
live.peak, live.now
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, until they are freed; views of what was there before do not count.

    Unlike a device's allocator it works on the CPU and on fake tensors. It sees neither fragmentation nor what an
    operator allocates and frees within itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0  # bytes
        self.peak = 0
        self._sizes: dict[weakref.ref, int] = {}

    def __enter__(self) -> LiveBytes:
        # FSDP frees and refills gathered parameters by resizing their storage, which is not an operator.
        self._resize = torch.UntypedStorage.resize_

        @functools.wraps(self._resize)
        def resize_(storage: torch.UntypedStorage, size: int):
            result = self._resize(storage, size)
            if (ref := weakref.ref(storage)) in self._sizes:
                self._set(ref, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for storage in storages(tree_leaves((args, kwargs)))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(tree_leaves(result)):
            ref = weakref.ref(storage, self._forget)
            if ref not in self._sizes and storage._cdata not in given:
                self._set(ref, storage.nbytes())
        return result

    def _set(self, ref: weakref.ref, size: int) -> None:
        self.now += size - self._sizes.get(ref, 0)
        self._sizes[ref] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, ref: weakref.ref) -> None:
        self.now -= self._sizes.pop(ref, 0)


def storages(values: Iterable[Any]) -> list[torch.UntypedStorage]:
    """The storages of all tensors among the values; of a sharded tensor, this rank's part."""
    found, values = [], [value for value in values if isinstance(value, Tensor)]
    for tensor in values:
        if is_traceable_wrapper_subclass(tensor):
            inner, _ = tensor.__tensor_flatten__()
            found += storages(getattr(tensor, name) for name in inner)
        else:
            found.append(tensor.untyped_storage())
    return found


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes alive between steps on this rank: weights, buffers, optimizer state, each storage once."""
    state = tree_leaves([list(state.values()) for state in optimizer.state.values()])
    tensors = [*model.parameters(), *model.buffers(), *state]
    return sum({storage._cdata: storage.nbytes() for storage in storages(tensors)}.values())
