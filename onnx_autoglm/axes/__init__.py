"""Axis inference: what every axis of every value is, and where it lives."""
