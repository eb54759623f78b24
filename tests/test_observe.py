"""`observe`: accumulation, what it leaves behind, its edge cases and its errors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import errors
from layerwise.observation.observe import observe
from layerwise.quantities import KFAC, KFLR, ClippedGrad, DiagGGN, PerSampleGrad, SecondMoment, SquaredNorm, Variance
from layerwise.tape.tape import Tape

pytestmark = pytest.mark.usefixtures("float64")

N = 8
ALL = (PerSampleGrad, SquaredNorm, SecondMoment, Variance, DiagGGN)


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _batch(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)


def _quantities() -> list:
    return [make() for make in ALL]


def _want(model: nn.Module, z: Callable[[], Tensor], loss_of: Callable[[Tensor], Tensor], terms: Callable) -> dict:
    """All quantities of one loss by brute force."""
    params = oracle.parameters(model)
    grads = oracle.per_sample_grad(params, lambda: terms(z()))
    return {
        "grad": {name: g.sum(0) for name, g in grads.items()},
        "per_sample_grad": grads,
        "squared_norm": oracle.squared_norm(grads),
        "second_moment": oracle.second_moment(grads),
        "variance": oracle.variance(grads),
        "diag_ggn": oracle.diag_ggn(params, z, loss_of),
    }


def _ce_want(model: nn.Module, x: Tensor, y: Tensor, factor: float = 1.0, run: Callable | None = None) -> dict:
    """The quantities of `factor * cross_entropy(model(x), y)`."""
    z = (lambda: model(x)) if run is None else run
    return _want(
        model,
        z,
        lambda out: factor * F.cross_entropy(out, y),
        lambda out: factor * F.cross_entropy(out, y, reduction="none") / len(y),
    )


def _check(seen, want: Mapping[str, Mapping[str, Tensor]], rel: float = 1e-10) -> None:
    for name, values in want.items():
        oracle.assert_close(dict(getattr(seen, name)), values, rel=rel)


def _marks(model: nn.Module) -> list:
    """Everything that could be left behind on a model: attributes and hooks of modules and parameters."""
    found = []
    for module in model.modules():
        state = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        found.append(state)
    for p in model.parameters():
        found.append((id(p), dict(vars(p)) if hasattr(p, "__dict__") else None, p._backward_hooks, p._version))
        found.append(p._post_accumulate_grad_hooks)
    return found


# Accumulation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(3, 5), (1, 2, 5), (4, 4)])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"reduction": "sum"},
        {"weight": torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)},
        {"ignore_index": 1},
        {"label_smoothing": 0.1},
    ],
    ids=["mean", "sum", "weighted", "ignore", "smooth"],
)
def test_parts_by_their_share_are_the_whole(sizes: tuple[int, ...], kwargs: dict) -> None:
    """The mean of a part times its share of the mean's denominator; a sum as it is."""
    x, y = _batch()
    y[:3] = torch.tensor([0, 2, 0])  # every batch holds a target that counts
    y[3:5] = 0
    counts = torch.ones(3) if "weight" not in kwargs else kwargs["weight"]
    counts = counts.clone()
    if "ignore_index" in kwargs:
        counts[kwargs["ignore_index"]] = 0
    whole, parts = _mlp(), _mlp()
    with observe(whole, *_quantities(), KFAC(64, torch.Generator().manual_seed(0))) as one:
        F.cross_entropy(whole(x), y, **kwargs).backward()
    with observe(parts, *_quantities(), KFAC(64, torch.Generator().manual_seed(0))) as many:
        for xb, yb in zip(x.split(sizes), y.split(sizes), strict=True):
            share = 1.0 if "reduction" in kwargs else counts[yb].sum() / counts[y].sum()
            (F.cross_entropy(parts(xb), yb, **kwargs) * share).backward()
    for q in ALL:
        name = q().name
        oracle.assert_close(dict(getattr(many, name)), dict(getattr(one, name)))
    oracle.assert_close(dict(many.grad), dict(one.grad))
    oracle.assert_close(many.squared_norm.total, one.squared_norm.total)
    for name, factors in one.kfac.factors.items():
        if len(factors) == 2:  # the input factor is not sampled
            oracle.assert_close(many.kfac.factors[name][0], factors[0])


