"""Observers, which watch a run, and interventions, which act on it."""
