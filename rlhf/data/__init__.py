"""Data: files to canonical records, chat templates to token masks, examples to batches in a fixed order."""
