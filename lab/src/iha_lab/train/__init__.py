"""Fine-tuning that goes on after a kill: recipe, loop, checkpoints."""
