"""Networks that take their input in pieces of any size: every layer keeps what its later outputs still need.

The joined outputs are those of the whole input, up to the rounding of sums in another order: padding is put only at the true
start and end. What a layer keeps, and what a piece costs, does not grow. A layer that looks ahead gives its outputs later.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pad = Callable[[Tensor, int, int], Tensor]      # x (B, C, steps), steps on the left, steps on the right


class Context(NamedTuple):
    """How far the input reaches that one frame of the output is made of, beyond that frame's own stretch."""

    before: int
    behind: int      # the look-ahead


class Stream:
    """Takes (B, C, steps) by `push`, and the last of it by `finish`; both return what can be said by then, maybe 0 steps.

    What has 0 steps may have any number of channels. `local`: each output depends on a bounded stretch of the input.
    """

    local = True

    def push(self, x: Tensor) -> Tensor:
        """The outputs that need nothing behind x."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """All outputs that are left, x (maybe 0 steps) being the end of the input. The stream cannot be used again."""
        raise NotImplementedError

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """First and last step of the input that the outputs `first` … `last` depend on, as if there were no start and end."""
        raise NotImplementedError


def stream_of(module: nn.Module) -> Stream:
    """The stream of a module: what its own method `stream` gives, or the module at each step where it is an activation.

    Raises TypeError on a module of which it is not known how far it sees.
    """
    made = getattr(module, "stream", None)
    if made is not None:
        return made()
    if isinstance(module, nn.Sequential):
        return InTurn([stream_of(layer) for layer in module])
    if isinstance(module, nn.ELU | nn.Tanh | nn.Identity):
        return Pointwise(module)
    raise TypeError(f"{type(module).__name__} has no stream: give it a method `stream`")


def context_of(stream: Stream, step_in: int, step_out: int) -> Context | None:
    """The context of a frame that is `step_in` steps of the input and `step_out` of the output; None: there is no bound."""
    if not stream.local:
        return None
    first, last = stream.needs(0, step_out - 1)
    return Context(max(0, -first), max(0, last - step_in + 1))


def join(kept: Tensor | None, x: Tensor) -> Tensor:
    """Both one after the other."""
    if kept is None or not kept.shape[-1]:
        return x
    return torch.cat([kept, x], -1) if x.shape[-1] else kept


def tail(x: Tensor, start: int) -> Tensor:
    """x from a step on, as a copy: a view would keep the whole piece alive."""
    return x[..., start:].clone()


def pad_zeros(x: Tensor, left: int, right: int) -> Tensor:
    """x (B, C, steps) between zeros."""
    return F.pad(x, (left, right))


class Pointwise(Stream):
    """A function of each step alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def push(self, x: Tensor) -> Tensor:
        """See Stream."""
        return self.function(x) if x.shape[-1] else x

    finish = push

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """See Stream."""
        return first, last


