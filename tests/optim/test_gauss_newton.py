"""The optimizer's manners: torch's habits, steps taken and rejected, state, errors. (What its steps are equal to: test_methods.py.)"""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from bayesgn import ggn, likelihoods, optim, rules
from bayesgn._psd import NotPositiveDefiniteError


def regression(seed: int = 0, n: int = 30, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=g, dtype=dtype) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * x[:, 1:] + 0.05 * torch.randn(n, 1, generator=g, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    return net, x, y


def classification(seed: int = 0, n: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    net, x, _ = regression(seed, n)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        net[2] = nn.Linear(6, 3).double()
    return net, x, (x[:, 0] * 3).round().long().remainder(3)


def gaussian() -> likelihoods.Gaussian:
    return likelihoods.Gaussian(1.0)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).clone()


def mean_loss(net, x, y, likelihood=None) -> float:
    likelihood = gaussian() if likelihood is None else likelihood
    return float(-likelihood.log_prob(likelihood.rows(net(x)), y).mean().detach())


# -- it learns ---------------------------------------------------------------------------------------------------------

DAMPINGS = [
    lambda: optim.LevenbergMarquardt(1e-2), lambda: optim.LevenbergMarquardt(1e-2, uphill=1.0), lambda: optim.TrustRegion(1.0),
    lambda: optim.Dogleg(1.0), lambda: optim.Constant(1e-1), lambda: optim.SmallestEigenvalue(1.0, smallest=1e-2),
]  # fmt: skip
SEARCHES = [None, optim.Backtracking(), optim.Grid()]
MOMENTA = [None, optim.Adaptive(0.9), optim.HeavyBall(0.3)]


@pytest.mark.parametrize("damping", DAMPINGS, ids=lambda make: repr(make()))
@pytest.mark.parametrize("search", SEARCHES, ids=repr)
def test_every_damping_with_every_line_search_falls_far_below_the_start(damping, search):
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian(), damping=damping(), line_search=search)
    floor = 0.5 * math.log(2 * math.pi)  # of a perfect fit
    start = mean_loss(net, x, y) - floor
    for _ in range(20):
        opt.step(x, y)
    # The damped ones descend from step to step; a constant damping may overshoot without a line search, yet ends far below.
    assert mean_loss(net, x, y) - floor < 0.1 * start


@pytest.mark.parametrize("structure", [ggn.Full, ggn.Layerwise, ggn.Gram, ggn.Kron, ggn.EigenKron, ggn.Diag, ggn.LowRank(rank=20),
                                       ggn.MatrixFree(tol=1e-4, iterations=40)], ids=str)  # fmt: skip
@pytest.mark.parametrize("momentum", MOMENTA, ids=repr)
def test_every_structure_with_every_momentum_descends_on_labels(structure, momentum):
    net, x, y = classification()
    likelihood = likelihoods.Categorical()
    opt = optim.GaussNewton(net, likelihood, structure=structure, momentum=momentum, line_search=optim.Backtracking())
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            losses.append(float(opt.step(x, y)))
    assert all(b <= a + 1e-12 for a, b in zip(losses, losses[1:], strict=False)), "an accepted step never rises"
    assert mean_loss(net, x, y, likelihood) < 0.95 * losses[0]


def test_every_accepted_step_falls_as_it_says():
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian(), scaling=optim.RunningMax())
    for _ in range(10):
        before = mean_loss(net, x, y)
        returned = float(opt.step(x, y))
        assert returned == pytest.approx(before) and opt.last.loss == returned
        assert opt.last.trial == pytest.approx(mean_loss(net, x, y)) and opt.last.accepted and opt.last.trial < before


# -- torch's habits ----------------------------------------------------------------------------------------------------


def closure_of(opt, net, x, y):
    def closure() -> Tensor:
        opt.zero_grad()
        loss = 0.5 * (net(x) - y).square().mean() + 0.5 * math.log(2 * math.pi)
        loss.backward()
        return loss

    return closure


