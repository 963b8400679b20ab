"""Benchmarks against PEFT and transformers' Trainer: `make bench`."""
