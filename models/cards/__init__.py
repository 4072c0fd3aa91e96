"""A card for each kind of sub-block: all that is known of it but how it computes. No torch."""