def test_grad_accumulates_as_without_us_bitwise() -> None:
    x, y = _batch()
    ours, plain = _mlp(), _mlp()
    with observe(ours, *_quantities(), KFAC()):
        for xb, yb in zip(x.split(3), y.split(3), strict=True):
            F.cross_entropy(ours(xb), yb).backward()
    for xb, yb in zip(x.split(3), y.split(3), strict=True):
        F.cross_entropy(plain(xb), yb).backward()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_gradient_is_exact_beside_a_huge_old_one() -> None:
    """What is seen is not computed as a difference of `.grad`."""
    x, y = _batch()
    model = _mlp()
    want = _ce_want(model, x, y)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e12)
    with observe(model, *_quantities()) as seen:
        F.cross_entropy(model(x), y).backward()
    _check(seen, want)


@pytest.mark.parametrize("late", [True, False])
def test_samples_of_batches_that_skip_a_parameter_have_gradient_zero(late: bool) -> None:
    x, y = _batch()
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    uses = (torch.arange(N) >= 3) == late

    def run(x: Tensor, b: bool) -> Tensor:
        return model["a"](x) + model["b"](x) if b else model["a"](x)

    with observe(model, *_quantities()) as seen:
        (F.cross_entropy(run(x[:3], not late), y[:3]) * (3 / N)).backward()
        (F.cross_entropy(run(x[3:], late), y[3:]) * (5 / N)).backward()
    want = _ce_want(model, x, y, run=lambda: model["a"](x) + model["b"](x) * uses[:, None])
    _check(seen, want)
    oracle.assert_close(seen.squared_norm.total, oracle.total(want["squared_norm"]))


def test_forwards_before_their_backwards() -> None:
    x, y = _batch()
    model = _mlp()
    want = _ce_want(model, x, y)
    with observe(model, *_quantities()) as seen:
        first = F.cross_entropy(model(x[:3]), y[:3]) * (3 / N)
        second = F.cross_entropy(model(x[3:]), y[3:]) * (5 / N)
        first.backward()
        second.backward()
    _check(seen, want)


@pytest.mark.parametrize(("scale", "factor"), [(lambda v: 10 * v, 10.0), (lambda v: v / 4, 0.25)])
def test_the_users_scale_is_in_every_quantity(scale: Callable, factor: float) -> None:
    x, y = _batch()
    model = _mlp()
    with observe(model, *_quantities()) as seen:
        scale(F.cross_entropy(model(x), y)).backward()
    _check(seen, _ce_want(model, x, y, factor))


def test_the_users_own_reduction() -> None:
    x, y = _batch()
    model = _mlp()
    with observe(model, *_quantities()) as seen:
        F.cross_entropy(model(x), y, reduction="none").mean().backward()
    _check(seen, _ce_want(model, x, y))