def test_a_closure_takes_the_same_steps():
    one, x, y = regression()
    two = copy.deepcopy(one)
    first, second = (optim.GaussNewton(net, gaussian(), weight_decay=1e-3) for net in (one, two))
    closure = closure_of(second, two, x, y)
    for _ in range(6):
        a, b = first.step(x, y), second.step(closure)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(weights(one), weights(two))
        torch.testing.assert_close(one[0].weight.grad, two[0].weight.grad)


def test_what_a_closure_adds_to_its_gradient_counts():
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian(), damping=optim.Constant(1.0))

    def clipped() -> Tensor:
        loss = closure_of(opt, net, x, y)()
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        return loss

    before = weights(net)
    opt.step(closure=clipped)
    assert float((weights(net) - before).norm()) <= 1e-3  # ‖(H + I)⁻¹ g‖ ≤ ‖g‖


def test_accumulated_micro_batches_are_one_batch_and_may_be_clipped():
    one, x, y = regression()
    two, three = copy.deepcopy(one), copy.deepcopy(one)
    a, b, c = (optim.GaussNewton(net, gaussian(), damping=optim.Constant(0.1)) for net in (one, two, three))
    a.step(x, y)
    b.accumulate(x[:7], y[:7])
    b.accumulate(x[7:], y[7:])
    torch.testing.assert_close(one[0].weight.grad, two[0].weight.grad)
    b.step()
    torch.testing.assert_close(weights(one), weights(two))
    c.accumulate(x, y)
    for p in three.parameters():
        p.grad.mul_(0.5)
    start = weights(three)
    c.step()
    torch.testing.assert_close(weights(three) - start, 0.5 * (weights(one) - start))


def test_zero_grad_forgets_what_was_accumulated():
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian())
    opt.accumulate(x, y)
    opt.zero_grad()
    assert net[0].weight.grad is None
    with pytest.raises(RuntimeError, match="step\\(\\) without data"):
        opt.step()


def test_a_loader_is_one_full_batch():
    one, x, y = regression()
    two = copy.deepcopy(one)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    a, b = (optim.GaussNewton(net, gaussian()) for net in (one, two))
    for _ in range(3):
        torch.testing.assert_close(a.step(x, y), b.step(loader))
    torch.testing.assert_close(weights(one), weights(two))


def test_schedulers_and_groups():
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian(), damping=optim.Constant(0.1), parameters=[
        {"parameters": ["0.weight", "0.bias"], "lr": 0.0625}, {"parameters": ["2.weight", "2.bias"], "weight_decay": 0.5},
    ])  # fmt: skip
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    twin = copy.deepcopy(net)
    whole = optim.GaussNewton(twin, gaussian(), damping=optim.Constant(0.1), parameters=[
        {"parameters": ["0.weight", "0.bias"]}, {"parameters": ["2.weight", "2.bias"], "weight_decay": 0.5},
    ])  # fmt: skip
    before = weights(net)
    opt.step(x, y)
    whole.step(x, y)
    scheduler.step()
    small, full = weights(net) - before, weights(twin) - before
    torch.testing.assert_close(small[:18], 0.0625 * full[:18])
    torch.testing.assert_close(small[18:], full[18:])
    assert [g["lr"] for g in opt.param_groups] == [0.03125, 0.5]


def test_only_the_chosen_weights_move_and_masks_hold():
    net, x, y = regression()
    mask = torch.zeros(6, 2, dtype=torch.bool)
    mask[2, 1] = mask[4, 0] = True
    before = copy.deepcopy(net)
    opt = optim.GaussNewton(net, gaussian(), parameters={"0.weight": mask, "2.bias": None})
    opt.step(x, y)
    moved = net[0].weight != before[0].weight
    assert torch.equal(moved, mask) and bool((net[2].bias != before[2].bias).all())
    assert torch.equal(net[0].bias, before[0].bias) and torch.equal(net[2].weight, before[2].weight)


