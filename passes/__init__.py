"""Passes: program to program, one a file."""
