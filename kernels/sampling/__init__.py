"""Drawing a token per row of logits, with its log-probability and entropy."""
