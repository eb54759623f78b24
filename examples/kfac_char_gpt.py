"""K-FAC in front of AdamW, on a small transformer that predicts the next character.

python examples/kfac_char_gpt.py --steps 200          (add --plain for AdamW alone)
"""

import argparse
from contextlib import nullcontext

import torch
from data import text
from torch import nn
from torch.nn import functional as F

import layerwise as lw


class GPT(nn.Module):
    def __init__(self, characters, width=64, length=32, layers=2):
        super().__init__()
        self.token, self.place = nn.Embedding(characters, width), nn.Embedding(length, width)
        block = lambda: nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks, self.out = nn.ModuleList(block() for _ in range(layers)), nn.Linear(width, characters)

    def forward(self, x):
        h = self.token(x) + self.place(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.out(h)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plain", action="store_true", help="AdamW alone")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    numbers, characters = text()
    model = GPT(len(characters))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    pre = lw.optim.Preconditioner(model, "kfac", update_factors_every=10, update_inverses_every=50)
    watch, losses = nullcontext if args.plain else pre.watch, []
    for step in range(args.steps):
        start = torch.randint(len(numbers) - 33, (32,))
        rows = numbers[start[:, None] + torch.arange(33)]
        opt.zero_grad()
        with watch():
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
        if not args.plain:
            pre.step()
        opt.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {sum(losses[-20:]) / 20:.3f} nats a character")


if __name__ == "__main__":
    main()
