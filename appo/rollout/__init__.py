"""Trees of rollouts: agents that sample, call tools, fork and are graded, on either engine."""