def test_scale_sample_equals_the_oracles() -> None:
    x, y = _batch()
    model = _mlp()
    grads = oracle.per_sample_grad(oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none") / N)
    with observe(model, *_quantities(), scale="sample") as seen:
        for xb, yb in zip(x.split(3), y.split(3), strict=True):
            (F.cross_entropy(model(xb), yb) * (len(yb) / N)).backward()
    oracle.assert_close(dict(seen.second_moment), oracle.second_moment(grads, scale="sample"))
    oracle.assert_close(dict(seen.variance), oracle.variance(grads, scale="sample"))
    oracle.assert_close(dict(seen.per_sample_grad), {k: N * g for k, g in grads.items()})
    norms = oracle.squared_norm({k: N * g for k, g in grads.items()})
    oracle.assert_close(dict(seen.squared_norm), norms)
    oracle.assert_close(seen.squared_norm.total, oracle.total(norms))


def test_scale_sample_needs_a_reduction_that_says_mean_or_sum() -> None:
    x, y = _batch()
    model = _mlp()
    with pytest.raises(errors.Undefined, match="by hand"), observe(model, SecondMoment(), scale="sample"):
        F.cross_entropy(model(x), y, reduction="none").mean().backward()
    assert all(p.grad is None for p in model.parameters())


def test_two_losses_of_one_forward_count_its_samples_once() -> None:
    x, y = _batch()
    model = _mlp()
    with observe(model, SecondMoment(), PerSampleGrad()) as seen:
        z = model(x)
        F.cross_entropy(z, y).backward(retain_graph=True)
        before = {k: v.clone() for k, v in seen.second_moment.items()}
        with pytest.raises(errors.Undefined, match="add the losses up"):
            F.mse_loss(z, x[:, :3]).backward()
    oracle.assert_close(dict(seen.second_moment), before, rel=1e-15)
    with observe(model, SecondMoment(), PerSampleGrad()) as seen:
        z = model(x)
        (F.cross_entropy(z, y) + F.mse_loss(z, x[:, :3])).backward()
    assert seen.per_sample_grad["0.weight"].shape == (N, 5, 4)


def test_retained_graph_and_a_new_forward() -> None:
    x, y = _batch()
    model = _mlp()
    want = _ce_want(model, x, y)
    with observe(model, *_quantities()) as seen:
        for xb, yb in zip(x.split(4), y.split(4), strict=True):
            (F.cross_entropy(model(xb), yb) / 2).backward(retain_graph=True)
    _check(seen, want)


# Nesting ----------------------------------------------------------------------------------------


def test_observe_inside_observe() -> None:
    x, y = _batch()
    model, plain = _mlp(), _mlp()
    want = _ce_want(model, x, y)
    F.cross_entropy(plain(x), y).backward()
    with observe(model, *_quantities(), KFAC()) as outer, observe(model, *_quantities(), KFAC()) as inner:
        F.cross_entropy(model(x), y).backward()
    _check(inner, want)
    _check(outer, want)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_one_observe_is_entered_once_at_a_time() -> None:
    observation = observe(_mlp())
    with observation, pytest.raises(errors.BadInput, match="active already"), observation:
        pass
    with observation:
        pass


# What is left behind ----------------------------------------------------------------------------


def _bodies() -> Iterator:
    x, y = _batch()

    def plain(model: nn.Module) -> None:
        F.cross_entropy(model(x), y).backward()

    def raises(model: nn.Module) -> None:
        F.cross_entropy(model(x), y)
        raise ZeroDivisionError

    def raises_in_backward(model: nn.Module) -> None:
        z = model(x)
        z.register_hook(lambda g: 1 / 0)
        F.cross_entropy(z, y).backward()

    def raises_late(model: nn.Module) -> None:
        h = model[0](x)
        h.register_hook(lambda g: 1 / 0)  # after the last layer's gradients have arrived
        F.cross_entropy(model[2](h.tanh()), y).backward()

    def refused(model: nn.Module) -> None:
        h = model[0](x)
        F.cross_entropy(model[2](h - h.mean(0)), y).backward()

    def nan(model: nn.Module) -> None:
        F.cross_entropy(model(x * float("nan")), y).backward()

    def target(model: nn.Module) -> None:
        F.cross_entropy(model(x), y + 2).backward()

    for body, error in (
        (plain, None), (raises, ZeroDivisionError), (raises_in_backward, ZeroDivisionError),
        (raises_late, ZeroDivisionError), (refused, errors.SamplesMixed), (nan, errors.NonFinite),
        (target, errors.BadInput),
    ):  # fmt: skip
        yield pytest.param(body, error, id=body.__name__)


@pytest.mark.parametrize(("body", "error"), list(_bodies()))
@pytest.mark.parametrize("old", [False, True], ids=["no_grad_yet", "grad"])
def test_no_trace_is_left(body: Callable, error: type | None, old: bool) -> None:
    model = _mlp()
    if old:
        for p in model.parameters():
            p.grad = torch.rand_like(p)
    before = [None if p.grad is None else (p.grad, p.grad.clone()) for p in model.parameters()]
    marks = _marks(model)
    nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in model.parameters()]
    observation = observe(model, *_quantities(), KFAC())
    if error is None:
        with observation:
            body(model)
    else:
        with pytest.raises(error), observation as seen:
            body(model)
        with pytest.raises(errors.NoBackward):
            _ = seen.variance
        for p, kept in zip(model.parameters(), before, strict=True):
            assert p.grad is (None if kept is None else kept[0])
            assert kept is None or torch.equal(p.grad, kept[1])
    assert _marks(model) == marks
    assert not torch.overrides._get_current_function_mode_stack()
    called = []
    for node in nodes:  # a hook of ours would be called with a gradient that it does not expect
        node.register_prehook(lambda g: called.append(g))
    x, y = _batch()
    F.cross_entropy(model(x), y).backward()
    assert len(called) == len(nodes)


