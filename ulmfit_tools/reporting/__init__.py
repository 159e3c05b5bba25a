"""Plots, tables and reports of what was trained and how."""
