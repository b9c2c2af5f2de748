"""Predict memory and traffic of a run without weights and data, for `ptd plan`."""
