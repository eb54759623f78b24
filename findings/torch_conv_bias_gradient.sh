#!/bin/sh
# torch 2.13.0 on a CPU: a convolution of which only the bias is trained (its weight is frozen) computes the weight's
# gradient too, and drops it, so that fine-tuning biases alone spares no product. oneDNN's own log says which ran.
# What it prints:
#     weight and bias trained: 1 product of a weight's gradient
#     bias trained, weight frozen: 1 product of a weight's gradient
#     both frozen: 0 products of a weight's gradient
# Exits with an error where the behaviour is another one. It installs into a folder of its own, removed at the end.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
cat > "$work/step.py" <<'END'
import sys

import torch

trained = sys.argv[1].split("+")
torch.manual_seed(0)
conv = torch.nn.Conv2d(32, 32, 3)
conv.weight.requires_grad_("weight" in trained)
conv.bias.requires_grad_("bias" in trained)
x = torch.randn(8, 32, 16, 16, requires_grad=True)
conv(x).square().sum().backward()
assert (conv.weight.grad is None) != ("weight" in trained)
END
for trained in weight+bias bias none; do
    products=$(ONEDNN_VERBOSE=1 "$work/venv/bin/python" -W ignore "$work/step.py" "$trained" |
        grep ",exec,cpu,convolution," | grep -c "backward_weights" || true)
    case $trained in
        weight+bias) said="weight and bias trained" ;;
        bias) said="bias trained, weight frozen" ;;
        *) said="both frozen" ;;
    esac
    if [ "$products" = 1 ]; then word=product; else word=products; fi
    echo "$said: $products $word of a weight's gradient"
    case $trained in
        none) test "$products" = 0 ;;
        *) test "$products" = 1 ;;
    esac
done
