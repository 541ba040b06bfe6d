"""Proves that nothing stops a run: faults at random moments, and the same weights at the end."""
