"""Training: from videos to a model. docs/architecture.md shows the way through the modules."""
