"""What a run says: records in `metrics.jsonl`, which is the truth, and sinks that are views of it."""
