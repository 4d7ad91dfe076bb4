"""LSTMs that torch.export and ONNX can express for any length: its own unroll them to the length they were traced with."""

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F


class ScanLSTM(nn.Module):
    """The computation of an nn.LSTM on (T, B, C), with its weights, as a scan over time."""

    def __init__(self, lstm: nn.LSTM):
        """Raises NotImplementedError on options that no system of ours uses."""
        super().__init__()
        if lstm.batch_first or lstm.proj_size or not lstm.bias:
            raise NotImplementedError("an LSTM with batch_first, a projection or without biases cannot be exported")
        self.bidirectional = lstm.bidirectional
        ends = ("", "_reverse") if lstm.bidirectional else ("",)
        self.directions = nn.ModuleList(
            Direction(lstm, f"_l{layer}{end}") for layer in range(lstm.num_layers) for end in ends)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x: (T, B, C). Returns (T, B, hidden · directions), and nothing in place of the last states."""
        step = 2 if self.bidirectional else 1
        for i in range(0, len(self.directions), step):
            x = torch.cat([direction(x) for direction in self.directions[i : i + step]], -1)
        return x, None


class Direction(nn.Module):
    """One direction of one layer; gates in torch's order: input, forget, cell, output."""

    def __init__(self, lstm: nn.LSTM, suffix: str):
        super().__init__()
        self.backward_in_time = suffix.endswith("_reverse")
        self.of_input = nn.Parameter(getattr(lstm, f"weight_ih{suffix}").detach()[:, :, None].clone(), requires_grad=False)
        self.of_state = nn.Parameter(getattr(lstm, f"weight_hh{suffix}").detach().t().contiguous(), requires_grad=False)
        bias = getattr(lstm, f"bias_ih{suffix}") + getattr(lstm, f"bias_hh{suffix}")
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, B, C). Returns (T, B, hidden)."""
        weight = self.of_state

        def step(carry: list[Tensor], gates: Tensor) -> tuple[list[Tensor], Tensor]:
            hidden, cell = carry
            into, keep, new, out = (gates + hidden @ weight).chunk(4, -1)
            cell = keep.sigmoid() * cell + into.sigmoid() * new.tanh()
            hidden = out.sigmoid() * cell.tanh()
            return [hidden, cell], hidden.clone()      # a scan's outputs may not be its carry

        start = x.new_zeros(x.shape[1], weight.shape[0])
        # as a convolution, since a product of three axes makes its reshaping a condition on the sizes: no batch of 1 then
        gates = F.conv1d(x.permute(1, 2, 0), self.of_input, self.bias).permute(2, 0, 1)      # (T, B, 4 · hidden)
        _, hidden = scan(step, [start, start.clone()], gates, reverse=self.backward_in_time)
        return hidden


def replace_lstms(module: nn.Module) -> None:
    """Put a ScanLSTM in the place of every nn.LSTM inside a module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LSTM):
                setattr(parent, name, ScanLSTM(child))
