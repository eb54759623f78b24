#!/bin/sh
# transformers 5.24.0: a causal model in float64 returns logits in float64 and a loss in float32, so that its gradients
# agree with those of the same loss in float64 to seven digits only (a masked model's loss is in float64).
# What it prints:
#     logits torch.float64 loss torch.float32 relative error of the gradient 4.3e-08
# Exits with an error where the behaviour is another one. It installs into a folder of its own, removed at the end.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --no-deps transformers==5.24.0 \
    huggingface-hub==2.4.0 numpy==2.4.6 packaging==26.3 pyyaml==6.0.4 regex==2026.11.19 \
    safetensors==0.8.0 tokenizers==0.23.3 tqdm==4.70.1 httpx2==2.16.2 httpcore2==2.16.2 h11==0.16.0 anyio==4.16.0 \
    certifi==2026.10.18 click==8.5.1 truststore==0.10.5 idna==3.20
"$work/venv/bin/python" -W ignore - <<'END'
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9, intermediate_size=8)
model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1)).double().eval()
tokens = torch.randint(9, (2, 4))
out = model(input_ids=tokens, labels=tokens)
ours = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
weight = model.lm_head.weight
theirs, exact = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (out.loss, ours))
error = float((theirs - exact).abs().max() / exact.abs().max())
print("logits", out.logits.dtype, "loss", out.loss.dtype, f"relative error of the gradient {error:.1e}")
assert out.logits.dtype == torch.float64 and out.loss.dtype == torch.float32 and 1e-9 < error < 1e-5
END
