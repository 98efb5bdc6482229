"""A Laplace posterior by several processes. Run it by two (or any number that divides its 200 data), or alone; the numbers are the same:

    torchrun --nproc-per-node 2 docs/distributed_laplace.py
    python docs/distributed_laplace.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn

import bayesgn as bgn
from bayesgn import ggn, likelihoods, models


def main() -> None:
    if "LOCAL_RANK" in os.environ:  # started by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    group = dist.group.WORLD if dist.is_initialized() else None
    first = group is None or dist.get_rank() == 0

    data = bgn.datasets.two_moons(seed=0)
    whole = torch.utils.data.TensorDataset(data.x_train.double(), data.y_train)
    mine = torch.utils.data.DataLoader(bgn.shard(whole, group), batch_size=32)  # each datum on exactly one process

    torch.manual_seed(0)  # the same net everywhere; DistributedDataParallel would see to that, too
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    wrapped = nn.parallel.DistributedDataParallel(net) if group is not None else net
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.05)
    x, y = bgn.shard(whole.tensors, group)
    for _ in range(100):  # full-batch training; a mean over processes of means over equal parts
        optimizer.zero_grad()
        (nn.functional.cross_entropy(wrapped(x), y) + 0.5 / len(whole) * sum(p.square().sum() for p in net.parameters())).backward()
        optimizer.step()

    # From here on: every process brings its part of the data and gets the posterior of all data.
    posterior = bgn.laplace(models.Network(wrapped.eval(), structure=ggn.Kron), likelihoods.Categorical(), mine, group=group)
    bgn.maximize_evidence(posterior)  # on each process alone, with the same result
    if first:
        print(f"{posterior.num_data} data, log evidence {posterior.log_evidence().item():.6f} nats")

        # The claim: this is the posterior of one process with all data.
        alone = bgn.laplace(models.Network(net, structure=ggn.Kron), likelihoods.Categorical(), whole)
        bgn.maximize_evidence(alone)
        torch.testing.assert_close(posterior.log_evidence(), alone.log_evidence(), rtol=1e-9, atol=0)
        torch.testing.assert_close(posterior(data.x_test.double()).variance, alone(data.x_test.double()).variance, rtol=1e-6, atol=0)
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
