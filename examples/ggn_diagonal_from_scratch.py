"""The diagonal of the Gauss-Newton matrix, from scratch: Schraudolph (2002), by the pass of Dangel et al. (2020).

The generalized Gauss-Newton matrix of a loss L = Σ_n ℓ_n(f(x_n)) is Σ_n J_nᵀ H_n J_n, where J_n is the Jacobian of the
output f(x_n) by the parameters, and H_n the Hessian of ℓ_n by the output. Where H_n = S_n S_nᵀ, the diagonal sums the
squares of J_nᵀ S_n, which is what backprop gives for S_n's columns in place of the gradient of ℓ_n (equation 19).

In the library: `lw.observe(model, lw.DiagGGN())`, and with a drawn column for S_n `lw.DiagGGN(draws=1)`.
"""

import torch
from torch.nn.functional import one_hot, pad


def forward(weights, x):
    """Inputs a and outputs z = W a of every layer, tanh between them; W's last column is the bias, so a ends in a 1."""
    inputs, outputs = [], []
    for w in weights:
        inputs.append(pad(outputs[-1].tanh() if outputs else x, (0, 1), value=1.0))
        outputs.append(inputs[-1] @ w.T)
    return inputs, outputs


def root(z):
    """S of the mean cross entropy, where H = (diag p − ppᵀ) / N: a column √(p_c/N) (p − e_c) a class c, [C, N, C]."""
    p, e = z.softmax(1), torch.eye(z.shape[1]).to(z)
    return (p.T / len(z)).sqrt()[:, :, None] * (p - e[:, None])


def drawn(z, generator):
    """Instead one column (p − e_y) / √N, [1, N, C], for labels y that the model draws: on average S Sᵀ is H."""
    p = z.softmax(1)
    y = p.multinomial(1, generator=generator)[:, 0]
    return (p - one_hot(y, z.shape[1]))[None] / len(z) ** 0.5


def diagonal(weights, inputs, columns):
    """The diagonal by each weight, in its shape, from the columns at the last layer's output."""
    found = []
    for n in reversed(range(len(weights))):
        w, a = weights[n], inputs[n]
        found.insert(0, columns.square().sum(0).T @ a.square())  # Σ (s aᵀ)² over columns and samples, elementwise
        if n:
            columns = columns @ w[:, :-1] * (1 - a[:, :-1].square())  # on to the layer below: Wᵀ s, times tanh'
    return found


if __name__ == "__main__":
    generator = torch.manual_seed(0)
    x, weights = torch.randn(500, 10), [torch.randn(32, 11) / 3, torch.randn(32, 33) / 6, torch.randn(3, 33) / 6]
    inputs, outputs = forward(weights, x)
    exact = diagonal(weights, inputs, root(outputs[-1]))
    sampled = diagonal(weights, inputs, drawn(outputs[-1], generator))
    for n, (one, other) in enumerate(zip(exact, sampled, strict=True)):
        print(f"layer {n}: trace {one.sum():.3f}, from one drawn label a sample {other.sum():.3f}")
