"""Serving: quantised tables over one or several devices, and the modules that a server calls."""
