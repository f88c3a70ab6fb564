"""The step loop: which part does what, when, and what is counted on the way."""
