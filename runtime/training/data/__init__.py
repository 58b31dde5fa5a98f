"""Data: rows of files, tables of tokens, and the order in which they are seen."""
