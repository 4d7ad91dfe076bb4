"""Networks that see a bounded window, run over longer inputs: overlapping windows, each of which gives a part of the output.

The whole (`in_windows`) and a stream of pieces (`PlannedStream`) compute the same windows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .streams import Stream, join


@dataclass(frozen=True)
class WindowPlan:
    """Windows of `size` frames, one every `step`. Each but the first gives its output from frame `lead` on; there it takes over
    from the one before. A further window starts only where more than `least` frames are left."""

    size: int
    step: int
    lead: int = 0
    least: int = 0

    def __post_init__(self) -> None:
        shared = self.size - self.step      # frames of two windows
        if self.step < 1 or not (0 <= self.lead <= shared and 0 <= self.least <= shared):
            raise ValueError(f"{self} leaves gaps")

    def starts(self, frames: int) -> Iterator[int]:
        """First frame of each window of an input of so many frames."""
        yield 0
        yield from range(self.step, max(frames - self.least, self.step), self.step)


def both_sides(size: int, overlap: int) -> WindowPlan:
    """Context on both sides, half the overlap each; the last window has more than `overlap` frames, and may be short."""
    return WindowPlan(size, size - overlap, overlap // 2, overlap)


def look_ahead(size: int, overlap: int) -> WindowPlan:
    """Context behind a window only: each gives its first `size − overlap` frames; the last may have any length."""
    return WindowPlan(size, size - overlap)


def in_windows(
    function: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, lengths: Tensor | None, plan: WindowPlan, step_in: int,
    step_out: int,
) -> Tensor:
    """(B, K, T · step_out) of x (B, C, L), T = ⌈L / step_in⌉ frames, each `step_in` steps of x and `step_out` of the output.

    function(window, lengths of its items) gives (b, K, n), maybe less than its whole frames; what it leaves out is 0.
    lengths: (B,) steps of x, none: all. An item takes part in the windows that it has alone.
    """
    frames = -(-x.shape[-1] // step_in)
    made: Tensor | None = None
    for start in plan.starts(frames):
        items: Tensor | slice = slice(None)
        if lengths is not None and start:
            items = (lengths > (start + plan.least) * step_in).nonzero().flatten()
        window = x[items, :, start * step_in : (start + plan.size) * step_in]
        ends = None if lengths is None else (lengths[items] - start * step_in).clamp_max(window.shape[-1])
        y = function(window, ends)
        if made is None:
            made = y.new_zeros(x.shape[0], y.shape[1], frames * step_out)
        skipped = (plan.lead if start else 0) * step_out
        begin = start * step_out + skipped
        made[items, :, begin : begin + y.shape[-1] - skipped] = y[..., skipped:]
    assert made is not None
    return made


class PlannedStream(Stream):
    """`in_windows` in pieces, equal bit by bit: holds one window. For inputs whose items are all whole."""

    local = False

    def __init__(self, function: Callable[[Tensor, Tensor | None], Tensor], plan: WindowPlan, step_in: int, step_out: int):
        self.function, self.plan, self.step_in, self.step_out = function, plan, step_in, step_out
        self.kept: Tensor | None = None
        self.lead = 0      # frames of the next window's output that the one before has given

    def push(self, x: Tensor) -> Tensor:
        """See Stream."""
        return self.take(join(self.kept, x), self.plan.size)

    def finish(self, x: Tensor) -> Tensor:
        """See Stream."""
        before = self.take(join(self.kept, x), 0)
        assert self.kept is not None
        last = self.function(self.kept, None)[..., self.lead * self.step_out :]
        return torch.cat([before, last], -1) if before.shape[-1] else last

    def take(self, x: Tensor, more: int) -> Tensor:
        """The outputs of all windows behind which another one starts, and that have `more` frames in x; keeps the rest."""
        plan, made = self.plan, []
        while x.shape[-1] > max(more, plan.step + plan.least) * self.step_in:
            y = self.function(x[..., : plan.size * self.step_in], None)
            made.append(y[..., self.lead * self.step_out : (plan.step + plan.lead) * self.step_out])
            x, self.lead = x[..., plan.step * self.step_in :], plan.lead
        self.kept = x.clone() if made else x
        return torch.cat(made, -1) if made else x[..., :0]


