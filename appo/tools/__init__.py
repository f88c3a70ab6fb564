"""Tools that a model may call, the pool that runs them and the sandbox around programs."""
