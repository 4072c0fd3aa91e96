"""Replays micro-batches on other ranks, to find a processor that computes wrongly and says nothing.

Every `guard.replay_every` steps, after the update, when no weight has a gradient and no optimizer
expects one, every *replica*, the ranks that compute a micro-batch together, computes two
micro-batches forward and backward from the same weights: the first one of its own step, and then
that of the replica before it.

    replica      0     1     2
    own          a     b     c
    replay       c     a     b       of the replica before
    third        b     c     a       only if some results differ

Ranks at the same place in their replicas compare checksums (`parallel/replay.py`), which have to be
equal bit by bit: the same program, on the same data, in the same shapes, on processors of one kind,
rounds alike. So operators have to be deterministic, which a rule demands (`train.deterministic`),
and hosts of one kind: on others, or with other libraries, it reports differences that are no fault.
There is no tolerance, because a faulty processor may be wrong in low bits as well as in high ones.
The rank that is named is the one at which results differ first; what is computed from them differs
on others. A third replica, where there is one, shows which of two is wrong.

What it sees: products, attention, scans and collectives within a replica, forward and backward,
that are wrong at the time; and weights that have diverged between replicas (`dp_replicate`).

What it does not see: a fault that does not occur in these few passes, because it is rare or depends
on other data; the optimizer's update and other work on a shard of the weights, which one rank does
for all; reductions of gradients between replicas; what all processors compute wrongly alike. It
finds faulty processors in the course of a run, and does not prove that a step is right: it repeats
also the rank's own passes instead of recording those of the step, in which micro-batches of a
pipeline are in flight together, and FSDP2 sums their gradients before anybody sees them.

With experts on ranks of several data-parallel ranks these are one replica, as they exchange tokens.
"""

import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.launcher.checkpoint import newest
from colonnade.launcher.cluster.collective import on_all_ranks, on_rank_zero
from colonnade.launcher.data import Batch
from colonnade.launcher.errors import UserError
from colonnade.launcher.train.job import Job
from colonnade.launcher.train.lines import write_below
from colonnade.launcher.train.schedule import batch_size, micro_batches
from colonnade.launcher.train.step import keys_of_step
from colonnade.parallel.mesh import data_rank
from colonnade.parallel.passes import Inputs
from colonnade.parallel.replay import Checksum, Recording, repeat


