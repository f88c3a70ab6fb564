"""Pure functions on tensors: where to branch, how to assign credit, which loss.

No model, no engine, no files.
"""
