"""A run: build what it needs, its folder and logs, a tuned backbone, and the text that it generates."""
