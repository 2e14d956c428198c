"""How much an adapter changes, and models made from others: converted, merged, averaged."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from common import CheckpointError
from distributed import whole
from export import card, layouts
from export.read import Adapter, Full, open_model, with_norms
from export.write import Named, write_adapter, write_full
from layers.nf4 import plain

NO_EFFECT = 1e-7  # a change of this share of a weight's norm is lost in float32 rounding
TINY = torch.finfo(torch.float32).tiny


def relative_changes(model: nn.Module) -> dict[str, float]:
    """How much each adapter of a sharded model changes its layer: |scale * B @ A| / |W|, Frobenius norms. Collective.

    The norm of B @ A comes from the r x r products B^T B and A A^T, so that B @ A is never built.
    """
    changes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            A, B = (whole(getattr(layer, f"lora_{factor}")["default"].weight.detach()).double() for factor in "AB")
            if layer.lora_magnitude_vector:
                changes[name] = _change_by_dora(layer, layer.scaling["default"] * (B @ A))
                continue
            norm = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt() * layer.scaling["default"]
            weight = torch.linalg.vector_norm(plain(layer.base_layer.weight.detach()), dtype=torch.float32)
            changes[name] = (norm / whole(weight).clamp(min=TINY)).item()
    return changes


def _change_by_dora(layer: LoraLayer, change: Tensor) -> float:
    """The same of DoRA; change: scale * B @ A. Collective."""
    weight = whole(layer.base_layer.weight.detach()).double()
    magnitude = whole(layer.lora_magnitude_vector["default"].weight.detach()).double()
    return ((with_norms(weight + change, magnitude) - weight).norm() / weight.norm().clamp(min=TINY)).item()


def describe_changes(changes: dict[str, float]) -> str:
    """One line about `relative_changes`; it begins with "warning:" if the adapter has no effect."""
    unchanged = [name for name, change in changes.items() if change < NO_EFFECT]
    if len(unchanged) == len(changes):
        return f"warning: the adapter has no effect: it changes none of its {len(changes)} layers. Was it trained?"
    values = sorted(changes.values())
    line = f"the adapter changes its layers by {statistics.median(values):.2%} of their weights' norm"
    line += f" (median; largest {values[-1]:.2%})"
    if unchanged:
        line += f"; {len(unchanged)} of {len(changes)} not at all, first {unchanged[0]}"
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Convert, merge, average


def convert(source: Full | Adapter, out: Path, layout: layouts.Layout = "boson", about: card.About = card.NOTHING) -> None:
    """Write a model again: in the other layout, or finished from a training state."""
    tensors = ((name, source.read(name)) for name in source.shapes)
    _write(source, ((name, tensor.to(source.dtype or tensor.dtype)) for name, tensor in tensors), out, layout)
    card.write(out, lambda: card.of_model(out, f"Written from `{source.folder.name}`.", source.folder, source.base, about))


def _write(like: Full | Adapter, named: Named, out: Path, layout: layouts.Layout) -> None:
    """Tensors as a model of the same kind as `like`, with its configuration and tokenizer."""
    if isinstance(like, Full):
        write_full(out, named, like.config, like.tokenizer, layout, like.config_folder)
    else:
        write_adapter(out, named, like.lora, like.tokenizer)


@dataclass
class MergeReport:
    """How merging changed each layer, as shares of Frobenius norms."""

    dtype: torch.dtype
    changes: dict[str, float]  # |change| / |W|
    rounding: dict[str, float]  # |merged as written - merged in float32| / |change|, where there is a change

    def add(self, module: str, weight: Tensor, exact: Tensor) -> Tensor:
        """Note a layer; returns `exact`, its merged weight, in the dtype of `weight`."""
        written, size = exact.to(weight.dtype), (exact - weight.float()).norm().item()
        self.dtype = weight.dtype
        self.changes[module] = size / max(weight.float().norm().item(), TINY)
        if size:
            self.rounding[module] = (written.float() - exact).norm().item() / size
        return written

    def __str__(self) -> str:
        line = describe_changes(self.changes)
        if not any(self.rounding.values()):
            return line
        median, largest = statistics.median(self.rounding.values()), max(self.rounding.values())
        name = str(self.dtype).removeprefix("torch.")
        return f"{line}\nrounding to {name} adds an error of {median:.2%} of the change (median; largest {largest:.2%})"


def merge(
    adapter: Adapter, base: Full, out: Path, layout: layouts.Layout = "boson", about: card.About = card.NOTHING
) -> MergeReport:
    """W + scale * B @ A, or DoRA's, in float32, then in the dtype of W, tensor by tensor.

    raises: CheckpointError if the adapter is not one of this base
    """
    report = MergeReport(torch.float32, {}, {})
    _write(base, merged(adapter, base, report), out, layout)
    what = f"The adapter `{adapter.folder.name}` merged into `{card.public(adapter.base or base.folder.name)}`."
    below = f"## Merging\n\n{report}"
    card.write(out, lambda: card.of_model(out, what, adapter.folder, adapter.base, about, below))
    return report


def merged(adapter: Adapter, base: Full, report: MergeReport | None = None) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors. With a `report`, which describes them, in the base's dtypes; without, changed layers in float32."""
    for module in adapter.modules:
        if base.shapes.get(f"{module}.weight") != adapter.shape(module):
            raise CheckpointError(
                f"{adapter.folder} is no adapter of {base.folder}: it is made for {module}.weight of shape "
                f"{adapter.shape(module)}, here it is {base.shapes.get(f'{module}.weight')}"
            )
    changed = {f"{module}.weight": module for module in adapter.modules}
    for name in base.shapes:
        weight = base.read(name)
        if name in changed:
            exact = adapter.merged(changed[name], weight)
            weight = report.add(changed[name], weight, exact) if report else exact
        yield name, weight


