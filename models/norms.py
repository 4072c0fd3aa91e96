"""The norms of the residual stream."""

from torch import Tensor

from colonnade.kernels.norm import crms_norm, layer_norm, rms_norm
from colonnade.models import records
from colonnade.models.config import ModelConfig
from colonnade.models.parameter_module import ParameterModule


class Norm(ParameterModule):
    """A norm over the width of the stream; weight and bias where configured, `[D]`, in fp32.

    `pre_rms` is RMSNorm on a stream that is kept centred, which makes it equal to LayerNorm; `crms`
    is the same on a stream without its last channel, which would be minus the sum of the others
    (arXiv:2305.14858).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(records.norm(config))
        self.kind, self.eps = config.norm, config.norm_eps
        self.offset = 1.0 - config.first_norm

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_of("weight") if "weight" in self.specs else None
        bias = self.weight_of("bias") if "bias" in self.specs else None
        if self.kind == "layer":
            return layer_norm(x, weight, bias, self.eps)
        if self.kind == "crms":
            return crms_norm(x, weight, self.eps)
        return rms_norm(x, weight, self.eps, bias, self.offset)
