"""Two gloo processes against one: every structure, uneven and empty shards, errors that all hear of, and what cannot be right."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import bayesgn as bgn
from bayesgn import _distributed, _files, ggn, likelihoods, models, optim, rules

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo")

PROCESSES = 2
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """A check that both processes run at the same time; it is handed a folder that they share."""
    CHECKS[function.__name__] = function
    return function


def work(rank: int, folder: str, names: list[str]) -> None:
    """All checks in one process of the group; what failed goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=PROCESSES, init_method=f"file://{folder}/meeting", timeout=timedelta(seconds=60)
    )
    found = {}
    for name in names:
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        try:
            CHECKS[name](own)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[list[dict[str, str]]]:
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with tempfile.TemporaryDirectory() as folder:
            asked = {item.callspec.params["name"] for item in request.session.items if item.originalname == test_two_processes.__name__}
            torch.multiprocessing.spawn(work, (folder, [name for name in CHECKS if name in asked]), nprocs=PROCESSES)
            yield [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    finally:
        os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)


# -- one problem, in two parts -----------------------------------------------------------------------------------------

N, X_TEST = 13, torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
θ31 = torch.arange(31.0, dtype=torch.float64)  # some vector of weights


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def rank() -> int:
    return dist.get_rank()


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()


def data(n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, dtype=torch.float64, generator=g), torch.randint(3, (n,), generator=g)


def part(cut: int, n: int = N) -> list[tuple[Tensor, Tensor]]:
    """The first ``cut`` data on process 0, the rest on process 1, in batches of different sizes."""
    x, y = data(n)
    here = slice(0, cut) if rank() == 0 else slice(cut, n)
    return list(zip(x[here].split(4 - rank()), y[here].split(4 - rank()), strict=True)) if len(x[here]) else []


def fit(structure, data, group=None, prior=1.0, likelihood=None, **options) -> models.NetworkPosterior:
    prior = models.WeightPrior(prior) if isinstance(prior, float) else prior
    likelihood = likelihoods.Categorical() if likelihood is None else likelihood
    return bgn.laplace(models.Network(net(), prior, structure), likelihood, data, group=group, progress=False, **options)


def answers(posterior: models.NetworkPosterior) -> list[Tensor]:
    found = posterior.log_evidence(), posterior.weight_variance(), posterior(X_TEST).covariance_matrix, posterior.precision().solve(θ31)
    return [t.detach() for t in found]


def same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), float((a - b).norm() / b.norm())


def same_everywhere(tensors: list[Tensor]) -> None:
    """To the last bit."""
    assert len(set(_distributed.gather(_files.digest(tensors), world()))) == 1


@contextlib.contextmanager
def both_raise(mine: type[Exception], words: str, others: type[Exception] = _distributed.PeerError, at: int = 1) -> Iterator[None]:
    """``mine`` on process ``at``, ``others`` on the other, which hears the ``words`` too."""
    with pytest.raises(mine if rank() == at else others, match=words):
        yield


STRUCTURES = {
    "Full": (ggn.Full(), 1e-12),
    "Layerwise": (ggn.Layerwise(), 1e-12),
    "Diag": (ggn.Diag(), 1e-12),
    "Kron": (ggn.Kron(), 1e-12),
    "EigenKron": (ggn.EigenKron(), 1e-10),  # eigenvectors of sums that differ by rounding
    "LowRank": (ggn.LowRank(rank=26), 1e-10),  # the rank of H: exact
    "LowRank truncated": (ggn.LowRank(rank=5, oversample=4, walks=3), 1e-7),
    "Gram": (ggn.Gram(), 1e-12),
    "Gram sharded": (ggn.Gram(sharded=True), 1e-12),
    "Gram inducing": (ggn.Gram(inducing=N), 1e-8),  # all data, in whatever order
    "MatrixFree": (ggn.MatrixFree(tol=1e-13, probes=31), 1e-10),
    "MatrixFree walking": (ggn.MatrixFree(tol=1e-13, probes=31, memory=0), 1e-10),
}


def compare(name: str, cut: int) -> None:
    """The fit of two processes with that of one on all data, to rounding; on both processes to the last bit."""
    try:
        structure, tolerance = STRUCTURES[name]
        posterior, one = fit(structure, part(cut), world()), fit(structure, data())
        assert posterior.num_data == N
        found = answers(posterior)
        same(found, answers(one), tolerance)
        same(list(posterior.statistics.values()), list(one.statistics.values()))
        same_everywhere(found)
    except Exception as error:
        raise AssertionError(f"{name}, {cut} of {N} data on process 0") from error


