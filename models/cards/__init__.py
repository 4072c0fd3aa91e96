"""The cards: options, parameters, seams and FLOPs of each kind of sub-block. No torch."""
