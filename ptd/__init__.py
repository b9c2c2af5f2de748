"""ptd: tune a prefix, not a model."""
