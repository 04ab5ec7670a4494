"""Chooses variants and configurations for devices: a pure library on numpy and Vowpal Wabbit."""
