"""Tests that start Ray."""
