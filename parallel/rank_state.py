"""What a rank holds beside its passes: shards, their gradients, and the optimizer's state."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from colonnade.models.decoder import Decoder
from colonnade.models.names import tensors_of
from colonnade.parallel.gradients import local
from colonnade.parallel.optimizer import OffloadedAdamW, Optimizer
from colonnade.parallel.optimizer.offload.report import OffloadReport, kept_gradients
from colonnade.parallel.passes import Passes
from colonnade.parallel.pipeline.pipeline import Pipeline
from colonnade.parallel.storages import StorageLedger


def shards(model: Decoder) -> list[Tensor]:
    """Returns this rank's parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Returns the gradients of those parameters that have one."""
    return [p.grad for p in parameters if p.grad is not None]


def hold_state(ledger: StorageLedger, model: Decoder, optimizer: Optimizer) -> None:
    """Tells the ledger what was allocated before the step."""
    ledger.hold("parameters", shards(model))
    ledger.hold("optimizer", device_state(optimizer))
    if isinstance(optimizer, OffloadedAdamW):
        ledger.hold("host", [host.state.buffer for host in optimizer.host])


def device_state(optimizer: Optimizer) -> list[Tensor]:
    """Returns the state of an optimizer, unless it is in the host's memory."""
    return [] if isinstance(optimizer, OffloadedAdamW) else list(optimizer.named_state().values())


def offload_report(passes: Passes, optimizer: Optimizer) -> OffloadReport | None:
    """Reports offloaded state, at the end of a backward pass in which no gradient has left."""
    if not isinstance(optimizer, OffloadedAdamW):
        return None
    # a pipeline without FSDP2 does not say when gradients are complete
    none_leave = isinstance(passes, Pipeline) and not isinstance(passes.model, FSDPModule)
    kept = list(optimizer.numbers) if none_leave else kept_gradients(optimizer)
    return OffloadReport.of(optimizer, kept)


def saved_bytes(model: Decoder, optimizer: Optimizer) -> int:
    """Returns the bytes of the rank's tensors in a checkpoint."""
    saved = {**dict(tensors_of(model)), **optimizer.masters(), **optimizer.named_state()}
    return sum(local(t).nbytes for t in saved.values())
