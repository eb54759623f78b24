"""Which passages of a text most raised the probability of a sentence, under a small GPT: a page with coloured tokens.

python examples/data_attribution.py --steps 400 --sentence "What light through yonder window"
"""

import argparse
from html import escape
from pathlib import Path

import torch
from data import text
from kfac_char_gpt import GPT
from torch.nn import functional as F

import layerwise as lw

LENGTH = 32
token_loss = lambda logits, y: F.cross_entropy(logits.transpose(1, 2), y, reduction="sum")


def coloured(passage, scores, most):
    shade = lambda s: f"rgb({'50 160 80' if s > 0 else '200 60 60'} / {min(1, abs(s) / most):.2f})"
    pairs = zip(passage, scores.tolist(), strict=True)
    return "".join(f'<span style="background:{shade(s)}">{escape(c)}</span>' for c, s in pairs)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"steps": 400, "passages": 2000, "sentence": "What light", "page": "attribution.html"}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    numbers, characters = text()
    rows = numbers[: args.passages * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)  # [N, LENGTH + 1]
    model = GPT(len(characters), length=LENGTH)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(args.steps):
        batch = rows[torch.randint(len(rows), (32,))]
        opt.zero_grad()
        (token_loss(model(batch[:, :-1]), batch[:, 1:]) / batch[:, 1:].numel()).backward()
        opt.step()

    said = torch.tensor([characters.index(c) for c in args.sentence if c in characters][: LENGTH + 1])
    query = [(said[None, :-1], said[None, 1:])]
    loader = [(part[:, :-1], part[:, 1:]) for part in rows.split(64)]
    influence = lw.attribution.Influence(model, token_loss, "blocks.*.linear?").fit(loader)
    scores, best = influence.top(query, loader, k=10)
    tokens = influence.per_token(query, [(rows[best[0], :-1], rows[best[0], 1:])])[0][0]  # [10, LENGTH]
    words = ["".join(characters[c] for c in row) for row in rows[best[0], 1:].tolist()]
    most, title = tokens.abs().max().item(), f"Passages that raised “{escape(args.sentence)}” most"
    body = (f"<p>{s:.3g} <code>{coloured(*wt, most)}</code>" for s, *wt in zip(scores[0], words, tokens, strict=True))
    Path(args.page).write_text(
        f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>' + "".join(body)
    )
    print(f"{args.page}: the best of {len(rows)} passages has {scores[0, 0]:.3g}, {words[0]!r}")


if __name__ == "__main__":
    main()
