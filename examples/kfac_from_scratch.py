"""K-FAC from scratch: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature".

The Fisher matrix of a layer z = W a is E[aaᵀ ⊗ ssᵀ], where s = ∂(−log p(y|x))/∂z for labels y that the model draws.
K-FAC (2015) takes the expectation of each factor alone (section 3), so that two small matrices are inverted instead:

    A = E[aaᵀ],   G = E[ssᵀ],   (A ⊗ G)⁻¹ vec(∂L/∂W) = vec(G⁻¹ ∂L/∂W A⁻¹)

In the library it is `lw.optim.KFAC` with lr=0.1, momentum=0, kl_clip=None, update_factors_every=1 and
update_inverses_every=1. The defaults add momentum and a bound on a step's length, and measure and invert more seldom.
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


@torch.no_grad()
def update(layer, a, g, s, t, lr=0.1, damping=1e-2, decay=0.95):
    """A layer's weight and running averages of A and G after minibatch t = 1, 2, ..., from a, g = ∂L/∂z and s."""
    w, input_factor, output_factor = layer
    newest = (1 - decay) / (1 - decay**t)  # an exponential average, section 5, that begins with the first minibatch
    input_factor = input_factor.lerp(a.T @ a / len(a), newest)
    output_factor = output_factor.lerp(s.T @ s / len(s), newest)

    # A + π √λ I and G + (√λ / π) I, section 6.3: π² is how large A's mean eigenvalue is beside G's
    pi = (input_factor.diagonal().mean() / output_factor.diagonal().mean()).sqrt()
    right = (input_factor + pi * damping**0.5 * torch.eye(len(input_factor)).to(w)).inverse()
    left = (output_factor + damping**0.5 / pi * torch.eye(len(output_factor)).to(w)).inverse()
    return w - lr * left @ (g.T @ a) @ right, input_factor, output_factor


def step(layers, x, labels, t, generator):
    """Minibatch t: every layer (its weight, A and G) after it, and the loss before it."""
    inputs, outputs = forward([w for w, _, _ in layers], x)
    loss = cross_entropy(outputs[-1], labels)
    gs = torch.autograd.grad(loss, outputs, retain_graph=True)
    drawn = outputs[-1].softmax(1).multinomial(1, generator=generator)[:, 0]
    scores = torch.autograd.grad(cross_entropy(outputs[-1], drawn, reduction="sum"), outputs)
    return [update(*own, t) for own in zip(layers, inputs, gs, scores, strict=True)], loss.detach()


if __name__ == "__main__":
    generator = torch.manual_seed(0)
    x, weights = torch.randn(500, 10), [torch.randn(32, 11) / 3, torch.randn(32, 33) / 6, torch.randn(3, 33) / 6]
    labels = (x @ torch.randn(10, 3)).argmax(1)
    layers = [(w, torch.zeros(w.shape[1], w.shape[1]), torch.zeros(len(w), len(w))) for w in weights]
    for t in range(1, 52):
        layers, loss = step(layers, x, labels, t, generator)
        if t % 10 == 1:
            print(f"loss after {t - 1:2} minibatches: {loss:.4f}")
