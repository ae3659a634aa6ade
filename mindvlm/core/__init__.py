"""Errors, configs, the runtime, progress and processes. Every other package may import this one."""
