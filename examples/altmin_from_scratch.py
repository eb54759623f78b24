"""AltMin: Choromanska et al., "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables" (2019).

The output of each hidden layer gets a free value, a code c. For N samples the relaxed objective (section 3) is

    loss(W_L σ(c_{L-1}))  +  (1/N) Σ_l μ ½ ‖c_l − W_l σ(c_{l-1})‖²        (σ = tanh; with the ½, μ is twice the paper's)

No gradient crosses two layers. A step is the paper's encodeInput, updateCodes and updateWeights, in the library
`lw.AltMin(model, preset="published")`; its default moves all codes at once instead, by c = z − (N/μ) ∂loss/∂z.
"""

import torch
from torch.nn.functional import cross_entropy

output = lambda w, a: a @ w[:, :-1].T + w[:, -1]  # the bias is W's last column


def term(w, a, target, mu):
    """A layer's own term, times N: the loss where the target is labels, the coupling where it is a code."""
    if target.is_floating_point():
        return mu / 2 * (target - output(w, a)).square().sum()
    return cross_entropy(output(w, a), target, reduction="sum")


def update_codes(weights, codes, labels, mu, steps=5, lr=0.3, momentum=0.9):
    """Nesterov steps on the two terms that hold a code, from the output down: the code above it has moved already."""
    targets = [*codes, labels]
    for n in reversed(range(len(codes))):
        c, speed = codes[n], torch.zeros_like(codes[n])
        for _ in range(steps):
            ahead = (c + momentum * speed).requires_grad_()
            own = mu / 2 * (ahead - codes[n]).square().sum()  # codes[n] is W a: the codes below have not moved yet
            (g,) = torch.autograd.grad(own + term(weights[n + 1], ahead.tanh(), targets[n + 1], mu), ahead)
            new = ahead.detach() - lr * g
            c, speed = new, new - c
        targets[n] = c
    return targets


def step(weights, optimizer, x, labels, mu=0.003):
    """One minibatch, and the loss before it. optimizer: Adam for AM-Adam, in the published settings with lr=8e-3."""
    codes = []
    for w in weights[:-1]:  # encodeInput
        codes.append(output(w, codes[-1].tanh() if codes else x).detach())
    loss = cross_entropy(output(weights[-1], codes[-1].tanh()), labels).detach()
    targets = update_codes(weights, codes, labels, mu)
    for n, w in enumerate(weights):  # updateWeights: each layer on its own term alone, so that all could move at once
        (w.grad,) = torch.autograd.grad(term(w, targets[n - 1].tanh() if n else x, targets[n], mu) / len(x), w)
    optimizer.step()
    return loss


if __name__ == "__main__":
    torch.manual_seed(0)
    x, sizes = torch.randn(500, 10), [(32, 11), (32, 33), (3, 33)]
    labels, weights = (x @ torch.randn(10, 3)).argmax(1), [(torch.randn(s) / 4).requires_grad_() for s in sizes]
    optimizer = torch.optim.Adam(weights, lr=8e-3)
    for n in range(51):
        loss = step(weights, optimizer, x, labels)
        if n % 10 == 0:
            print(f"loss after {n:2} minibatches: {loss:.4f}")