@check
def every_structure_gives_the_posterior_of_one_process(folder: Path) -> None:
    for cut in (9, N, 0):  # uneven parts; and one process without data, which is the last or the first
        for name in STRUCTURES:
            if "MatrixFree" not in name or (name, cut) == ("MatrixFree", 9):
                compare(name, cut)


@check
def matrix_free_in_uneven_and_empty_parts(folder: Path) -> None:  # slow: conjugate gradients take a second each
    for cut in (9, N, 0):
        for name in ("MatrixFree", "MatrixFree walking"):
            compare(name, cut)


@check
def adding_up_curvatures_afterwards(folder: Path) -> None:
    """What an optimizer does: each process adds its batches, then one sum."""
    one = torch.ones((), dtype=torch.float64)
    for name, (structure, tolerance) in STRUCTURES.items():
        model = models.Network(net(), structure=structure)
        model.linearizer.prepare(data()[0], lambda f: f)
        H = structure.start(model.linearizer.blocks, one)
        if name in ("EigenKron", "Gram inducing"):
            with pytest.raises(ValueError, match="all data at once"):
                H.all_reduce(world())
            continue
        if name == "LowRank truncated":
            continue  # a sum of truncated H is truncated again: no equality to be had
        if name == "LowRank":
            H = ggn.LowRank(rank=31).start(model.linearizer.blocks, one)
        for x, _ in part(8):
            H.add(model.linearizer(x, lambda f: f).factors())
        H.all_reduce(world())
        J = torch.cat([f.jacobian() for f in model.linearizer(data()[0], lambda f: f).factors()], dim=-1).flatten(0, 1)
        dense = J.mT @ J + torch.eye(31, dtype=torch.float64)
        precision = H.with_prior([one] * 2, one)
        if H.exact or name == "LowRank":
            same([precision.solve(θ31)], [torch.linalg.solve(dense, θ31)], max(tolerance, 1e-11))
        if name == "Diag":
            same([precision.diagonal()], [dense.diagonal().reciprocal()])


@check
def steps_of_the_optimizer(folder: Path) -> None:
    (x, y), here = data(), slice(0, 9) if rank() == 0 else slice(9, N)
    for structure in (ggn.Full(), ggn.Kron(), ggn.Gram(), ggn.Gram(sharded=True), ggn.MatrixFree(tol=1e-12)):
        found = []
        for group, part in ((world(), here), (None, slice(None))):
            trained = net()
            damping = optim.LevenbergMarquardt(1e-1)
            opt = optim.GaussNewton(trained, likelihoods.Categorical(), structure=structure, damping=damping, group=group)
            losses = [torch.as_tensor(float(opt.step(x[part], y[part]))) for _ in range(3)]
            found.append(torch.cat([p.detach().reshape(-1) for p in trained.parameters()]))
            assert losses[-1] < losses[0]
        same(found[:1], found[1:], 1e-10)
        same_everywhere(found[:1])


@check
def tuning_afterwards_is_the_same_everywhere(folder: Path) -> None:
    for structure in (ggn.Full(), ggn.Kron(), ggn.Gram(sharded=True)):
        prior = models.WeightPrior.per_layer(net())
        posterior = fit(structure, part(9), world(), prior)
        alone = fit(structure, data(), None, models.WeightPrior.per_layer(net()))
        for p in (posterior, alone):
            bgn.maximize_evidence(p)
        same([posterior.prior.precision.detach()], [alone.prior.precision.detach()], 1e-8)
        same_everywhere([posterior.prior.precision.detach()])


@check
def gradients_of_the_sharded_dual(folder: Path) -> None:
    """In a precision for each layer and for each weight, of the evidence, a solve and a variance; with an empty part, too."""
    for cut in (9, N):
        for make in (models.WeightPrior.per_layer, models.WeightPrior.per_weight):
            slopes = []
            for structure, shard, group in ((ggn.Gram(sharded=True), part(cut), world()), (ggn.Full(), data(), None)):
                posterior = fit(structure, shard, group, make(net(), 0.8))
                total = posterior.log_evidence() + posterior.precision().solve(θ31).square().sum() + posterior(X_TEST).variance.sum()
                slopes.append(torch.autograd.grad(total, posterior.prior.log_precision)[0])
            same(slopes[:1], slopes[1:], 1e-10)


