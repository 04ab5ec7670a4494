"""Simulated fleets with a hidden truth: their constants, what each device is, what takes how long, what users like."""
