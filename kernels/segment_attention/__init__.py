"""Attention of the native engine over segments of KV blocks."""