@check
def what_a_sharded_dual_cannot_do(folder: Path) -> None:
    posterior = fit(ggn.Gram(sharded=True), part(9), world())
    with pytest.raises(ValueError, match="cannot be saved"):
        posterior.save(folder / f"{rank()}.safetensors")
    with pytest.raises(ValueError, match="no data can be added"):
        posterior.condition(data())
    with pytest.raises(ValueError, match="spread over several processes"):
        fit(ggn.MatrixFree(), part(9), world()).condition(data())


@check
def a_posterior_is_saved_by_one_and_read_by_all(folder: Path) -> None:
    posterior = fit(ggn.Kron, part(9), world())
    if rank() == 0:
        posterior.save(folder / "p.safetensors")
    dist.barrier()
    same(answers(bgn.load(folder / "p.safetensors", net())), answers(posterior), 0.0)


@check
def gaussian_statistics_and_noise(folder: Path) -> None:
    x, _ = data()
    y = torch.sin(x)
    here = slice(0, 4) if rank() == 0 else slice(4, N)
    likelihood = likelihoods.Gaussian(0.3)
    posterior = fit(ggn.Full, (x[here], y[here]), world(), likelihood=likelihood)
    alone = fit(ggn.Full, (x, y), likelihood=likelihood)
    for p in (posterior, alone):
        bgn.maximize_evidence(p)
    same([posterior.likelihood.noise.detach(), *answers(posterior)], [alone.likelihood.noise.detach(), *answers(alone)], 1e-8)


@check
def a_float32_net_is_summed_in_float64(folder: Path) -> None:
    x, y = data()
    x, here = x.float(), slice(0, 9) if rank() == 0 else slice(9, N)
    model = models.Network(net().float(), structure=ggn.Full)
    posterior = bgn.laplace(model, likelihoods.Categorical(), (x[here], y[here]), group=world(), progress=False)
    H = posterior.curvature.tensors()["H"]
    assert H.dtype == torch.float64
    batches = [(x[:9], y[:9]), (x[9:], y[9:])]  # the same batches, so the same rounding within them
    same([H], [bgn.laplace(model, likelihoods.Categorical(), batches, progress=False).curvature.tensors()["H"]], 1e-15)


# -- errors ------------------------------------------------------------------------------------------------------------


@check
def all_hear_of_an_error_on_one(folder: Path) -> None:
    for structure, _ in STRUCTURES.values():
        for bad in range(2):
            mine = part(9)
            if rank() == bad:
                mine[-1][0][0, 0] = float("nan")
            words = "x holds 1 non-finite" if rank() == bad else f"process {bad} of 2 failed.*ValueError: x holds 1 non-finite"
            with both_raise(ValueError, words, at=bad):
                fit(structure, mine, world())


@check
def parts_within_parts_tell_once(folder: Path) -> None:
    for _ in range(2):
        with both_raise(KeyError, "lost"), _distributed.together(world()), _distributed.together(world()):
            if rank() == 1:
                raise KeyError("lost")
        assert _distributed.gather(rank(), world()) == [0, 1]  # the processes are still in step


@check
def all_hear_of_an_error_in_a_later_walk(folder: Path) -> None:
    class Changing:
        """Other data at the second walk of process 1."""

        walks = 0

        def __iter__(self):
            self.walks += 1
            yield from [(x + (self.walks > 1 and rank() == 1), y) for x, y in part(9)]

    for structure in (ggn.EigenKron(), ggn.LowRank(rank=5, memory=0), ggn.Gram(inducing=4)):
        with both_raise(ValueError, "other data than the first"):
            fit(structure, Changing(), world())


@check
def all_hear_of_what_only_one_was_given_wrong(folder: Path) -> None:
    with both_raise(TypeError, "likelihood is the class"):
        fit(ggn.Kron, part(9), world(), likelihood=likelihoods.Categorical if rank() == 1 else None)
    with both_raise(TypeError, "expected a DataLoader"):
        fit(ggn.Kron, part(9) if rank() == 0 else None, world())
    with pytest.raises(ValueError, match="gave no data"):
        fit(ggn.Kron, [], world())
    with pytest.raises(TypeError, match="expected a torch.distributed.ProcessGroup"):
        fit(ggn.Kron, part(9), "WORLD")


