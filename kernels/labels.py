"""Labels of tokens. This file imports nothing, for programs that only read data."""

IGNORED = -100  # label of a token without loss, as in torch.nn.functional.cross_entropy
