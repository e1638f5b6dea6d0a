"""Pickles, read and written without running any code that they name."""
