#!/bin/sh
# torch 2.13.0 on a CPU: per-sample gradients (vmap of grad) through nn.LSTM work in float32 and raise in float64;
# forward-mode products (jvp, and with it jacfwd and hessian) work in float64 and raise in float32, whose kernel is
# another one. A program that was tried in one type fails in the other.
# What it prints:
#     torch.float32 vmap(grad) works
#     torch.float32 jvp NotImplementedError: Trying to use forward AD with mkldnn_rnn_layer that does not support i
#     torch.float64 vmap(grad) RuntimeError: output with shape [1, 16] doesn't match the broadcast shape [5, 1, 16]
#     torch.float64 jvp works
# Exits with an error where the behaviour is another one. It installs into a folder of its own, removed at the end.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -W ignore - <<'END'
import torch
from torch.func import functional_call, grad, jvp, vmap

found = {}
for dtype in (torch.float32, torch.float64):
    torch.manual_seed(0)
    model = torch.nn.LSTM(3, 4, batch_first=True).to(dtype)
    params, x = dict(model.named_parameters()), torch.randn(5, 6, 3, dtype=dtype)
    loss = lambda p, one: functional_call(model, p, (one[None],))[0].square().sum()
    tries = {
        "vmap(grad)": lambda: vmap(grad(loss), (None, 0))(params, x),
        "jvp": lambda: jvp(lambda p: loss(p, x[0]), (params,), (params,)),
    }
    for name, run in tries.items():
        try:
            run()
            found[dtype, name] = "works"
        except (RuntimeError, NotImplementedError) as error:
            found[dtype, name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:70]}"
        print(dtype, name, found[dtype, name])
works = {key for key, what in found.items() if what == "works"}
assert works == {(torch.float32, "vmap(grad)"), (torch.float64, "jvp")}
END
