"""Decisions on what to keep: pure functions from a tier's index to a plan. No I/O, no clock of their own."""
