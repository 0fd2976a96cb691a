"""Evaluation: answer extraction, grading, and the runner of the bundled lm-eval tasks.

Nothing here imports axolotl, trl, torch or transformers, so that an lm-eval environment of its own
can use it; the models live in the runner's child process.
"""