def test_hooks_of_the_user_and_retained_grads_are_as_without_us() -> None:
    x, y = _batch()
    found = {}
    for name in ("plain", "ours"):
        model = _mlp()
        leaf = x.clone().requires_grad_()
        h = a = None

        def body(model: nn.Module = model, leaf: Tensor = leaf) -> tuple[Tensor, Tensor]:
            h = model[0](leaf * 2)
            h.retain_grad()
            a = h.tanh()
            a.retain_grad()
            F.cross_entropy(model[2](a), y).backward()
            return h, a

        if name == "plain":
            h, a = body()
        else:
            with observe(model, *_quantities(), KFAC()):
                h, a = body()
        found[name] = [h.grad, a.grad, leaf.grad, *(p.grad for p in model.parameters())]
    for plain, ours in zip(found["plain"], found["ours"], strict=True):
        assert torch.equal(plain, ours)


def test_results_hold_neither_batch_nor_graph() -> None:
    model = _mlp()

    def step() -> tuple:
        x, y = _batch(11)  # no other new tensor has 11 rows
        with observe(model, SquaredNorm(), Variance(), DiagGGN(), KFAC(2)) as seen:
            h = model[0](x)
            loss = F.cross_entropy(model[2](h.tanh()), y)
            loss.backward()
        return seen, [weakref.ref(t) for t in (x, h, loss)]

    gc.collect()
    gc.disable()
    try:
        others = {id(t): t for t in gc.get_objects() if issubclass(type(t), Tensor)}  # of other tests, kept by them
        seen, refs = step()
        assert [r() for r in refs] == [None, None, None]
        for name in ("squared_norm", "diag_ggn", "kfac", "variance", "grad"):
            getattr(seen, name)
        shapes = [tuple(t.shape) for t in gc.get_objects() if issubclass(type(t), Tensor) and id(t) not in others]
        assert [shape for shape in shapes if 11 in shape and shape not in ((11,), (1, 11))] == []
        count = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        assert _live() == count, "tensors in reference cycles"
    finally:
        gc.enable()


def _live() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


# Asking -----------------------------------------------------------------------------------------


def test_two_quantities_of_one_class_are_told_apart() -> None:
    x, y = _batch()
    model = _mlp()
    exact, sampled = DiagGGN(), DiagGGN(draws=2)
    with observe(model, exact, sampled) as seen:
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(AttributeError, match="2 observed quantities"):
        _ = seen.diag_ggn
    oracle.assert_close(dict(seen[exact]), _ce_want(model, x, y)["diag_ggn"])
    assert not torch.equal(seen[exact]["0.weight"], seen[sampled]["0.weight"])
    with pytest.raises(KeyError, match="not observed"):
        _ = seen[Variance()]
    with pytest.raises(AttributeError, match="variance"):
        _ = seen.variance


def test_asking_before_backward() -> None:
    model = _mlp()
    with observe(model, Variance()) as seen:
        for ask in (lambda: seen.variance, lambda: seen.grad):
            with pytest.raises(errors.NoBackward, match="backward"):
                ask()
        model(_batch()[0])
    with pytest.raises(errors.NoBackward):
        _ = seen.variance
    assert not hasattr(seen, "variance")
    assert "variance" in dir(seen)


def test_an_unknown_parameter_name_lists_the_known() -> None:
    x, y = _batch()
    model = _mlp()
    with observe(model, Variance()) as seen:
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(KeyError, match=r"0\.weight"):
        _ = seen.variance["nope"]


@pytest.mark.parametrize(
    "make",
    [
        lambda m: observe(m, Variance),
        lambda m: observe(m, "variance"),
        lambda m: observe(m, Variance(), scale="x"),
        lambda m: observe(m, Variance(), samples=0),
        lambda m: observe(m, Variance(), samples="8"),
        lambda m: DiagGGN(draws=0),
        lambda m: DiagGGN(draws=1.5),
        lambda m: KFAC(draws=0),
        lambda m: KFAC(draws=None),
        lambda m: observe(3, Variance()).__enter__(),
        lambda m: observe(list(m.parameters()), Variance()).__enter__(),
    ],
)
def test_wrong_arguments(make: Callable) -> None:
    with pytest.raises(errors.BadInput):
        make(_mlp())


