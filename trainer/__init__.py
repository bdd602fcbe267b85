"""How a job is run: data, batch plan, model, training step, loop, checkpoints, evaluation."""