def average(
    sources: Sequence[Full | Adapter], out: Path, layout: layouts.Layout = "boson", about: card.About = card.NOTHING
) -> str:
    """The mean of each tensor, accumulated in float32.

    returns: for adapters, how far the mean of the factors is from the mean of their products
    raises:  CheckpointError if the sources are not alike
    """
    first, *others = sources
    for other in others:
        _check_alike(first, other)

    def mean(name: str) -> Tensor:
        start = first.read(name)
        total = start.to(torch.float32, copy=True)
        for other in others:
            total += other.read(name)
        return total.div_(len(sources)).to(first.dtype or start.dtype)

    _write(first, ((name, mean(name)) for name in first.shapes), out, layout)
    what = f"The mean of {', '.join(f'`{source.folder.name}`' for source in sources)}."
    card.write(out, lambda: card.of_model(out, what, first.folder, first.base, about))
    if isinstance(first, Full):
        return ""
    result = open_model(out)
    apart = [_distance(sources, result, module) for module in first.modules]
    return (
        f"the mean's change of a layer is {statistics.median(apart):.2%} away from the mean of the changes (median; largest "
        f"{max(apart):.2%}): near 0 for checkpoints of one run, large for adapters that have nothing in common"
    )


def _check_alike(first: Full | Adapter, other: Full | Adapter) -> None:
    names = sorted(first.shapes.keys() | other.shapes.keys())
    different = [name for name in names if first.shapes.get(name) != other.shapes.get(name)]
    if type(other) is not type(first) or different:
        raise CheckpointError(f"{other.folder} and {first.folder} are not alike: {(different or ['another kind'])[0]}")
    if isinstance(first, Adapter) and other.scale != first.scale:
        raise CheckpointError(f"{other.folder} scales by {other.scale}, {first.folder} by {first.scale}")


def _distance(sources: Sequence[Adapter], result: Adapter, module: str) -> float:
    """|mean(B) @ mean(A) - mean(B @ A)| / |mean(B @ A)|, Frobenius norms."""
    mean = sum(source.change(module) for source in sources) / len(sources)
    return ((result.change(module) - mean).norm() / mean.norm().clamp(min=TINY)).item()