# Batches that cannot be used --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.long), "empty"),
        (_batch(2)[0], torch.tensor([0, 3]), r"\[0, 3\]"),
        (_batch(2)[0], torch.tensor([-1, 0]), r"\[-1, 0\]"),
        (_batch(2)[0][:, :3], torch.tensor([0, 1]), r"0\.weight"),
        (_batch(2)[0], torch.tensor([0, 1, 2]), "shape"),
        (torch.zeros(2, 4, dtype=torch.float32), torch.tensor([0, 1]), r"0\.weight"),
        (torch.zeros(2, 4, device="meta"), torch.tensor([0, 1]), r"0\.weight.*two devices"),
    ],
    ids=["empty", "high", "low", "features", "targets", "dtype", "device"],
)
def test_bad_batches_are_refused_and_nothing_changes(x: Tensor, y: Tensor, match: str) -> None:
    model = _mlp()
    with pytest.raises(errors.BadInput, match=match), observe(model, *_quantities()):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_model_on_another_device() -> None:
    x, y = _batch()
    for model in (_mlp().to("meta"), nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2)).to("meta")):
        with pytest.raises(errors.BadInput, match="two devices"), observe(model, SecondMoment()):
            F.cross_entropy(model(x).flatten(1), y).backward()


def test_everything_on_the_meta_device() -> None:
    x, y = _batch()
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    with pytest.raises(errors.BadInput, match="meta"), observe(model, SecondMoment()):
        F.mse_loss(model(x.to("meta")), torch.zeros(N, 3, device="meta")).backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite(value: float) -> None:
    x, y = _batch()
    x[2, 1] = value
    model = nn.Linear(4, 3)
    with pytest.raises(errors.NonFinite), observe(model, *_quantities()):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


def test_losses_that_no_backward_pass_leads_through() -> None:
    x, y = _batch()
    model = _mlp()
    with observe(model, SecondMoment()) as seen:
        with pytest.raises(errors.UnknownLoss, match="detached"):
            F.cross_entropy(model(x), y).detach().backward()
        loss = F.cross_entropy(model(x), y)
    loss.backward()  # outside
    with pytest.raises(errors.NoBackward):
        _ = seen.second_moment
    loss = F.cross_entropy(model(x), y)  # a forward outside
    with pytest.raises(errors.UncoveredUse), observe(model, SecondMoment()):
        loss.backward()


def test_a_model_without_trainable_parameters() -> None:
    x, y = _batch()
    model = _mlp().requires_grad_(False)
    with pytest.raises(errors.LayerwiseError), observe(model, SecondMoment()):
        F.cross_entropy(model(x), y).backward()


# Ways to run backward ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backward",
    [
        lambda loss: torch.autograd.backward(loss),
        lambda loss: torch.autograd.backward([loss]),
        lambda loss: torch.autograd.backward(tensors=loss),
        lambda loss: loss.backward(torch.ones(())),
        lambda loss: loss.backward(gradient=torch.tensor(1.0)),
        lambda loss: loss.backward(retain_graph=True),
        pytest.param(
            lambda loss: loss.backward(create_graph=True),
            marks=pytest.mark.filterwarnings("ignore:Using backward.. with create_graph"),
        ),
    ],
)
def test_every_way_to_call_backward(backward: Callable) -> None:
    x, y = _batch()
    model = _mlp()
    want = _ce_want(model, x, y)
    with observe(model, *_quantities()) as seen:
        backward(F.cross_entropy(model(x), y))
    _check(seen, want)
    assert not seen.grad["0.weight"].requires_grad
    model.zero_grad()


@pytest.mark.parametrize("function", [True, False])
def test_a_weighted_backward_of_many_terms(function: bool) -> None:
    x, y = _batch()
    model = _mlp()
    v = torch.linspace(0.1, 1, N)
    want = _want(
        model,
        lambda: model(x),
        lambda z: (v * F.cross_entropy(z, y, reduction="none")).sum(),
        lambda z: v * F.cross_entropy(z, y, reduction="none"),
    )
    with observe(model, *_quantities()) as seen:
        loss = F.cross_entropy(model(x), y, reduction="none")
        if function:
            torch.autograd.backward([loss], [v])
        else:
            loss.backward(v)
    _check(seen, want)


def test_two_tensors_at_once() -> None:
    x, y = _batch()
    model = _mlp()
    with pytest.raises(errors.BadInput, match="add them up"), observe(model, SecondMoment()):
        torch.autograd.backward([F.cross_entropy(model(x), y), F.cross_entropy(model(x), y)])


def test_the_gradient_of_some_parameters() -> None:
    x, y = _batch()
    model = _mlp()
    want = _ce_want(model, x, y)
    with observe(model, PerSampleGrad(), Variance()) as seen:
        F.cross_entropy(model(x), y).backward(inputs=[model[2].weight, model[0].bias])
    names = {"2.weight", "0.bias"}
    for name in ("grad", "per_sample_grad", "variance"):
        oracle.assert_close(dict(getattr(seen, name)), {k: v for k, v in want[name].items() if k in names})
    assert model[0].weight.grad is None