@check
def other_nets_or_settings_are_refused(folder: Path) -> None:
    odd = net(seed=0)
    with torch.no_grad():
        odd[2].bias[1] += 1e-9 * rank()
    with pytest.raises(ValueError, match="the net's 2.bias of process 1"):
        models.Network(odd).condition(part(9), likelihoods.Categorical(), group=world())
    with pytest.raises(ValueError, match="the structure of process 1 is 'Gram"):
        fit(ggn.Kron() if rank() == 0 else ggn.Gram(), part(9), world())
    with pytest.raises(ValueError, match="the prior of process 1"):
        fit(ggn.Kron(), part(9), world(), prior=1.0 + rank())


@check
def the_same_data_on_each_process_are_refused(folder: Path) -> None:
    for structure in (ggn.Kron, ggn.Full):
        with pytest.raises(ValueError, match="handed in the same 13 data"):
            fit(structure, data(), world())
    x, y = data()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(rank()))
    with pytest.raises(ValueError, match="handed in the same 13 data"):  # in another order
        fit(ggn.Kron, (x[order], y[order]), world())


# -- loaders -----------------------------------------------------------------------------------------------------------


@check
def loaders_with_samplers(folder: Path) -> None:
    whole = TensorDataset(*data())

    def loader(dataset, **options) -> DataLoader:
        return DataLoader(dataset, batch_size=3, sampler=DistributedSampler(dataset, shuffle=False, **options))

    with pytest.raises(ValueError, match="Pass group=torch.distributed.group.WORLD"):
        fit(ggn.Kron, loader(whole))
    with pytest.raises(ValueError, match="repeats 1 of the 13 data"):
        fit(ggn.Kron, loader(whole), world())
    with pytest.raises(ValueError, match="gives part 0 of 3"):
        fit(ggn.Kron, loader(whole, num_replicas=3, rank=0), world())
    even = Subset(whole, range(12))
    wanted = answers(fit(ggn.Full, DataLoader(even)))
    same(answers(fit(ggn.Full, loader(even), world())), wanted)
    same(answers(fit(ggn.Full, loader(whole, drop_last=True), world())), wanted)
    same(answers(fit(ggn.Full, DataLoader(_distributed.shard(whole, world()), batch_size=2), world())), answers(fit(ggn.Full, data())))


@check
def shards_are_every_datum_once(folder: Path) -> None:
    for n in (0, 1, 2, 7, 8):
        x, y = torch.arange(3.0 * n).reshape(n, 3), torch.arange(n)
        parts = _distributed.gather(_distributed.shard(({"a": x}, y), world()), world())
        assert torch.equal(torch.cat([y_ for _, y_ in parts]), y)
        assert torch.equal(torch.cat([x_["a"] for x_, _ in parts]), x)
        assert abs(len(parts[0][1]) - len(parts[1][1])) <= 1
    with pytest.raises(TypeError, match="Shard the dataset"):
        _distributed.shard(DataLoader(TensorDataset(*data())), world())
    with pytest.raises(ValueError, match="must run over data first"):
        _distributed.shard((torch.zeros(3, 2), torch.zeros(4)), world())
    same(answers(fit(ggn.Kron, _distributed.shard((data(1)), world()), world())), answers(fit(ggn.Kron, data(1))))  # one datum, two processes


# -- DDP, draws, checkpoints -------------------------------------------------------------------------------------------


@check
def the_net_inside_ddp(folder: Path) -> None:
    wrapped = nn.parallel.DistributedDataParallel(net().train())
    with pytest.raises(ValueError, match="pass group=net.process_group"):
        optim.GaussNewton(wrapped, likelihoods.Categorical())
    assert optim.GaussNewton(wrapped, likelihoods.Categorical(), group=wrapped.process_group).net is wrapped.module
    optimizer, (x, y) = torch.optim.SGD(wrapped.parameters(), 0.1), data()
    here = slice(0, 7) if rank() == 0 else slice(7, N)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x[here]), y[here]).backward()
        optimizer.step()

    step()
    before = [p.grad.clone() for p in wrapped.parameters()]
    with pytest.warns(UserWarning, match="train mode"):
        posterior = models.Network(wrapped, structure=ggn.Kron).condition((x[here], y[here]), likelihoods.Categorical(), group=world())
    assert wrapped.training
    assert all(torch.equal(p.grad, g) for p, g in zip(wrapped.parameters(), before, strict=True))
    alone = models.Network(wrapped.module.eval(), structure=ggn.Kron).condition((x, y), likelihoods.Categorical())
    same(answers(posterior), answers(alone))
    step()  # its reducer still works
    same_everywhere([p.detach() for p in wrapped.parameters()])


