"""Tasks, records, packed batches and models: everything that enters a training run."""