def test_a_tied_weight_that_the_gradient_reaches_in_part() -> None:
    """The backward pass to the bias meets one use of the weight, and not the other."""
    x, y = _batch()
    model = {"w": torch.randn(4, 4).requires_grad_(), "b": torch.randn(4).requires_grad_()}
    with observe(model, PerSampleGrad()) as seen:
        F.cross_entropy(F.linear(F.linear(x, model["w"]).tanh(), model["w"], model["b"]), y).backward(
            inputs=[model["b"]]
        )
    assert list(seen.per_sample_grad) == ["b"] == list(seen.grad)


# Models -----------------------------------------------------------------------------------------


def test_a_mapping_is_a_model() -> None:
    x, y = _batch()
    params = {"w": torch.randn(3, 4).requires_grad_(), "frozen": torch.randn(3)}
    with observe(params, *_quantities()) as seen:
        F.cross_entropy(F.linear(x, params["w"], params["frozen"]), y).backward()
    want = _want(
        {"w": params["w"]},
        lambda: F.linear(x, params["w"], params["frozen"]),
        lambda z: F.cross_entropy(z, y),
        lambda z: F.cross_entropy(z, y, reduction="none") / N,
    )
    _check(seen, want)


def test_a_tied_weight_has_the_name_of_its_first_place() -> None:
    x, y = _batch()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with observe(model, *_quantities()) as seen:
        F.cross_entropy(model(x), y).backward()
    assert set(seen.variance) == {"0.weight", "0.bias", "2.bias"} == set(seen.grad)
    _check(seen, _ce_want(model, x, y))


def test_parameters_that_are_frozen_between_steps() -> None:
    x, y = _batch()
    model = _mlp()
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        with observe(model, *_quantities()) as seen:
            F.cross_entropy(model(x), y).backward()
        _check(seen, _ce_want(model, x, y))


def test_a_compiled_model_runs_eagerly_and_is_exact() -> None:
    x, y = _batch()
    model = _mlp()
    want = _ce_want(model, x, y)
    compiled = torch.compile(model, backend="eager")
    with observe(model, *_quantities()) as seen:
        F.cross_entropy(compiled(x), y).backward()
    _check(seen, want)
    compiled(x)  # compiled before
    with observe(model, *_quantities()) as seen:
        F.cross_entropy(compiled(x), y).backward()
    _check(seen, want)
    with observe(model, *_quantities()) as seen:  # compiled inside
        F.cross_entropy(torch.compile(model, backend="eager")(x), y).backward()
    _check(seen, want)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    x, y = _batch()
    model = _mlp().float()
    want = _ce_want(model, x.float(), y)
    with observe(model, *_quantities(), KFAC()) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    for name, values in want.items():
        assert all(v.dtype == torch.float32 for v in getattr(seen, name).values())
        oracle.assert_close(dict(getattr(seen, name)), values, rel=0.1)
    assert all(f.dtype == torch.float32 for factors in seen.kfac.factors.values() for f in factors)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_in_a_chosen_type(dtype: torch.dtype | None, model_dtype: torch.dtype, autocast: bool) -> None:
    """Cotangents come in the graph's types; what is summed of them is exact in the type asked for."""
    x, y = _batch(200)
    model = _mlp().to(model_dtype)
    quantities = [*_quantities(), KFAC(generator=torch.Generator().manual_seed(0)), KFLR(), ClippedGrad(0.5)]
    with observe(model, *quantities, dtype=dtype, scale="sample") as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            z = model(x.to(model_dtype))
        F.cross_entropy(z.float(), y).backward()
    want = dtype or torch.float32
    for q in (q() for q in ALL):
        assert all(v.dtype == want for v in getattr(seen, q.name).values()), q.name
    for result in (seen.kfac, seen.kflr):
        assert all(f.dtype == want for factors in result.factors.values() for f in factors)
        assert all(v.dtype == model_dtype for v in (result @ seen.grad).values())
    second = {name: g.double().square().mean(0) for name, g in seen.per_sample_grad.items()}
    oracle.assert_close(dict(seen.second_moment), second, rel={torch.float32: 1e-5, torch.float64: 1e-12}[want])
    assert all(p.grad.dtype == model_dtype for p in model.parameters())
    assert all(g.dtype == model_dtype for g in seen.grad.values())


