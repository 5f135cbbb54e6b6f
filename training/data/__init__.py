"""What the training scripts read: videos of a `datasets` videofolder, and their latents."""
