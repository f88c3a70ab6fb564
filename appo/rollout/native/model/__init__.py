"""The decoder that the native engine runs: its weights, linears, layers, head and adapters."""
