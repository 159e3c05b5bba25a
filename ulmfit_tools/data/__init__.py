"""Labelled text: loading, checking, splitting, tokenising; and the embedded model and data."""
