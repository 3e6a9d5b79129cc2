"""Engines for CPUs, compiled by OpenVINO."""
