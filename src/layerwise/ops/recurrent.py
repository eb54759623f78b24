"""Recurrent layers and cells decomposed into plain calls, one step after the other.

With x_t the input, h the state before the step, σ the logistic function:

    RNN    h' = f(W x_t + b + U h + d),                      f = tanh or ReLU
    LSTM   i, f, g, o = W x_t + b + U h + d,                 c' = σ(f) c + σ(i) tanh(g),   h' = σ(o) tanh(c')
           and h' := P h' with a projection
    GRU    r, z, n  of W x_t + b and of U h + d each,        n = tanh(n_x + σ(r) n_h),     h' = n + σ(z) (h - n)

W enters one call with all steps; U enters one call a step, so it has as many uses as there are steps.
Sources: Hochreiter and Schmidhuber, 1997; Sak et al., 2014 (projection); Cho et al., 2014; in torch's form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import BadInput

__all__ = ["DECOMPOSITIONS", "refused"]

State = tuple[Tensor, ...]  # (h,) or (h, c)
Step = Callable[[Tensor, State, "Weights"], State]


class Weights(NamedTuple):
    """The tensors of one layer and direction: of the input, of the state, their biases, the projection."""

    input: Tensor
    state: Tensor
    input_bias: Tensor | None = None
    state_bias: Tensor | None = None
    projection: Tensor | None = None


# -- one step ---------------------------------------------------------------------------------------------


def _lstm_step(x: Tensor, state: State, w: Weights) -> State:
    h, c = state
    i, f, g, o = (x + F.linear(h, w.state, w.state_bias)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w.projection is None else F.linear(h, w.projection)), c


def _gru_step(x: Tensor, state: State, w: Weights) -> State:
    (h,) = state
    rx, zx, nx = x.chunk(3, -1)
    rh, zh, nh = F.linear(h, w.state, w.state_bias).chunk(3, -1)
    n = (nx + (rx + rh).sigmoid() * nh).tanh()
    return (n + (zx + zh).sigmoid() * (h - n),)


def _rnn_step(x: Tensor, state: State, w: Weights, f: Callable[[Tensor], Tensor]) -> State:
    (h,) = state
    return (f(x + F.linear(h, w.state, w.state_bias)),)


_STEPS: dict[str, Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": partial(_rnn_step, f=torch.tanh),
    "rnn_relu": partial(_rnn_step, f=torch.relu),
}


def _start(state: State, gates: Tensor) -> State:
    """The first state as data of the samples: zeros by themselves count as a constant."""
    return tuple(h if h.requires_grad else h.expand_as(gates[..., : h.shape[-1]]) for h in state)


# -- cells ------------------------------------------------------------------------------------------------


def _cell(step: Step, x: Tensor, state: State, w: Weights) -> State:
    gates = F.linear(x, w.input, w.input_bias)
    _check_state(state, x, x.shape[:-1])
    return step(gates, _start(state, gates), w)


def _lstm_cell(
    input: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:  # fmt: skip
    """`torch.lstm_cell`: (h', c')."""
    return _cell(_lstm_step, input, tuple(hx), Weights(w_ih, w_hh, b_ih, b_hh))


def _plain_cell(
    step: Step, input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`torch.gru_cell` and its like: h'."""
    return _cell(step, input, (hx,), Weights(w_ih, w_hh, b_ih, b_hh))[0]


# -- layers -----------------------------------------------------------------------------------------------


