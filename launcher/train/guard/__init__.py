"""Guards of a run against silent corruption: spikes of the loss, and replayed micro-batches."""
