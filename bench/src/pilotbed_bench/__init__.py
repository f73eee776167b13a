"""Benches: one folder each; `run` measures, `document` writes the tables into the pages."""
