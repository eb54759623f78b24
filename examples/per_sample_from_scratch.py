"""Gradients of each sample from scratch: Dangel, Kunstner and Hennig, "BackPACK: Packing more into Backprop" (2020).

A layer z = W a has in a minibatch the gradient Σ_n g_n a_nᵀ, where g_n = ∂L/∂z_n. Its terms are the samples' gradients
(table 1), and their norms and moments are products of the same a and g, with no [N, O, I] tensor anywhere:

    squared norms      |g_n a_nᵀ|² = |g_n|² |a_n|²                      (Goodfellow, 2015, equation 2)
    second moment      Σ_n (g_n a_nᵀ)² = Σ_n g_n² (a_n²)ᵀ               elementwise
    variance           Σ_n (g_n a_nᵀ)² / N − (Σ_n g_n a_nᵀ / N)²        (equation 5)

In the library: `lw.observe(model, lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance())`.
"""

import torch
from torch.nn.functional import cross_entropy, pad


def forward(weights, x):
    """Inputs a and outputs z = W a of every layer, tanh between them; W's last column is the bias, so a ends in a 1."""
    inputs, outputs = [], []
    for w in weights:
        inputs.append(pad(outputs[-1].tanh() if outputs else x, (0, 1), value=1.0))
        outputs.append((inputs[-1] @ w.T).requires_grad_())
    return inputs, outputs


def step(weights, x, labels):
    """(a, g) of every layer from one forward and one backward pass, with the mean cross entropy for L."""
    inputs, outputs = forward(weights, x)
    gs = torch.autograd.grad(cross_entropy(outputs[-1], labels), outputs)
    return [(a.detach(), g) for a, g in zip(inputs, gs, strict=True)]


def per_sample(a, g):
    """[N, O, I]; the sum over n is ∂L/∂W."""
    return g[:, :, None] * a[:, None, :]


def squared_norm(a, g):
    """[N]."""
    return g.square().sum(1) * a.square().sum(1)


def second_moment(a, g):
    """[O, I]."""
    return g.square().T @ a.square()


def variance(a, g):
    """[O, I]."""
    return second_moment(a, g) / len(a) - (g.T @ a / len(a)).square()


if __name__ == "__main__":
    torch.manual_seed(0)
    x, weights = torch.randn(500, 10), [torch.randn(32, 11) / 3, torch.randn(32, 33) / 6, torch.randn(3, 33) / 6]
    for n, (a, g) in enumerate(step(weights, x, (x @ torch.randn(10, 3)).argmax(1))):
        gradient, norms = g.T @ a, squared_norm(a, g).sqrt() * len(a)  # of the samples' own losses: N g_n
        noise = variance(a, g).sum() * len(a) ** 2 / gradient.square().sum()
        print(f"layer {n}: gradient {gradient.norm():.3f}, of single samples {norms.min():.3f} to {norms.max():.3f}")
        print(f"  their variance is {noise:.1f} times its square")
