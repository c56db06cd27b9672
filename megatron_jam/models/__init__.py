"""Towers, bridges, heads and the parameter table."""