def test_state_goes_through_a_safe_file_and_on():
    def make(net):
        return optim.GaussNewton(net, gaussian(), damping=optim.LevenbergMarquardt(1e-2), scaling=optim.RunningMax(), momentum=optim.Adaptive())

    one, x, y = regression()
    a = make(one)
    for _ in range(4):
        a.step(x, y)
    file = io.BytesIO()
    torch.save({"net": one.state_dict(), "opt": a.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    two, _, _ = regression(1)
    two.load_state_dict(saved["net"])
    b = make(two)
    b.load_state_dict(saved["opt"])
    for _ in range(4):
        torch.testing.assert_close(a.step(x, y), b.step(x, y), rtol=0, atol=0)
    assert torch.equal(weights(one), weights(two)) and a.damping.λ == b.damping.λ
    with pytest.raises(ValueError, match="not of a GaussNewton optimizer"):
        b.load_state_dict(torch.optim.Adam(two.parameters()).state_dict())


def test_random_curvatures_draw_from_the_generator():
    runs = []
    for seed in (0, 0, 1):
        net, x, y = classification()
        opt = optim.GaussNewton(net, likelihoods.Categorical(), rules.MonteCarloFisher(), generator=torch.Generator().manual_seed(seed))
        opt.step(x, y)
        runs.append(weights(net))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# -- the net is sacred -------------------------------------------------------------------------------------------------


def test_modes_flags_and_hooks_are_left():
    net, x, y = regression()
    net.insert(2, nn.Dropout(0.5))
    net.insert(3, nn.BatchNorm1d(6).double())
    net[3].eval()
    net[0].bias.requires_grad_(False)
    opt = optim.GaussNewton(net, gaussian(), parameters=["0.weight", "4.weight"])
    modes = [m.training for m in net.modules()]
    running = net[3].running_mean.clone()
    with pytest.warns(UserWarning, match="train mode with Dropout;"):
        opt.step(x, y)
    assert [m.training for m in net.modules()] == modes and torch.equal(net[3].running_mean, running)
    assert not net[0].bias.requires_grad and net[4].bias.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


class Fails(nn.Module):
    """Raises from the given call on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.calls, self.after = 0, after

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.after:
            raise FloatingPointError("thrown in the middle")
        return x


@pytest.mark.parametrize("form", ["data", "closure"])
def test_an_error_in_the_middle_leaves_the_last_weights(form):
    plain, x, y = regression()
    trial = Fails(10**9)
    net = nn.Sequential(plain, trial)
    opt = optim.GaussNewton(net, gaussian(), line_search=optim.Grid())
    closure = closure_of(opt, net, x, y)
    opt.step(x, y)
    before, calls = weights(net), trial.calls
    trial.after = trial.calls + 3  # in the trials along the step
    with pytest.raises(FloatingPointError, match="thrown"):
        opt.step(x, y) if form == "data" else opt.step(closure)
    assert trial.calls > calls + 1 and torch.equal(weights(net), before)
    trial.after = 10**9
    opt.step(x, y)
    assert opt.last.accepted


# -- steps that are not taken --------------------------------------------------------------------------------------------


def test_a_loss_that_cannot_fall_is_told_and_the_weights_stay():
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian(), damping=optim.LevenbergMarquardt(1e-2, tries=2))
    before = weights(net)
    loss = closure_of(opt, net, x, y)
    calls = []

    def lying() -> Tensor:  # a gradient of another sign than its loss
        value = loss()
        for p in net.parameters():
            p.grad.neg_()
        calls.append(1)
        return value

    with pytest.warns(UserWarning, match="rejected 2 times and the weights stay.*raise the damping"):
        opt.step(lying)
    assert torch.equal(weights(net), before) and not opt.last.accepted and opt.last.rate == 0 and len(calls) == 3


def test_a_line_search_leaves_the_choice_of_a_step_uphill_to_the_damping():
    class Never(optim.LineSearch):
        def __call__(self, loss, start, slope):
            return 0.0, start

    moved = {}
    for uphill in (0.0, 1e9):
        net, x, y = regression()
        opt = optim.GaussNewton(net, gaussian(), damping=optim.LevenbergMarquardt(1e-2, uphill=uphill, tries=2), line_search=Never())
        opt._step = opt.weights.flat() * 0 + 1.0
        before = weights(net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step(x, y)
        moved[uphill] = not torch.equal(weights(net), before)
    assert moved == {0.0: False, 1e9: True}


def test_a_step_into_infinity_is_rejected():
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor([[0.1]], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.a).log()

    net, x = Log(), torch.ones(3, 1, dtype=torch.float64)
    opt = optim.GaussNewton(net, gaussian(), damping=optim.LevenbergMarquardt(1e-6, tries=40))
    for _ in range(40):
        opt.step(x, torch.full((3, 1), -6.0, dtype=torch.float64))  # the first full step leads to a < 0, a log of nothing
        assert float(net.a.detach()) > 0
    assert float(net.a.detach()) == pytest.approx(math.exp(-6.0), rel=1e-6)
    constant = optim.GaussNewton(net, gaussian(), damping=optim.Constant(1e-6))
    with torch.no_grad():
        net.a.fill_(0.1)
    with pytest.warns(UserWarning, match="rejected 1 times"):
        constant.step(x, torch.full((3, 1), -6.0, dtype=torch.float64))
    assert float(net.a.detach()) == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_minimum_nothing_is_said(dtype):
    x = torch.linspace(-1, 1, 9, dtype=dtype)[:, None]
    net = nn.Linear(1, 1).to(dtype)
    opt = optim.GaussNewton(net, gaussian(), damping=optim.LevenbergMarquardt(1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            opt.step(x, 2 * x + 0.1 * x**3)
    assert float(net.weight.detach()) == pytest.approx(2 + 0.1 * float((x**4).sum() / (x**2).sum()), rel=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be_right():
    net, x, y = regression()
    for options, error, words in [
        ({"curvature": rules.GaussNewton}, TypeError, "is the class GaussNewton"),
        ({"curvature": rules.Laplace()}, TypeError, "pass the curvature alone"),
        ({"structure": "kron"}, TypeError, "structure of bayesgn.ggn"),
        ({"damping": 0.1}, TypeError, "damping of bayesgn.optim"),
        ({"line_search": optim.Grid}, TypeError, "is the class Grid"),
        ({"momentum": 0.9}, TypeError, "Momentum of bayesgn.optim"),
        ({"lr": 0.0}, ValueError, "lr > 0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay ≥ 0"),
        ({"parameters": list(net.parameters())}, TypeError, "expected names"),
        ({"parameters": [{"params": ["0.weight"]}]}, ValueError, "expected 'parameters'"),
        ({"parameters": [{"parameters": ["0.weight"], "beta": 1}]}, ValueError, "it may have 'lr'"),
        ({"parameters": [{"parameters": ["0.weight"]}, {"parameters": ["0.weight"]}]}, ValueError, "in two parameter groups"),
        ({"group": 3}, TypeError, "ProcessGroup"),
    ]:
        with pytest.raises(error, match=words):
            optim.GaussNewton(net, gaussian(), **options)
    with pytest.raises(TypeError, match="expected a likelihood"):
        optim.GaussNewton(net, nn.MSELoss())


def test_batches_and_closures_that_cannot_be_right():
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian())
    before = weights(net)
    for data, error, words in [
        ((x.clone().index_fill_(0, torch.tensor([3]), math.nan), y), ValueError, "non-finite"),
        ((x, y[:-1]), ValueError, "30"),
        ((x, y.squeeze(-1).long()[:, None].expand(-1, 4)), ValueError, "y has shape"),
        ((x.new_zeros(0, 2), y[:0]), ValueError, "empty"),
        ((x, torch.full_like(y, math.inf)), ValueError, "finite"),
    ]:
        with pytest.raises(error, match=words):
            opt.step(*data)
    with pytest.raises(RuntimeError, match="left no gradient"):
        opt.step(lambda: net(x).square().mean())
    with pytest.raises(TypeError, match="the closure returned"):
        opt.step(lambda: None)
    with pytest.raises(RuntimeError, match="did not call Sequential"):
        other = closure_of(opt, copy.deepcopy(net), x, y)

        def elsewhere() -> Tensor:
            net[0].weight.grad = torch.zeros_like(net[0].weight)
            return other().detach() if False else torch.ones(())

        opt.step(elsewhere)
    with pytest.raises(TypeError, match="needs the targets"):
        optim.GaussNewton(net, gaussian(), rules.EmpiricalFisher()).step(closure_of(opt, net, x, y))
    with pytest.raises(ValueError, match="keeps no eigenvalues"):
        optim.GaussNewton(net, gaussian(), structure=ggn.MatrixFree, damping=optim.SmallestEigenvalue()).step(x, y)
    assert torch.equal(weights(net), before)


def test_a_singular_system_is_told(caplog):
    net, x, y = regression()
    with caplog.at_level("WARNING", "bayesgn"):
        optim.GaussNewton(net, gaussian(), damping=optim.Constant(0.0)).step(x[:2] * 0, y[:2])
    assert "needed a relative jitter" in caplog.text and bool(weights(net).isfinite().all())


class Silent(ggn.Structure):
    """A structure whose systems cannot be solved."""

    def start(self, blocks, like):
        inner = ggn.Full().start(blocks, like)
        inner.solver = lambda prior, scale: (_ for _ in ()).throw(NotPositiveDefiniteError("a matrix is not positive definite"))
        return inner


def test_a_system_that_cannot_be_solved_is_told():
    net, x, y = regression()
    before = weights(net)
    opt = optim.GaussNewton(net, gaussian(), structure=Silent, damping=optim.LevenbergMarquardt(1.0, tries=3))
    with pytest.raises(ValueError, match="could not be solved: a matrix is not positive definite; raise the damping"):
        opt.step(x, y)
    assert torch.equal(weights(net), before) and opt.damping.λ == 64.0  # 1 · 2 · 4 · 8


def test_the_gradient_is_of_all_data_whatever_a_structure_keeps(monkeypatch):
    from bayesgn.ggn.linearization import Linearizer

    net, x, y = regression()
    monkeypatch.setattr(Linearizer, "chunk", lambda self, columns: 4)  # pieces, of which some hold no inducing datum
    wanted = torch.autograd.grad(0.5 * (net(x) - y).square().mean(), list(net.parameters()))
    opt = optim.GaussNewton(net, gaussian(), structure=ggn.Gram(inducing=2))
    opt.accumulate(x, y)
    for p, g in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g)
    with pytest.raises(ValueError, match="H of fewer data than the loss"):
        optim.GaussNewton(net, gaussian(), structure=ggn.Gram(subset=5)).step(x, y)


# -- what a reader of the code found ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [optim.LevenbergMarquardt, optim.TrustRegion, optim.Dogleg])
def test_heavy_ball_does_not_stall_a_damping_that_learns(damping):
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian(), damping=damping(), momentum=optim.HeavyBall(0.9))
    taken = 0
    for _ in range(25):
        opt.step(x, y)
        taken += opt.last.accepted
    assert taken == 25 and mean_loss(net, x, y) < 0.5 * math.log(2 * math.pi) + 0.01


@pytest.mark.parametrize("damping", [optim.TrustRegion, optim.Dogleg])
def test_a_radius_survives_a_step_that_no_rate_improves(damping):
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian(), damping=damping(1.0, tries=2), line_search=optim.Backtracking(tries=2))
    loss = closure_of(opt, net, x, y)

    def lying() -> Tensor:
        value = loss()
        for p in net.parameters():
            p.grad.neg_()
        return value

    with pytest.warns(UserWarning, match="rejected"):
        opt.step(lying)
    assert opt.damping._radius > 0
    opt.step(x, y)
    assert opt.last.loss > 0


@pytest.mark.parametrize("length", [5, 12])
def test_padding_counts_for_nothing(length):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 5, 2, generator=g, dtype=torch.float64), torch.randint(3, (6, 5), generator=g)
    likelihood = likelihoods.Categorical(ignore_index=-100)
    padded = torch.cat([x, torch.zeros(6, length - 5, 2).double()], 1), torch.cat([y, torch.full((6, length - 5), -100)], 1)
    steps = []
    for data in ((x, y), padded):
        net = regression()[0]
        net[2] = nn.Linear(6, 3).double()
        nn.init.constant_(net[2].weight, 0.1)
        nn.init.zeros_(net[2].bias)
        opt = optim.GaussNewton(net, likelihood, damping=optim.Constant(0.1), weight_decay=0.01)
        steps.append((opt.step(*data), weights(net), opt.last.ratio))
        wanted = torch.nn.functional.cross_entropy(net(data[0]).flatten(0, 1), data[1].flatten(), ignore_index=-100)
        assert opt.last.trial == pytest.approx(float(wanted.detach()) + 0.005 * float(weights(net).square().sum()))
    torch.testing.assert_close(steps[0], steps[1])


def test_no_target_at_all_is_told():
    net, x, y = regression()
    with pytest.raises(ValueError, match="no row of y has a target"):
        optim.GaussNewton(net, gaussian()).step(x, torch.full_like(y, math.nan))


def test_float32_goes_as_far_as_its_rounding():
    x = torch.linspace(-1, 1, 60)[:, None]
    y = torch.sin(3 * x).expand(-1, 6) * torch.arange(1, 7)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 6))
    opt = optim.GaussNewton(net, gaussian())
    for _ in range(60):
        opt.step(x, y)
    assert float((net(x) - y).square().mean().detach()) < 2e-6


def test_copies_and_pickles_go_on_by_themselves():
    import pickle

    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian(), momentum=optim.Adaptive())
    torch.optim.lr_scheduler.StepLR(opt, 5)
    opt.step(x, y)
    for other, its in (copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))):
        assert its.net is other
        its.step(x, y)
        assert not torch.equal(weights(other), weights(net))
    opt.step(x, y)
    torch.testing.assert_close(weights(other), weights(net))


def test_a_metric_in_a_closure_is_no_data_and_a_compiled_net_is_seen():
    one, x, y = regression()
    two = copy.deepcopy(one)
    a, b = optim.GaussNewton(one, gaussian()), optim.GaussNewton(two, gaussian())
    plain = closure_of(b, two, x, y)

    def measured() -> Tensor:
        with torch.no_grad():
            two(torch.cat([x, 5 * x]))
        return plain()

    compiled = torch.compile(copy.deepcopy(one), backend="eager")
    compiled(x)  # already compiled when the optimizer is made
    c = optim.GaussNewton(compiled, gaussian())
    for _ in range(3):
        a.step(x, y), b.step(measured), c.step(closure_of(c, compiled, x, y))
    torch.testing.assert_close(weights(one), weights(two))
    torch.testing.assert_close(weights(one), weights(compiled))


def test_gradient_descent_by_closure():
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian(), structure=ggn.Identity, damping=optim.Constant(0.0), lr=0.1)
    before = weights(net)
    opt.step(closure_of(opt, net, x, y))
    torch.testing.assert_close(weights(net), before - 0.1 * torch.cat([p.grad.reshape(-1) for p in net.parameters()]))


def test_nets_of_two_dtypes():
    net, x, y = regression()

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(2, 6), net[2]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x.float())).double())

    mixed = Mixed()
    opt = optim.GaussNewton(mixed, gaussian())
    first = float(opt.step(x, y))
    for _ in range(10):
        last = float(opt.step(x, y))
    assert last < first and mixed.body.weight.dtype == torch.float32 and mixed.head.weight.dtype == torch.float64


def test_parameters_that_were_replaced_and_groups_that_come_late():
    net, x, y = regression()
    opt = optim.GaussNewton(net, gaussian())
    with pytest.raises(ValueError, match="build a new one"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="finite"):
        optim.GaussNewton(net, gaussian(), parameters=[{"parameters": ["0.weight"], "lr": -1.0}])
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="was replaced after"):
        opt.step(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("structure", [ggn.Full, ggn.Gram, ggn.Kron, ggn.MatrixFree(tol=1e-6)], ids=str)
def test_on_a_gpu_as_on_a_cpu(structure):
    net, x, y = regression()
    twin = copy.deepcopy(net).cuda()
    optim.GaussNewton(net, gaussian(), structure=structure, scaling=None).step(x, y)
    optim.GaussNewton(twin, gaussian().cuda(), structure=structure, scaling=None).step(x.cuda(), y.cuda())
    torch.testing.assert_close(weights(twin).cpu(), weights(net))
