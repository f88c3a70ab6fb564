"""Trees to streams: which rows share a stream, and where each token of it comes from."""
