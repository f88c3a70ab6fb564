"""The tree of segments: who owns which tokens and KV blocks, and what has still to be run."""
