"""Ranks: process groups, and the strategies that make replicas one model."""