class ConvStream(Stream):
    """A convolution behind its padding.

    left: steps of padding at the start; right: from the length of the whole input to the steps at its end; pad: makes them;
    reflects: how many steps next to an end the padding is made of, at most (0: it does not look at them).
    """

    def __init__(self, conv: nn.Conv1d, left: int, right: Callable[[int], int], pad: Pad = pad_zeros, reflects: int = 0):
        self.conv, self.left, self.right, self.pad, self.reflects = conv, left, right, pad, reflects
        self.stride = conv.stride[0]
        self.extent = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
        self.weight: Tensor | None = None
        self.kept: Tensor | None = None
        self.next = 0           # where in `kept` the window of the next output starts
        self.taken = 0          # steps of the input so far
        self.started = False    # whether the padding at the start is in place

    def push(self, x: Tensor) -> Tensor:
        """See Stream."""
        self.taken += x.shape[-1]
        x = join(self.kept, x)
        if not self.started:
            if self.taken <= self.reflects:
                self.kept = x
                return x[..., :0]
            x, self.started = self.pad(x, self.left, 0), True
        return self.convolve(x)

    def finish(self, x: Tensor) -> Tensor:
        """See Stream."""
        self.taken += x.shape[-1]
        x = self.pad(join(self.kept, x), 0 if self.started else self.left, self.right(self.taken))
        return self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        """The outputs of all whole windows of x, whose first starts at `next`; keeps the rest."""
        if self.weight is None:
            self.weight = self.conv.weight.detach()      # once: behind it may be a weight norm
        count = max(0, (x.shape[-1] - self.next - self.extent) // self.stride + 1)
        start, self.next = self.next, self.next + count * self.stride
        drop = max(0, min(self.next, x.shape[-1] - self.reflects - 1))
        self.kept, self.next = tail(x, drop), self.next - drop
        if not count:
            return x[..., :0]
        x = x[..., start : start + (count - 1) * self.stride + self.extent]
        return F.conv1d(x, self.weight, self.conv.bias, self.stride, 0, self.conv.dilation, self.conv.groups)

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """See Stream."""
        return first * self.stride - self.left, last * self.stride - self.left + self.extent - 1


class UpConvStream(Stream):
    """A transposed convolution, of whose outputs the first `left` are cut and `length(steps of the input)` are left."""

    def __init__(self, conv: nn.ConvTranspose1d, left: int, length: Callable[[int], int]):
        self.conv, self.left, self.length = conv, left, length
        self.stride, self.kernel = conv.stride[0], conv.kernel_size[0]
        self.weight: Tensor | None = None
        self.kept: Tensor | None = None
        self.taken = 0           # steps of the input so far
        self.given = left        # outputs so far, with those that are cut

    def push(self, x: Tensor) -> Tensor:
        """See Stream."""
        return self.convolve(x, (self.taken + x.shape[-1]) * self.stride)      # later outputs have a part in the next step

    def finish(self, x: Tensor) -> Tensor:
        """See Stream."""
        return self.convolve(x, self.left + self.length(self.taken + x.shape[-1]))

    def convolve(self, x: Tensor, end: int) -> Tensor:
        """The outputs up to `end`, counted from the first that is cut."""
        if self.weight is None:
            self.weight = self.conv.weight.detach()
        self.taken += x.shape[-1]
        x = join(self.kept, x)
        start = (self.taken - x.shape[-1]) * self.stride                       # the output at which x starts
        self.kept = tail(x, max(0, x.shape[-1] - (self.kernel - 1) // self.stride))
        if end <= self.given:
            return x[..., :0]
        begin, self.given = self.given - start, end
        y = F.conv_transpose1d(x, self.weight, self.conv.bias, self.stride)
        return y[..., begin : end - start]

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """See Stream."""
        return -((self.kernel - 1 - first - self.left) // self.stride), (last + self.left) // self.stride


class InTurn(Stream):
    """Streams one after another."""

    def __init__(self, streams: Sequence[Stream]):
        self.streams = list(streams)
        self.local = all(stream.local for stream in streams)

    def push(self, x: Tensor) -> Tensor:
        """See Stream."""
        for stream in self.streams:
            x = stream.push(x)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """See Stream."""
        for stream in self.streams:
            x = stream.finish(x)
        return x

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """See Stream."""
        for stream in reversed(self.streams):
            first, last = stream.needs(first, last)
        return first, last


class Together(Stream):
    """Several streams of the same input, and a function of their outputs at each step."""

    def __init__(self, streams: Sequence[Stream], combine: Callable[..., Tensor]):
        self.streams, self.combine = list(streams), combine
        self.local = all(stream.local for stream in streams)
        self.kept: list[Tensor | None] = [None] * len(self.streams)

    def push(self, x: Tensor) -> Tensor:
        """See Stream."""
        return self.meet([stream.push(x) for stream in self.streams])

    def finish(self, x: Tensor) -> Tensor:
        """See Stream."""
        return self.meet([stream.finish(x) for stream in self.streams])

    def meet(self, outputs: list[Tensor]) -> Tensor:
        """The function of what all streams have given; keeps what only some have."""
        outputs = [join(kept, output) for kept, output in zip(self.kept, outputs)]
        count = min(output.shape[-1] for output in outputs)
        self.kept = [tail(output, count) for output in outputs]
        return self.combine(*(output[..., :count] for output in outputs)) if count else outputs[0][..., :0]

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """See Stream."""
        reaches = [stream.needs(first, last) for stream in self.streams]
        return min(first for first, _ in reaches), max(last for _, last in reaches)


class Filled(Stream):
    """A stream with zeros at its end: behind the input up to a multiple of `step_in`, behind the output up to `step_out` for
    each step of the input (0: as it is)."""

    def __init__(self, stream: Stream, step_in: int = 1, step_out: int = 0):
        self.stream, self.step_in, self.step_out, self.local = stream, step_in, step_out, stream.local
        self.taken = self.given = 0

    def push(self, x: Tensor) -> Tensor:
        """See Stream."""
        y = self.stream.push(x)
        self.taken, self.given = self.taken + x.shape[-1], self.given + y.shape[-1]
        return y

    def finish(self, x: Tensor) -> Tensor:
        """See Stream."""
        self.taken += x.shape[-1]
        y = self.stream.finish(F.pad(x, (0, -self.taken % self.step_in)))
        return F.pad(y, (0, self.taken * self.step_out - self.given - y.shape[-1])) if self.step_out else y

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """See Stream."""
        return self.stream.needs(first, last)


class LSTMStream(Stream):
    """An LSTM of one direction, whose state is carried on: exact, yet without a bound on how far back it sees."""

    local = False

    def __init__(self, lstm: nn.LSTM):
        self.lstm = lstm
        self.state: tuple[Tensor, Tensor] | None = None

    def push(self, x: Tensor) -> Tensor:
        """See Stream. x: (B, C, steps)."""
        if not x.shape[-1]:
            return x
        y, self.state = self.lstm(x.permute(2, 0, 1), self.state)
        return y.permute(1, 2, 0)

    finish = push


class TwoWayLSTMStream(Stream):
    """One layer of an LSTM of both directions. The backward one starts, from nothing, at least `ahead` steps behind an output.

    Not exact, unless the input ends within these steps.
    """

    local = False

    def __init__(self, forward: nn.LSTM, backward: nn.LSTM, ahead: int):
        self.forward, self.backward, self.ahead = LSTMStream(forward), backward, ahead
        self.kept: Tensor | None = None

    def push(self, x: Tensor) -> Tensor:
        """See Stream."""
        x = join(self.kept, x)
        return self.run(x, max(0, x.shape[-1] - self.ahead))

    def finish(self, x: Tensor) -> Tensor:
        """See Stream."""
        x = join(self.kept, x)
        return self.run(x, x.shape[-1])

    def run(self, x: Tensor, count: int) -> Tensor:
        """The first `count` outputs of x; keeps the rest."""
        self.kept = tail(x, count)
        if not count:
            return x[..., :0]
        back, _ = self.backward(x.permute(2, 0, 1).flip(0))
        return torch.cat([self.forward.push(x[..., :count]), back.flip(0)[:count].permute(1, 2, 0)], 1)


def lstm_stream(lstm: nn.LSTM, ahead: int) -> Stream:
    """The stream of an LSTM (not batch first): one direction exact, both with `ahead` steps of look-ahead in each layer."""
    if not lstm.bidirectional:
        return LSTMStream(lstm)
    return InTurn([
        TwoWayLSTMStream(single_lstm(lstm, layer, ""), single_lstm(lstm, layer, "_reverse"), ahead)
        for layer in range(lstm.num_layers)])


def single_lstm(lstm: nn.LSTM, layer: int, direction: str) -> nn.LSTM:
    """One layer and one direction ("" or "_reverse") of an LSTM, as an LSTM that shares its weights."""
    weight = getattr(lstm, f"weight_ih_l{layer}{direction}")
    with torch.device("meta"):
        single = nn.LSTM(weight.shape[1], lstm.hidden_size)
    for name in ("weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l"):
        setattr(single, f"{name}0", getattr(lstm, f"{name}{layer}{direction}"))
    return single


class WindowStream(Stream):
    """A function of a whole input, computed in windows that overlap by `context` frames on both sides.

    For networks of which nothing else is known. A frame is `step_in` steps of the input and `step_out` of the output.
    """

    local = False

    def __init__(self, function: Callable[[Tensor], Tensor], step_in: int, step_out: int, context: int):
        self.function, self.step_in, self.step_out, self.context = function, step_in, step_out, context
        self.kept: Tensor | None = None
        self.before = 0      # frames of `kept` whose output was given

    def push(self, x: Tensor) -> Tensor:
        """See Stream."""
        x = join(self.kept, x)
        frames = x.shape[-1] // self.step_in - self.context        # of which the outputs can be given
        if frames <= self.before:
            self.kept = x
            return x[..., :0]
        y = self.function(x)[..., self.before * self.step_out : frames * self.step_out]
        start = max(0, frames - self.context)
        self.kept, self.before = tail(x, start * self.step_in), frames - start
        return y

    def finish(self, x: Tensor) -> Tensor:
        """See Stream."""
        return self.function(join(self.kept, x))[..., self.before * self.step_out :]