def _lstm(
    input: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> State:  # fmt: skip
    """`torch.lstm`: (outputs, h of all layers at the end, c of all layers at the end)."""
    projected = hx[0].shape[-1] != hx[1].shape[-1]
    layers = _layers(params, has_biases, num_layers, bidirectional, projected)
    return _run(_lstm_step, input, tuple(hx), layers, dropout if train else 0.0, batch_first)


def _plain(
    step: Step, input: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> State:  # fmt: skip
    """`torch.gru` and its like: (outputs, h of all layers at the end)."""
    layers = _layers(params, has_biases, num_layers, bidirectional, projected=False)
    return _run(step, input, (hx,), layers, dropout if train else 0.0, batch_first)


def _layers(
    params: Sequence[Tensor], has_biases: bool, num_layers: int, bidirectional: bool, projected: bool
) -> list[list[Weights]]:
    """The flat list of weights by layer and direction."""
    each, ways = 2 + 2 * has_biases + projected, 1 + bidirectional
    if len(params) != each * ways * num_layers:
        raise BadInput(
            f"a recurrent layer of {num_layers} layers and {ways} directions was given {len(params)} weights; "
            f"it needs {each} for each of them"
        )
    found = []
    for first in range(0, len(params), each):
        some = list(params[first : first + each])
        projection = some.pop() if projected else None
        input_bias, state_bias = some[2:] or (None, None)
        found.append(Weights(some[0], some[1], input_bias, state_bias, projection))
    return [found[k : k + ways] for k in range(0, len(found), ways)]


def _run(step: Step, x: Tensor, hx: State, layers: list[list[Weights]], dropout: float, batch_first: bool) -> State:
    """All layers in turn; a second direction reads the input backwards, and joins the first along features."""
    time = 1 if batch_first and x.dim() == 3 else 0
    samples = [n for axis, n in enumerate(x.shape[:-1]) if axis != time]
    _check_state(hx, x, (sum(map(len, layers)), *samples))
    if not x.shape[time]:
        raise BadInput(f"a recurrent layer with an input of shape {tuple(x.shape)}: axis {time} holds no step")
    starts = list(zip(*(h.unbind(0) for h in hx), strict=True))
    ends: list[State] = []
    for number, directions in enumerate(layers):
        if number and dropout > 0:
            x = _dropped(x, dropout, time)
        outputs = []
        for backwards, weights in enumerate(directions):
            out, end = _direction(step, x, starts[len(ends)], weights, time, bool(backwards))
            outputs.append(out)
            ends.append(end)
        # laid out as torch's, steps first: a dropout behind it draws in memory's order
        x = outputs[0] if len(outputs) == 1 else torch.cat([o.transpose(0, time) for o in outputs], -1)
        x = x.transpose(0, time) if len(outputs) > 1 else x
    return (x, *(torch.stack(parts) for parts in zip(*ends, strict=True)))


def _direction(step: Step, x: Tensor, start: State, w: Weights, time: int, backwards: bool) -> tuple[Tensor, State]:
    """One layer in one direction: its outputs in the input's order, and its last state."""
    steps: Sequence[Tensor] = F.linear(x, w.input, w.input_bias).unbind(time)
    steps = steps[::-1] if backwards else steps
    state = _start(start, steps[0])
    outputs = []
    for gates in steps:
        state = step(gates, state, w)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs).transpose(0, time), state


def _dropped(x: Tensor, p: float, time: int) -> Tensor:
    """Dropout with torch's own draws, whose order is steps first."""
    return F.dropout(x.transpose(0, time).contiguous(), p).transpose(0, time) if time else F.dropout(x, p)


def _check_state(state: State, x: Tensor, lead: Sequence[int]) -> None:
    """Raise BadInput where a state would be broadcast."""
    for h in state:
        if tuple(h.shape[:-1]) != tuple(lead):
            raise BadInput(
                f"a recurrent layer with an input of shape {tuple(x.shape)} was given a state of shape "
                f"{tuple(h.shape)}; it needs one of shape {(*lead, h.shape[-1])}"
            )


def refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call of a recurrent layer has no decomposition; None where it has one."""
    packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], (list, tuple)))
    if packed:  # its weights come fourth, behind the sizes
        return (
            "a recurrent layer on a packed sequence, whose rows belong to the samples unevenly; feed the padded batch "
            "instead, and leave the padded places out of the loss (ignore_index), or take each sample's last step"
        )
    return None


DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.lstm: _lstm, torch.lstm_cell: _lstm_cell}
for _name, _step in _STEPS.items():
    if _name != "lstm":
        DECOMPOSITIONS[getattr(torch, _name)] = partial(_plain, _step)
        DECOMPOSITIONS[getattr(torch, _name + "_cell")] = partial(_plain_cell, _step)
