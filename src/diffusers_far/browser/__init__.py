"""The browser demo: play a world model, continue an own video, compare kinds of context."""