@check
def random_curvatures_draw_apart(folder: Path) -> None:
    """One column of signs for each datum: the same signs for the same datum on two processes would make H of rank one."""
    x, y = data(1)
    rule = rules.Laplace(rules.MonteCarloFisher(samples=1))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 5, 5 + rank())]
    H = [fit(ggn.Full, (x, y), world(), rule=rule, generator=g).curvature.tensors()["H"] for g in generators]
    assert torch.linalg.matrix_rank(H[0]) == 2
    assert torch.equal(H[0], H[1]) and torch.equal(H[0], H[2])  # the first process's generator decides
    same_everywhere(H)
    fit(ggn.Full, part(9), world(), rule=rule)  # from torch's own generator, which differs between processes


@check
def a_random_subset_of_all_data(folder: Path) -> None:
    posterior = fit(ggn.Gram(subset=5), part(9), world())
    kept = posterior.curvature.kept
    assert (kept.seen, kept.settle()[0].n, len(kept.keys)) == (N, 5, 5)
    same_everywhere(answers(posterior))
    inputs, x = kept.settle()[0].a[:, 0, 0, :3], data()[0]
    where = ((inputs[:, None] - x).abs().amax(-1) == 0).nonzero()[:, 1]
    assert len(where) == 5 and bool((where.diff() > 0).all())  # five data of the whole, in its order
    halves = []  # were keys alike on both processes, the same places would be kept of both parts, always
    for seed in range(4):
        inputs = fit(ggn.Gram(subset=4, seed=seed), part(4, 8), world()).curvature.kept.settle()[0].a[:, 0, 0, :3]
        places = ((inputs[:, None] - data(8)[0]).abs().amax(-1) == 0).nonzero()[:, 1]
        halves.append(places[places < 4].tolist() == (places[places >= 4] - 4).tolist())
    assert not all(halves)
    more = posterior.condition(data())
    assert more.num_data == 2 * N and more.curvature.kept.settle()[0].n == 5


@check
def draws_of_the_matrix_free_posterior(folder: Path) -> None:
    """J̃ᵀε with ε alike on both processes would have twice the covariance where the data are alike."""
    likelihood, (x, y) = likelihoods.Gaussian(0.5), data(2)
    x = torch.stack([x[0], x[0] + 1e-6 * rank()])[rank()][None]  # nearly the same datum on each
    model = models.Network(nn.Linear(3, 1).double().eval(), structure=ggn.MatrixFree(tol=1e-10))
    with torch.no_grad():
        model.net.weight.fill_(0.3), model.net.bias.fill_(0.1)
    posterior = model.condition((x, y[:1, None].double()), likelihood, group=world())
    θ = posterior.precision().sample(4000, torch.Generator().manual_seed(0))
    same_everywhere([θ])
    J = torch.cat([x, torch.ones(1, 1)], dim=1)
    wanted = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + 2 * J.mT @ J / 0.5)
    assert (θ.mT @ θ / 4000 - wanted).norm() < 0.08 * wanted.norm()


@check
def an_interrupted_fit_goes_on(folder: Path) -> None:
    class Broken:
        def __iter__(self):
            first, *others = part(9)
            yield first
            if rank() == 1:
                raise ConnectionError("the disk is gone")
            yield from others

    checkpoint, one = models.Checkpoint(folder / "fit", batches=1), fit(ggn.Kron, data())
    with both_raise(ConnectionError, "the disk is gone"):
        fit(ggn.Kron, Broken(), world(), checkpoint=checkpoint)
    dist.barrier()
    assert sorted(p.name for p in folder.iterdir()) == ["fit.0of2", "fit.1of2"]
    dist.barrier()
    same(answers(fit(ggn.Kron, part(9), world(), checkpoint=checkpoint)), answers(one))
    dist.barrier()
    assert not list(folder.iterdir())


# -- differences -------------------------------------------------------------------------------------------------------


def exact(x: Tensor, y: Tensor) -> Tensor:
    """H [p p] of all data."""
    return fit(ggn.Full, (x, y)).curvature.tensors()["H"]


