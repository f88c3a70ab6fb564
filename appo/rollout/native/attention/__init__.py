"""Attention of the native engine: the KV pool, the segments a pass reads, the backends."""
