"""What a command of the terminal does: plan, train, evaluate, resume and replay a run."""