@check
def products_by_differences(folder: Path) -> None:
    (x, y), plain, V = data(), net(), torch.randn(31, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    V[:, 1] = 0
    here, likelihood = (slice(0, 9) if rank() == 0 else slice(9, N)), likelihoods.Categorical()
    before = [p.detach().clone() for p in plain.parameters()]
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 2e-3)):
        H = ggn.DifferenceProducts(plain.to(dtype), x[here].to(dtype), lambda f: likelihood.ggn_root(f, y[here]), group=world())
        same([H(V.to(dtype)).double()], [exact(x, y) @ V], tolerance)
    assert all(p.grad is None for p in plain.parameters())
    same([p.detach().double() for p in plain.parameters()], before, 1e-7)  # (float32 and back)


@check
def products_through_fully_shard(folder: Path) -> None:
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # (before torch 2.6)
        return

    for layers in (["0", "2", ""], [""]):  # the layers of their own, or the whole net as one
        sharded, mesh = net(), init_device_mesh("cpu", (PROCESSES,))
        for layer in layers:
            fully_shard(sharded.get_submodule(layer), mesh=mesh)
        through_pieces(sharded)


def through_pieces(sharded: nn.Module) -> None:
    (x, y), likelihood = data(), likelihoods.Categorical()
    here = slice(0, 9) if rank() == 0 else slice(9, N)
    own = [p.to_local().detach().clone() for p in sharded.parameters()]
    H = ggn.DifferenceProducts(sharded, x[here], lambda f: likelihood.ggn_root(f, y[here]))

    def pieces(v: Tensor) -> Tensor:
        """The entries of a whole vector [p] that this process holds."""
        parts = v.split([p.numel() for p in sharded.parameters()])
        whole = [part.reshape(p.shape) for part, p in zip(parts, sharded.parameters(), strict=True)]
        return torch.cat([w.chunk(2)[rank()].reshape(-1) if len(w.chunk(2)) > rank() else w.new_zeros(0) for w in whole])

    V = torch.randn(31, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = exact(x, y)
    mine = torch.stack([pieces(v) for v in V.T], dim=1)
    same([H(mine)], [torch.stack([pieces(v) for v in (wanted @ V).T], dim=1)], 1e-8)
    # A Gauss-Newton step on vectors in pieces.
    step = ggn.matrix_free.conjugate_gradients(lambda v: H(v) + 0.3 * v, mine, torch.full((H.numel,), 0.3).double(), 1e-6, 100, group=H.group)
    solved = torch.linalg.solve(wanted + 0.3 * torch.eye(31, dtype=torch.float64), V)
    same([step], [torch.stack([pieces(v) for v in solved.T], dim=1)], 1e-5)
    assert all(torch.equal(p.to_local(), t) and p.grad is None for p, t in zip(sharded.parameters(), own, strict=True))
    nn.functional.cross_entropy(sharded(x[here]), y[here]).backward()  # it still trains
    assert all(p.grad is not None for p in sharded.parameters())


# -- the checks, one test each -----------------------------------------------------------------------------------------


def test_where_tensors_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of a collective, by backend: nccl takes no CPU tensors, gloo is fed from the CPU."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for config, wanted in (("cpu:gloo,cuda:gloo", (cpu, cpu)), ("cuda:nccl", (gpu, gpu)), ("cpu:gloo,cuda:nccl", (cpu, gpu))):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, config=config: config)
        assert tuple(_distributed._meeting_place(None, device) for device in (cpu, gpu)) == wanted  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_script_of_the_docs() -> None:
    """By torchrun and alone, with the same evidence; its own assertions compare the rest."""
    script = Path(bgn.__file__).parent.parent / "docs" / "distributed_laplace.py"
    if not script.exists():
        pytest.skip("an installed package has no docs")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = [
        subprocess.run([sys.executable, *how, str(script)], check=True, capture_output=True, text=True, timeout=120, cwd=script.parent.parent).stdout
        for how in (launch, [])
    ]
    assert said[0] == said[1] and "200 data" in said[0]


SLOW = {matrix_free_in_uneven_and_empty_parts.__name__}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CHECKS])
def test_two_processes(outcomes: list[dict[str, str]], name: str) -> None:
    wrong = [f"on process {rank}:\n{found.get(name, 'it never came to that')}" for rank, found in enumerate(outcomes) if found.get(name) != ""]
    assert not wrong, "\n".join(wrong)
