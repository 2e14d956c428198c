"""This process among the others: ranks that fail together, agree with each other, and say what they do."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from common import ConfigError, Interrupted, UserError, listing
from process.gpu import on_gpu
from process.log import DETAILS, show
from process.signals import Signals

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Every rank's value. Collective."""
    values: list = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(values, value)
    return values


def own_rows(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Dist:
    """This process among the others."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    signals: Signals = field(default_factory=Signals, compare=False)
    progress: Progress = field(default_factory=lambda: Progress(), compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place. Collective."""
        torch_dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's value. Collective."""
        return gather(value)

    def pace(self) -> Tensor:
        """[ranks, 2] zeros but for this rank: the seconds that it waited for its last batches, and of its last step."""
        pace = torch.zeros(self.world_size, 2)
        pace[self.rank] = torch.tensor([self.progress.data_wait_sec, self.progress.step_sec])
        return pace.to(self.device, non_blocking=True)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Every rank's rows [n, D], one rank after the other. Collective, unless nobody has any.

        counts: n of each rank, the same everywhere
        """
        padded = torch.nn.functional.pad(rows, (0, 0, 0, max(counts) - len(rows)))
        parts = [torch.empty_like(padded) for _ in counts]
        if max(counts):
            torch_dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    def together(self, function: Callable[[], T]) -> T:
        """Run `function` on every rank; if the user's input made it fail on any, raise that error on all. Collective."""
        result = error = None
        try:
            result = function()
        except UserError as caught:
            error = caught
        if self.any(error is not None):
            raise next(e for e in self.gather(error) if e is not None)
        return result

    def iterate(self, iterable: Iterable[T]) -> Iterator[T]:
        """The items of equally long iterables; what one rank cannot read, or a signal, is an error on all. Collective."""
        iterator = iter(iterable)

        def fetch() -> T | None:
            self.progress.at("waiting for data")
            with self.signals.interrupting():
                item = next(iterator, None)
            self.progress.at(WAITING)
            return item

        while (item := self.together(fetch)) is not None:
            self.progress.at("computing")
            yield item

    def check_signals(self) -> None:
        """Raise Interrupted on all ranks if one of them has received a signal. Collective."""
        if self.any(self.signals.received is not None):
            raise Interrupted(next(filter(None, self.gather(self.signals.received))).name)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""
        return self.each(flag)[0]

    def each(self, *flags: bool) -> list[bool]:
        """Whether each of the flags is set on any rank. Collective."""
        return (self.sum(torch.tensor(flags, dtype=torch.float32)) > 0).tolist()  # on the CPU: no wait for a GPU

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank. Collective."""
        values = [value]
        torch_dist.broadcast_object_list(values, src=0)
        return values[0]

    def main_first(self, function: Callable[[], T]) -> T:
        """Like `together`, but the first rank of each node goes ahead: it downloads, the others find the files."""
        ahead = self.together(lambda: function() if self.local_rank == 0 else None)
        return self.together(lambda: ahead if self.local_rank == 0 else function())

    def is_restart_of(self, launch: str | None) -> bool:
        """Whether torchrun restarts, after a failure, the run that this launcher (see `launch_id`) started. Collective."""
        restarted = self.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)  # nodes count by themselves
        return self.from_main(restarted and launch is not None and launch == launch_id())


def launch_id() -> str | None:
    """The random id of what started this rank: of tools/launch.py, or of torchrun on one node."""
    of_torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is torchrun's default between nodes
    return os.environ.get("LAUNCH_ID") or (None if of_torchrun == "none" else of_torchrun)


def setup_distributed(device: str = "auto", replicate: int = 1, timeout_min: float = 60.0) -> Dist:
    """Join the other ranks; without torchrun this process is the only one.

    timeout_min: how long ranks wait for each other, for one that downloads, too
    raises: ConfigError if the ranks cannot be divided into `replicate` equal groups, or a GPU is there but not seen
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size, num_local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    use_gpu = on_gpu(device)
    if use_gpu and num_local > (num_gpus := torch.cuda.device_count()):
        raise ConfigError(f"{num_local} ranks on a node with {num_gpus} GPU(s); start as many as there are GPUs")
    if use_gpu:
        torch.cuda.set_device(local_rank)
    here = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if not torch_dist.is_initialized():
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the last collectives, for OUTPUT/stuck
        backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
        timeout = datetime.timedelta(minutes=timeout_min)
        torch_dist.init_process_group(backend, store=_meeting_place(timeout), rank=rank, world_size=world_size, timeout=timeout)
    return Dist(rank, local_rank, world_size, here, make_mesh(here.type, world_size, replicate))


def make_mesh(device_type: str, world_size: int, replicate: int) -> DeviceMesh:
    """All ranks in one dimension, or in `replicate` equal groups that are each sharded by themselves.

    raises: ConfigError if the ranks cannot be divided so
    """
    if world_size % replicate:
        raise ConfigError(f"--replicate {replicate} does not divide {world_size} ranks")
    if replicate == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicate, world_size // replicate), mesh_dim_names=("replicate", "shard"))


def _meeting_place(timeout: datetime.timedelta) -> torch_dist.Store:
    """Where ranks find each other's addresses.

    torchrun hands a restarted rank the store of the attempt before, with addresses nobody answers at any more. A prefix keeps
    the attempts apart; nodes count them differently, so between nodes tools/launch.py asks for a new store each time.
    """
    if "RANK" not in os.environ:
        return torch_dist.HashStore()
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return torch_dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store) if one_node else store


def lost_others(error: Exception) -> bool:
    """Whether an error only says that other ranks are gone or do not answer."""
    return isinstance(error, torch_dist.DistError) or "gloo" in str(error)


WAITING = "waiting for other ranks"


@dataclass
class Progress:
    """What this rank does, since when, and how long the last step took: see process/watchdog.py."""

    doing: str = "starting"
    since: float = field(default_factory=time.monotonic)
    step: int = 0
    data_wait_sec: float = 0.0
    step_sec: float = 0.0

    def at(self, doing: str, step: int | None = None) -> None:
        """Note what this rank begins to do: it goes on."""
        now = time.monotonic()
        if self.doing == "waiting for data":
            self.data_wait_sec = now - self.since
        self.doing, self.since, self.step = doing, now, self.step if step is None else step


# ---------------------------------------------------------------------------------------------------------------------
# What rank 0 says


def log(dist: Dist, message: str) -> None:
    if dist.is_main:
        show(message)


def detail(dist: Dist, message: str) -> None:
    """Worth keeping, in OUTPUT/log.txt, but shown only with --verbose."""
    if dist.is_main:
        DETAILS.info("%s", message)


def progress_bar(dist: Dist, **settings: Any) -> tqdm:
    """A bar that rank 0 shows, drawn seldom where each drawing is a new line."""
    return tqdm(mininterval=0.5 if sys.stderr.isatty() else 10, disable=not dist.is_main, **settings)


def log_list(dist: Dist, title: str, items: Sequence[str]) -> None:
    """A title and the first items below it, if there are any."""
    if items:
        log(dist, listing(title, items))
