"""Run training: ranks, sharding, the reduction at the prompt, the training loop and its records."""
