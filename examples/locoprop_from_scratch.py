"""LocoProp from scratch: Amid, Anil and Warmuth, "LocoProp: Enhancing BackProp via Local Loss Optimization" (2022).

A layer z = W a with a transfer function f = F' behind it has a problem of its own, its inputs a held fixed (section 3):

    target   y = f(z) − γ g,     g = ∂L/∂z from one backward pass
    fit      min over W of  Σ_n F(W a_n) − y_n·W a_n,     whose gradient is  Σ_n (f(W a_n) − y_n) a_nᵀ

The first local gradient is γ ∂L/∂W, backprop's; then the layer goes on alone. This is LocoProp-M, in the library
`lw.LocoProp(model, preset="published-M")`. LocoProp-S, "published-S", is the same with the identity for every f.
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
def fit(layer, f, a, z, g, gamma=10.0, steps=10, lr=1e-5, decay=0.9, momentum=0.999, eps=1e-5):
    """A layer's own problem, by T steps of RMSProp (TensorFlow's); it reads nothing of any other layer."""
    w, square, speed = layer
    y = f(z) - gamma * g  # the target, section 3
    for t in range(steps):
        gradient = (f(a @ w.T) - y).T @ a  # equation 7: no derivative of f
        square = decay * square + (1 - decay) * gradient**2
        speed = momentum * speed + lr * max(1 - t / steps, 0.25) * gradient / (square + eps).sqrt()
        w = w - speed
    return w, square, speed


def step(layers, fs, x, labels):
    """One minibatch: every layer (its weight, and RMSProp's state) fitted to its own target, and the loss before it."""
    inputs, outputs = forward([w for w, _, _ in layers], x)
    loss = cross_entropy(outputs[-1], labels)
    gs = torch.autograd.grad(loss, outputs)  # the only pass through all layers
    return [fit(*own) for own in zip(layers, fs, inputs, outputs, gs, strict=True)], loss.detach()


if __name__ == "__main__":
    torch.manual_seed(0)
    x, weights = torch.randn(500, 10), [torch.randn(32, 11) / 3, torch.randn(32, 33) / 6, torch.randn(3, 33) / 6]
    labels = (x @ torch.randn(10, 3)).argmax(1)
    layers = [(w, torch.ones_like(w), torch.zeros_like(w)) for w in weights]  # RMSProp's mean square starts at 1
    fs = [torch.tanh, torch.tanh, lambda z: z.softmax(1)]  # cross entropy is softmax's own matching loss
    for n in range(101):
        layers, loss = step(layers, fs, x, labels)
        if n % 20 == 0:
            print(f"loss after {n:3} minibatches: {loss:.4f}")