class Replicas(NamedTuple):
    """The ranks by replica.

    Attributes:
        ranks: `[R, P]`, the rank at each of the P places of each of the R replicas.
        data_ranks: of one replica.
        replica: that of this rank.
        place: of this rank in it.
    """

    ranks: list[list[int]]
    data_ranks: int
    replica: int
    place: int

    @classmethod
    def of(cls, mesh: DeviceMesh, data_ranks: int, rank: int) -> "Replicas":
        """Returns those of a mesh, whose replicas have so many data-parallel ranks."""
        _, ranks_of_data = data_rank(mesh)
        by_data = mesh.mesh.movedim(0, 2).reshape(ranks_of_data, -1)  # pp behind the data axes
        ranks: list[list[int]] = by_data.reshape(ranks_of_data // data_ranks, -1).tolist()
        replica = next(q for q, of_replica in enumerate(ranks) if rank in of_replica)
        return cls(ranks, data_ranks, replica, ranks[replica].index(rank))

    def peer(self, distance: int) -> int:
        """Returns the rank at the same place of the replica so many before this one."""
        return self.ranks[(self.replica - distance) % len(self.ranks)][self.place]


class Difference(NamedTuple):
    """Two ranks that computed different results from the same micro-batch.

    Attributes:
        owner: the rank whose micro-batch it was.
        replayer: the rank that replayed it.
        result: the first that differs, in words.
        suspect: which of both a third rank contradicts; None: there is none, or both.
        third: that rank; None: there is none.
    """

    owner: int
    replayer: int
    result: str
    suspect: int | None
    third: int | None


def replay_if_due(job: Job, batches: Sequence[Batch]) -> None:
    """Replays the first micro-batch of every replica, if the step that was just updated asks for
    it. Collective.

    Raises:
        UserError: on all ranks, if results differ; an event of the run tells of it.
    """
    every = job.recipe.guard.replay_every
    if not every or (job.step + 1) % every:
        return
    replicas = Replicas.of(job.mesh, job.recipe.parallel.data_ranks_of_replica, job.world.rank)
    if len(replicas.ranks) < 2:
        return  # an elastic job that has lost the others
    with job.timer.part("replay"):
        if differences := compare(job, replicas, batches[0]):
            stop_for_differences(job, differences)


def compare(job: Job, replicas: Replicas, batch: Batch) -> list[Difference]:
    """Computes and replays micro-batches, and returns where results differ; the same on all ranks.
    Collective."""
    recordings = [recording_of(job, replicas, batch, distance) for distance in (0, 1)]
    digests = torch.stack([one.digest() for one in recordings])
    of_ranks = [torch.empty_like(digests) for _ in range(job.world.size)]
    dist.all_gather(of_ranks, digests)
    own, replayed = torch.stack(of_ranks, dim=1).tolist()
    ranks = replicas.ranks
    if all(
        own[ranks[q - 1][place]] == replayed[rank]
        for q in range(len(ranks))
        for place, rank in enumerate(ranks[q])
    ):
        return []
    if len(ranks) > 2:
        recordings.append(recording_of(job, replicas, batch, 2))
    found = on_all_ranks(lambda: [one.checksums() for one in recordings])
    differences = (difference_of(q, ranks, found) for q in range(len(ranks)))
    return [one for one in differences if one]


def difference_of(
    q: int, ranks: list[list[int]], found: list[list[list[Checksum]]]
) -> Difference | None:
    """Returns the first difference in the passes of the micro-batch of replica q.

    Args:
        q: the index of a replica.
        ranks: as in `Replicas`.
        found: by rank the checksums of its own micro-batch, of the one that it replayed, and where
            there are three replicas or more of the third one.
    """
    count = len(ranks)
    of_places = zip(ranks[q], ranks[(q + 1) % count], ranks[(q + 2) % count], strict=True)
    first: tuple[tuple[int, int], Difference] | None = None
    for owner, replayer, third in of_places:
        pairs = zip(found[owner][0], found[replayer][1], strict=True)
        number = next((i for i, (a, b) in enumerate(pairs) if a.value != b.value), None)
        if number is None:
            continue
        a, b = found[owner][0][number], found[replayer][1][number]
        suspect, witness = None, None
        if count > 2:
            witness, value = third, found[third][2][number].value
            suspect = replayer if value == a.value else owner if value == b.value else None
        if first is None or a.order < first[0]:
            first = a.order, Difference(owner, replayer, a.result, suspect, witness)
    return first[1] if first else None


def recording_of(job: Job, replicas: Replicas, batch: Batch, distance: int) -> Recording:
    """Computes the first micro-batch of the step of the replica so many before this one, whose
    ranks send it; 0 is this rank's own. Collective."""
    rank, ranks = data_rank(job.mesh)
    source = (rank - distance * replicas.data_ranks) % ranks
    samples = micro_batches(job.stage, job.step, source, ranks)[0]
    if distance:
        batch = exchanged(batch, replicas.peer(-distance), replicas.peer(distance), job)
    groups, rng_key = keys_of_step(job.stage, job.step)
    train = job.recipe.train
    scale = 1 / (batch_size(train, job.step) * train.seq_len)
    inputs = Inputs(batch, samples, groups, rng_key)
    return repeat(job.model, job.engine.passes, inputs, scale)


def exchanged(batch: Batch, to: int, source: int, job: Job) -> Batch:
    """Sends a micro-batch to one rank, and receives one of the same shape from another."""
    sent = torch.stack(list(batch)).to(job.world.device)
    received: Tensor = torch.empty_like(sent)
    operations = [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, received, source)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return Batch(*received.cpu())


def stop_for_differences(job: Job, differences: Sequence[Difference]) -> None:
    """Records the differences, and raises UserError on all ranks. Collective."""
    hosts = on_all_ranks(socket.gethostname)
    step = job.step + 1
    suspects = sorted({one.suspect for one in differences if one.suspect is not None})

    def record() -> None:
        job.events.add(
            "replay",
            step,
            pairs=[[one.owner, one.replayer] for one in differences],
            suspects=suspects,
            hosts={str(rank): hosts[rank] for one in differences for rank in one[:2]},
            result=differences[0].result,
        )

    on_rank_zero(lambda: write_below(job.run, record))
    last = on_rank_zero(lambda: newest(job.checkpoints))
    told = "; ".join(described(one, hosts) for one in differences)
    host = hosts[suspects[0]] if len(suspects) == 1 else "the faulty host"
    raise UserError(
        f"step {step}: {told}. A processor computes wrongly, so the run stops; "
        f"{f'the newest checkpoint is {last}' if last else 'there is no checkpoint yet'}. Go on "
        f"without {host}; if the ranks' processors or libraries are of different kinds, they round "
        "differently without a fault: set guard.replay_every = 0"
    )


def described(difference: Difference, hosts: Sequence[str]) -> str:
    """Says which ranks computed different results, and which of them is the odd one out."""
    owner, replayer, result, suspect, third = difference
    text = (
        f"rank {owner} ({hosts[owner]}) and rank {replayer} ({hosts[replayer]}) computed different "
        f"results from the same micro-batch, first in {result}"
    )
    if third is None:
        return text
    if suspect is None:
        return f"{text}, and rank {third} ({hosts[third]}) differs from both"
    return f"{text}, and rank {third} ({hosts[third]}) contradicts rank {suspect}"