def test_factors_of_a_bfloat16_model_in_float32() -> None:
    """The sums of many bfloat16 rows, which bfloat16 itself cannot hold."""
    model = nn.Linear(2, 2).bfloat16()
    x, y = torch.ones(4096, 2, dtype=torch.bfloat16), torch.randint(2, (4096,))
    x[:, 1] = 0.5
    with observe(model, KFLR()) as seen:
        F.cross_entropy(model(x), y).backward()
    a, _ = seen.kflr.factors["weight"]
    assert torch.equal(a[0], torch.tensor([[1.0, 0.5], [0.5, 0.25]], dtype=torch.float32))


def test_nan_is_told_when_a_result_is_read() -> None:
    """`on_nonfinite="defer"`: the backward pass raises nothing, `.grad` is torch's own, and no result is given."""
    x, y = _batch()
    model = _mlp()
    with observe(model, SecondMoment(), DiagGGN(), on_nonfinite="defer") as seen:
        F.cross_entropy(model(x * float("nan")), y).backward()
    assert all(p.grad is not None and bool(p.grad.isnan().any()) for p in model.parameters())
    for read in (lambda: seen.second_moment, lambda: seen.diag_ggn, lambda: seen.grad, lambda: seen.second_moment):
        with pytest.raises(errors.NonFinite, match="a loss of NaN or infinity"):
            read()


def test_what_is_deferred_is_the_same_otherwise() -> None:
    x, y = _batch()
    model = _mlp()
    want = _ce_want(model, x, y)
    with observe(model, *_quantities(), on_nonfinite="defer") as seen:
        F.cross_entropy(model(x), y).backward()
    _check(seen, want)
    model.zero_grad()
    with observe(model, DiagGGN(), on_nonfinite="defer") as seen:  # a root of a negative curvature, which is NaN
        (-F.cross_entropy(model(x), y)).backward()
    with pytest.raises(errors.Undefined, match="negative"):
        _ = seen.diag_ggn
    with pytest.raises(errors.BadInput, match="on_nonfinite"):
        observe(model, DiagGGN(), on_nonfinite="skip")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", torch.int64, float])
def test_a_type_that_holds_no_fractions(dtype: object) -> None:
    with pytest.raises(errors.BadInput, match="floating-point"):
        observe(_mlp(), SecondMoment(), dtype=dtype)


def test_a_default_device_is_not_ours() -> None:
    x, y = _batch()
    model = _mlp()
    with torch.device("meta"), observe(model, *_quantities(), KFAC()) as seen:
        F.cross_entropy(model(x), y).backward()
    _check(seen, _ce_want(model, x, y))


def test_a_training_loop_inside_one_context() -> None:
    """Loading, normalising, evaluating and stepping are not mistaken for the model or its batch."""
    x, y = _batch(20)
    mean, std = x.mean(0), x.std(0)
    model = _mlp()
    opt = torch.optim.Adam(model.parameters(), 0.05, foreach=True)
    taken, wants = [], []
    with observe(model, PerSampleGrad()) as seen:
        for i in range(3):
            index = torch.randperm(20)[: 4 + i]
            batch = (x[index] - mean) / std
            want = oracle.per_sample_grad(
                oracle.parameters(model),
                lambda batch=batch, index=index: F.cross_entropy(model(batch), y[index], reduction="none"),
            )
            wants.append(want)
            taken.append(len(index))
            opt.zero_grad()
            F.cross_entropy(model(batch), y[index], reduction="sum").backward()
            opt.step()
            with torch.no_grad():
                model(x)
            F.cross_entropy(model(x[:2]), y[:2])  # an evaluation that nobody sends back
    want = {name: torch.cat([w[name] for w in wants]) for name in wants[0]}
    oracle.assert_close(dict(seen.per_sample_grad), want)


def test_an_ended_tape_is_observed_as_a_context_would() -> None:
    model, (x, y) = _mlp(), _batch()
    with Tape(model) as tape:
        loss = 3 * F.cross_entropy(model(x), y)
    quantities = _quantities()
    out, seen = observe(model, *quantities).through(tape, loss, None, lambda: loss.backward() or "done")
    assert out == "done"
    for name, value in _ce_want(model, x, y, 3.0).items():
        oracle.assert_close(getattr(seen, name), value)
    assert not tape.uses
