"""Frames, streams and credits: the only home of wire formats."""
