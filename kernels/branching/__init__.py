"""Where to branch: future value, scores and the best positions of each rollout."""
